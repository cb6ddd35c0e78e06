"""`factlens data`: the paper's data, listed, fetched and checked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from factlens.commands.shared import clear_errors
from factlens.terminal import console, print_table, progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from factlens.data_folder import Check
    from factlens.data_sets import DataSet


def data(
    names: Annotated[
        list[str] | None, typer.Argument(help="What to fetch, or to check; the list without it.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where the files are put and looked for.")] = Path(
        "data"
    ),
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare the files that are there with their sha256.")
    ] = False,
) -> None:
    """The paper's data: list it, fetch it, or check what is there. Only fetching uses the network.

    Official files come from https://rome.baulab.info/data/dsets, the others from
    the Hugging Face hub. Each is compared with a sha256: one that factlens knows,
    or that of its first whole download, which data.lock.json keeps beside it.
    Stop a download whenever you like: the same command goes on. A file that you
    put into the folder yourself is checked instead of fetched.

    Where other commands take a file (--facts, --records, --zsre, --snippets,
    --rewrites), they take a name of the list too.

    Examples:

      factlens data

      factlens data known_1000 counterfact

      factlens data --verify

      factlens average --model gpt2-xl --facts known_1000

      factlens evaluate --model gpt2-xl --records counterfact
    """
    from factlens.data_folder import FOLDER
    from factlens.data_sets import DATA_SETS, data_set

    with clear_errors(kept=folder):
        wanted = [data_set(name) for name in dict.fromkeys(names or DATA_SETS)]
        if verify:
            if _verify(wanted, folder, asked=bool(names)):
                raise typer.Exit(1)
        elif names:
            for each in wanted:
                _fetch(each, folder)
        else:
            _list(wanted, folder)
            if folder != FOLDER:
                console(stderr=True).print(
                    f"other commands look in {FOLDER}/: give them the paths of these", style="dim"
                )


def _list(wanted: Sequence[DataSet], folder: Path) -> None:
    rows = []
    for each in wanted:
        records = f"{each.records:,}" if each.records else ""
        source = "hub" if each.commit else "official"
        rows.append((each.name, records, source, _here(each, folder), each.what))
    columns = ("name", "records", "from", f"in {folder}", "what")
    print_table(columns, rows, whole=columns[:4])


def _here(each: DataSet, folder: Path) -> str:
    from factlens.data_folder import check, part

    found = check(each, folder)
    if found.state != "missing":
        return "yes" if found.state == "fine" else found.state
    begun = part(each, folder)
    if begun is None:
        return "no"
    done, total = (f"{number / 1e6:.1f}" if number else "?" for number in begun)
    return f"{done} of {total} MB"


def _fetch(each: DataSet, folder: Path) -> None:
    from factlens.data_folder import fetch

    with progress(each.name, in_bytes=True) as tell:
        path = fetch(each, folder, tell=lambda done, total: tell(done, total or None, ""))
    console().print(str(path), soft_wrap=True, markup=False)


def _verify(wanted: Sequence[DataSet], folder: Path, *, asked: bool) -> bool:
    """Show the state of each; whether one is not as it should be. That one is missing matters where it was asked for by name."""
    from factlens.data_folder import check

    found = [(each, check(each, folder)) for each in wanted]
    print_table(
        ("name", "state", "sha256"),
        [(each.name, state.state, _against(each, state)) for each, state in found],
        whole=("name", "state"),
    )
    passing = ("fine",) if asked else ("fine", "missing", "not checked")
    return any(state.state not in passing for _, state in found)


def _against(each: DataSet, found: Check) -> str:
    remedy = {
        "fine": "",
        "changed": f"; it is {str(found.sha256)[:12]}: remove the file, and fetch it again",
        "missing": "",
        "not checked": f"; `factlens data {each.name}` reads the file and notes it",
    }[found.state]
    since = "pinned" if each.sha256 else f"first fetched {found.since}"
    return (f"{found.expected[:12]}, {since}" if found.expected else "not known yet") + remedy
