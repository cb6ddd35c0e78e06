"""`factlens rate`: which of two editors people prefer, without knowing which is which."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from factlens.commands.options import Device, ModelName, Precision
from factlens.commands.shared import (
    EDITORS,
    check_writable,
    clear_errors,
    editor_named,
    load,
    usage,
)
from factlens.terminal import console, plain, print_table, progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from factlens.benchmarks.counterfact import Record
    from factlens.models import Model
    from factlens.rating_texts import Contestant
    from factlens.ratings import Comparison

rate = typer.Typer(
    name="rate",
    no_args_is_help=True,
    help="Let people compare what two editors make of the same new facts, blindly (ROME, Section 3.6).",
)
PAGE, KEY, TEXTS = "rate.html", "key.json", "texts.json"
NONE, IDENTITY = "none", "rome-identity"
CONTESTANTS = (*EDITORS, IDENTITY, NONE)
"""What `--editor-a` and `--editor-b` know: the editors, ROME with the identity for C, and the unedited model as a control."""
MORE = {"consistency": "consistent", "fluency": "fluent"}
ConfigFile = Annotated[
    Path | None, typer.Option(help="Its settings: YAML, the official JSON, or EasyEdit's YAML.")
]


@rate.command()
def make(
    editor_a: Annotated[
        str,
        typer.Option("--editor-a", "-a", help=f"{', '.join(CONTESTANTS)}; with --texts any name."),
    ] = "rome",
    editor_b: Annotated[
        str, typer.Option("--editor-b", "-b", help="What it is compared with.")
    ] = "ft-l",
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="How many counterfactuals.")] = 50,
    out: Annotated[
        Path, typer.Option("--out", "-o", help=f"Folder for {PAGE}, {KEY} and {TEXTS}.")
    ] = Path("runs/rate"),
    texts: Annotated[
        Path | None,
        typer.Option(help="Ready texts, .json or .csv with columns fact, a, b; nothing is edited."),
    ] = None,
    ties: Annotated[
        bool, typer.Option("--ties", help='Allow "no difference"; the paper\'s odds need none.')
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Of the order of the texts; drawn without it, and in the key."),
    ] = None,
    model: ModelName = "atlas",
    records: Annotated[
        Path | None,
        typer.Option(
            help="A file in CounterFact's form, or a name of `factlens data`; without it atlas-CounterFact, bundled."
        ),
    ] = None,
    config_a: ConfigFile = None,
    config_b: ConfigFile = None,
    passages: Annotated[
        int, typer.Option(min=1, help="Generation prompts of a record that are written on from.")
    ] = 1,
    length: Annotated[
        int, typer.Option(min=1, help="Tokens of a passage with its prompt, at most.")
    ] = 100,
    device: Device = None,
    dtype: Precision = "float32",
) -> None:
    """Make a page on which raters compare two editors' texts, and the key that says whose text is whose.

    Give raters the page alone. It opens offline, and saves a file of answers at its end.

    Examples:

      factlens rate make --out runs/rate

      factlens rate make --editor-a rome --editor-b rome-identity --n 10 --ties

      factlens rate make --texts texts.csv --editor-a ROME --editor-b FT+L
    """
    from factlens.data_folder import file_of
    from factlens.rating_pages import rating_page
    from factlens.rating_texts import write_texts
    from factlens.ratings import draw, write_key
    from factlens.reports import write_text

    with clear_errors():
        check_writable(out)
        _check_free(out)
        if texts is None:
            plans = [(editor_a, config_a), (editor_b, config_b)]
            names = [_label(*plan) for plan in plans]
            _check_apart(names)
            records = file_of(records, "counterfact")
            hooked = load(model, device, dtype)
            options = {"n": n, "passages": passages, "length": length}
            found, about = _written(hooked, plans, records, options)
        else:
            if unused := [each for each in (records, config_a, config_b) if each is not None]:
                raise usage(f"{unused[0]} has no use beside --texts, which are ready; leave it out")
            names = [editor_a, editor_b]
            _check_apart(names)
            found, about = _ready(texts)[:n], {"texts": str(texts)}
        shown, key = draw(found, (names[0], names[1]), ties=ties, seed=seed, about=about)
        out.mkdir(parents=True, exist_ok=True)
        write_texts(found, out / TEXTS)
        write_key(key, out / KEY)
        write_text(rating_page(shown, ties=ties), out / PAGE)
        console().print(f"{len(shown)} pairs of texts", markup=False)
        for name in (PAGE, KEY, TEXTS):
            whom = "for the raters" if name == PAGE else "not for their eyes"
            console().print(f"{out / name}  {whom}", soft_wrap=True, markup=False)


@rate.command()
def odds(
    answers: Annotated[
        list[Path], typer.Argument(help="The files that raters saved, one for each.")
    ],
    key: Annotated[Path, typer.Option("--key", "-k", help=f"The {KEY} beside the page.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A .csv file for the table.")
    ] = None,
) -> None:
    """Which editor raters find more consistent with the new facts, and which more fluent, beside the paper's odds.

    Examples:

      factlens rate odds answers-*.json --key runs/rate/key.json
    """
    from factlens.files import written_whole
    from factlens.ratings import human_preferences

    with clear_errors():
        found = human_preferences(answers, key)
        _show(found)
        if out is not None:
            with written_whole(out) as partial:
                found.to_csv(partial, index=False)
            console().print(str(out), soft_wrap=True, markup=False)


# -- making ----------------------------------------------------------------------------------------


def _check_free(out: Path) -> None:
    """Without its key, what raters have answered already is lost."""
    if (out / KEY).exists():
        raise usage(
            f"{out} holds the key of an earlier page, which its answers need; use another --out"
        )


def _check_apart(names: Sequence[str]) -> None:
    if names[0] == names[1]:
        raise usage(f"both editors are {names[0]}; give two, or one with two configs")


def _label(name: str, config: Path | None) -> str:
    """What to call an editor, after a look at its settings: before the model is loaded."""
    from factlens.editors.rome_config import read_rome_config

    if name not in CONTESTANTS:
        raise usage(f"no editor {name!r}; there are {', '.join(CONTESTANTS)}")
    if config is None:
        return name
    if name not in ("rome", IDENTITY):
        raise usage(f"only ROME's settings can be given, not those of {name!r}; leave {config} out")
    read_rome_config(config)
    return f"{name} ({config.stem})"


def _contestant(model: Model, name: str, config: Path | None) -> Contestant:
    """An editor with all its settings, its statistics gathered with a bar."""
    from factlens.editors.rome_config import rome_config_for
    from factlens.key_statistics import moment_for

    if name == NONE:
        return None, None
    if name not in ("rome", IDENTITY):
        return editor_named(name), None
    plan = rome_config_for(model, config)
    if name == IDENTITY:
        plan = replace(plan, moment="identity")
    if plan.moment == "statistics":
        with progress("statistics") as tell:
            moment_for(
                model,
                int(str(plan.layer)),
                tokens=plan.moment_tokens,
                progress=lambda done, total: tell(done, total, "tokens"),
            )
    return editor_named("rome"), plan


def _written(
    model: Model,
    plans: Sequence[tuple[str, Path | None]],
    given: Path | None,
    options: dict[str, int],
) -> tuple[list[Comparison], dict[str, object]]:
    """The editors' texts, and how they were made; with a bar, and a word on what was left out."""
    from factlens import models
    from factlens.editors.rome_config import ROMEConfig, as_mapping
    from factlens.fingerprints import remembered_fingerprint
    from factlens.rating_texts import compare

    a, b = (_contestant(model, *plan) for plan in plans)
    chosen = _records(model, given)
    with progress("writing") as tell:
        found, left_out = compare(
            model, a, b, chosen, **options, progress=lambda done, total: tell(done, total, "")
        )
    for reason, count in Counter(reason for _, reason in left_out).most_common():
        _say(f"{count} records left out: {reason}")
    if not found:
        raise usage("no record gave two texts that differ; use other records or other editors")
    about = {
        "model": models.model_name(model),
        "fingerprint": remembered_fingerprint(model),
        "records": str(given or "bundled"),
        "settings": [
            as_mapping(each) if isinstance(each, ROMEConfig) else None for _, each in (a, b)
        ],
        **options,
    }
    return found, about


def _records(model: Model, given: Path | None) -> list[Record]:
    """The records of the test part, as `factlens evaluate` takes them."""
    from factlens.benchmarks.atlas_counterfact import counterfact
    from factlens.benchmarks.counterfact import read_records
    from factlens.benchmarks.draws import is_tuned

    if given is not None:
        chosen = [each for each in read_records(given) if not is_tuned(each.subject)]
        if not chosen:
            raise usage(f"{given} has no record of the test part (their subjects are of the other)")
        return chosen
    with progress("asking") as tell:
        return list(
            counterfact(model, part="test", progress=lambda done, total: tell(done, total, ""))
        )


def _ready(path: Path) -> list[Comparison]:
    """The texts of a file that differ."""
    from factlens.rating_texts import SAME, read_texts
    from factlens.ratings import identical

    every = read_texts(path)
    found = [each for each in every if not identical(each)]
    if len(found) < len(every):
        _say(f"{len(every) - len(found)} rows left out: {SAME}")
    if not found:
        raise usage(f"{path} has no two texts that differ; there is nothing to compare")
    return found


def _say(text: str) -> None:
    console(stderr=True).print(plain(text), style="dim", soft_wrap=True, markup=False)


# -- showing ---------------------------------------------------------------------------------------


def _show(found: pd.DataFrame) -> None:
    columns = ("source", "more", "editor", "over", "wins", "losses", "ties", "odds", "95 %")
    rows = []
    for _, row in found.iterrows():
        here = row["source"] == "here"
        counts = [str(row[name]) if here else "" for name in ("wins", "losses", "ties")]
        interval = f"{row['low']:.2f} to {row['high']:.2f}" if here else ""
        editors = (plain(row["editor"]), plain(row["other"]))
        odds = f"{row['odds']:.2f}"
        cells = (*editors, *counts, odds, interval, row["raters"], row["items"])
        rows.append((row["source"], MORE[row["question"]], *cells))
    print_table((*columns, "raters", "items"), rows)
    here = found[found["source"] == "here"]
    share = ", ".join(
        f"{row['first']:.0%} of the {MORE[row['question']]} ones"
        for _, row in here.iterrows()
        if row["first"] == row["first"]
    )
    console().print(
        f"intervals over {here['over'].iloc[0]}; first texts are {share or 'none of those preferred'}",
        style="dim",
        soft_wrap=True,
        markup=False,
    )
