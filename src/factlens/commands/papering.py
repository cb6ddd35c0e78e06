"""`factlens paper`: every experiment of the paper on one model, and one report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from factlens.commands.options import ModelName, Workers
from factlens.commands.shared import (
    EDITORS,
    check_writable,
    clear_errors,
    editor_named,
    keep_plan,
    load,
    run_command,
    usage,
)
from factlens.terminal import console

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

COMPARED = ("ft", "ft-l", "kn", "ke", "ke-cf", "mend", "mend-cf", "attn-edit", "rome")
"""The editors of Table 2 and Figure 6, in the paper's order."""
COMPARED_ZSRE = ("ft", "ft-l", "ke", "ke-zsre", "mend", "mend-zsre", "rome")
"""Those of Table 1."""
FULL = {"facts": 1000, "records": 200, "texts": 50, "layers": 50}
"""Facts that are traced; records of the tables, of those with generated texts, and of Figure 5."""
QUICK = {"facts": 60, "records": 12, "texts": 4, "layers": 3}
TOKENS = ("first-subject", "middle-subject", "last-subject", "last")
TEXT_LENGTH = 100
WRITTEN = 3
"""New facts in Figure 6."""
SKIPPED = 200
"""Of the bundled records, that were looked at while settings were chosen."""


def paper(
    model: ModelName = "atlas",
    facts: Annotated[
        Path | None, typer.Option(help="Facts to trace, as of `factlens average`.")
    ] = None,
    records: Annotated[
        Path | None, typer.Option(help="CounterFact records, as of `factlens evaluate`.")
    ] = None,
    zsre: Annotated[
        Path | None,
        typer.Option(
            help="zsRE records (zsre_mend_eval), for Table 1; without it the bundled ones."
        ),
    ] = None,
    editor: Annotated[
        list[str] | None,
        typer.Option(
            "--editor",
            "-e",
            help=f"{', '.join(EDITORS)}; repeat for several. Without it those of the paper, as far as they are trained for the model.",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option(help="A few facts and records and no further studies, for a look.")
    ] = False,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of all results; the same command goes on.")
    ] = Path("runs/paper"),
    workers: Workers = 1,
) -> None:
    """Every figure and table of the paper on one model, ours beside the paper's, and a verdict on each claim: report.html.

    Runs `factlens trace`, `average`, `evaluate` and `sweep` one after another. Stop it whenever you like: the same command goes on.

    Examples:

      factlens paper --quick

      factlens paper --workers 2 --out runs/paper-atlas

      factlens paper --model gpt2-xl --facts known_1000 --records counterfact --zsre zsre_mend_eval
    """
    from factlens.data_folder import file_of
    from factlens.paper_pages import paper_page
    from factlens.paper_results import (
        AVERAGE,
        COUNTERFACT,
        FIGURE_1,
        FIGURE_5,
        TEXTS,
        ZSRE,
        Results,
    )
    from factlens.reports import write_text

    with clear_errors(kept=out):
        check_writable(out)
        if unknown := [name for name in editor or () if name not in EDITORS]:
            raise usage(f"no editor {unknown[0]!r}; there are {', '.join(EDITORS)}")
        numbers = QUICK if quick else FULL
        facts, records = file_of(facts, "facts"), file_of(records, "counterfact")
        zsre = file_of(zsre, "zsre")
        names, asked_names = (editor, editor) if editor else _trained(model)
        files = {"facts file": facts, "records file": records, "zsre file": zsre}
        paths = {name: str(path) for name, path in files.items() if path is not None}
        if missing := [name for name, path in paths.items() if not Path(path).is_file()]:
            raise usage(f"the {missing[0]} {paths[missing[0]]} is not there")
        plan = {"model": model, "editors": [*names], "zsre editors": [*asked_names]}
        keep_plan(out / "plan.json", {**plan, **numbers, **paths})
        of = ["--model", model]
        given = ["--records", records] if records is not None else ["--skip", SKIPPED]
        traced = ["--facts", facts] if facts is not None else []
        traced += ["--study", "none"] if quick else []
        if not (out / FIGURE_1 / "trace.parquet").exists():
            _step("Figure 1", ["trace", *of, "--out", out / FIGURE_1])
        spread = ["--workers", workers]
        average = ["average", *of, *traced, *spread, "--n", numbers["facts"]]
        _step("Figures 2, 3, 7, 16", [*average, "--out", out / AVERAGE])
        evaluate = ["evaluate", *of, *spread, *_each("--editor", names)]
        _step("Table 2", [*evaluate, *given, "--n", numbers["records"], "--out", out / COUNTERFACT])
        texts = ["--n", numbers["texts"], "--generate", TEXT_LENGTH]
        _step("Table 2, texts", [*evaluate, *given, *texts, "--out", out / TEXTS])
        asked = ["--benchmark", "zsre", *_each("--editor", asked_names), "--n", numbers["records"]]
        asked += ["--records", zsre] if zsre is not None else ["--skip", SKIPPED]
        _step("Table 1", ["evaluate", *of, *spread, *asked, "--out", out / ZSRE])
        if not (out / FIGURE_5 / "records.parquet").exists():
            own = ["--records", records] if records is not None else []
            where = [*_each("--token", TOKENS), "--n", numbers["layers"], "--out", out / FIGURE_5]
            _step("Figure 5", ["sweep", *of, *spread, *own, *where])
        _records_and_texts(model, records, names, numbers, out)
        path = write_text(paper_page(Results(out)), out / "report.html")
        console().print(str(path), soft_wrap=True, markup=False)


def _trained(model: str) -> tuple[list[str], list[str]]:
    """The editors of Tables 2 and 1 that need no training or had it on this model; of the others a line says what trains them."""
    from factlens.tunables import untrained

    missing = untrained(load(model, None, "float32"), [*dict.fromkeys(COMPARED + COMPARED_ZSRE)])
    for why in missing.values():
        console(stderr=True).print(f"left out: {why}", style="dim", soft_wrap=True, markup=False)
    first, second = ([n for n in names if n not in missing] for names in (COMPARED, COMPARED_ZSRE))
    return first, second


def _each(option: str, values: Sequence[str]) -> list[str]:
    return [word for value in values for word in (option, value)]


def _step(what: str, words: Sequence[object]) -> None:
    console(stderr=True).print(f"[bold]{what}[/bold]")
    run_command(words)


def _records_and_texts(
    model: str, records: Path | None, names: Sequence[str], numbers: Mapping[str, int], out: Path
) -> None:
    """Table 3, of all records there are, and Figure 6, of a few."""
    from factlens.benchmarks.atlas_counterfact import counterfact
    from factlens.benchmarks.composition import composition
    from factlens.benchmarks.counterfact import read_records
    from factlens.files import written_whole
    from factlens.paper_results import FIGURE_6, TABLE_3, side_by_side

    if (out / TABLE_3).exists() and (out / FIGURE_6).exists():
        return
    hooked = load(model, None, "float32")
    if records is not None:
        # Of rows that are no records Table 2 has told.
        every = first = tuple(read_records(records, on_bad_row=lambda _: None))
    else:
        bundled = counterfact(hooked)
        every, first = bundled.records, bundled.test[SKIPPED:]
    first = tuple(each for each in first if each.generation_prompts)
    with written_whole(out / TABLE_3) as partial:
        composition(every).to_csv(partial, index=False)
    contestants = {"none": (None, None), **{name: (editor_named(name), None) for name in names}}
    with console(stderr=True).status("Figure 6"):
        found = side_by_side(hooked, contestants, first[: min(WRITTEN, numbers["texts"])])
    with written_whole(out / FIGURE_6) as partial:
        found.to_csv(partial, index=False)
