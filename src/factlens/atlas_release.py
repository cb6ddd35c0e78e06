"""`python -m factlens.atlas_release`: measure anew what depends on the bundled checkpoint, and write it into the documents.

python -m factlens.atlas_release measure     # editors' numbers, edits, all of `factlens paper`; goes on where it was stopped
python -m factlens.atlas_release write       # configs/atlas.yaml, the blocks of the README and of docs/, a table, two figures

`measure` changes nothing but its own folder, and `write` nothing unless everything is there. What documents say outside of their blocks is for
whoever reads them.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import pandas as pd
import typer

from factlens.atlas_blocks import (
    COMMAND,
    PAPER,
    SECONDS,
    Measured,
    of_card,
    read_table,
    with_blocks,
)
from factlens.commands.options import Workers
from factlens.commands.shared import check_writable, clear_errors, keep_plan, run_command
from factlens.errors import RunError
from factlens.files import written_whole
from factlens.paper_results import AVERAGE
from factlens.store import locked
from factlens.terminal import console

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Measure anew what depends on the bundled checkpoint, and write it into the documents.",
)

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of the measurements.")]
OUT = Path("runs/release")
ROOT = Path(__file__).parents[2]
"""A checkout: only there are documents to be written."""
DOCUMENTS = ("README.md", "docs/average-effects.md", "docs/editing.md", "docs/atlas.md")
CONFIG = "configs/atlas.yaml"
REPORT, CARD = (f"src/factlens/atlas/checkpoint/{name}" for name in ("report.json", "card.md"))
TUNING = "docs/editor-tuning.csv"
FIGURES = ("docs/figures/figure-2.png", "docs/figures/figure-3.png")
CLAMPS_OF_LAYERS = (1.0, 3.0)
"""Tried at every layer, on few records."""
CLAMPS = (0.75, 1.0, 1.25, 1.5, 2.0)
"""Tried at the best layer, on many."""
NUMBERS = {"tuning": 32, "layers": 16, "clamps": 64, "edits": 200}
"""Records of each step."""
QUICK = {"tuning": 1, "layers": 2, "clamps": 4, "edits": 4}
PLAN, TUNED = "plan.json", "tuning/tuning.csv"


@app.command()
def measure(
    out: Out = OUT,
    quick: Annotated[bool, typer.Option(help="A few records and facts, for a look.")] = False,
    workers: Workers = 1,
) -> None:
    """Everything that the documents say of the bundled checkpoint. What is finished is kept, and belongs to one checkpoint and one plan."""
    numbers = QUICK if quick else NUMBERS
    with clear_errors(kept=out):
        check_writable(out)
        with locked(out):
            _begin(out, numbers)
            spread = ["--workers", workers]
            _step(out, TUNED, ["tune", "--n", numbers["tuning"]], spread)
            every_layer = _sweeping((), CLAMPS_OF_LAYERS, numbers["layers"])
            _step(out, "layers/sweep.csv", every_layer, spread)
            layer, _ = chosen(out / "layers")
            one_layer = _sweeping((layer,), CLAMPS, numbers["clamps"])
            _step(out, "clamps/sweep.csv", one_layer, spread)
            layer, clamp = tuned(out)
            edits = ["evaluate", "--n", numbers["edits"], "--layer", layer, "--clamp", f"{clamp:g}"]
            _step(out, "edits/table.csv", edits, spread, rows=3)
            _count_records(out / "records.csv")
            _report(out / "report.json")
            look = ["--quick"] if quick else []
            run_command(["paper", *look, *spread, "--out", out / PAPER])
            _kinds(out / "kinds.csv", out / PAPER / AVERAGE)
        console().print(str(out), markup=False, soft_wrap=True)


@app.command()
def write(out: Out = OUT) -> None:
    """Write what `measure` found into the configuration, the documents and the figures: all of them or none."""
    from factlens import plots
    from factlens.atlas.card import card
    from factlens.atlas.measuring import as_text
    from factlens.images import save
    from factlens.tunings import with_choices

    with clear_errors(), TemporaryDirectory() as folder:
        _check_checkpoint(out)
        measured = Measured(out)
        texts = {name: with_blocks(ROOT / name, measured) for name in DOCUMENTS}
        texts[CONFIG] = with_choices(ROOT / CONFIG, read_table(out / TUNED), _depth())
        texts[TUNING] = (out / TUNED).read_text(encoding="utf-8")
        found = {**measured.report, "release": of_card(measured)}
        texts[REPORT], texts[CARD] = as_text(found), card(found)
        summary = measured.summary
        drawn = plots.heatmap(summary.aie), plots.severed(summary.severed, gaps=summary.gaps)
        images = [save(each, Path(folder) / f"{i}.png") for i, each in enumerate(drawn)]
        for name, text in texts.items():
            with written_whole(ROOT / name) as draft:
                draft.write_text(text, encoding="utf-8")
        for name, image in zip(FIGURES, images, strict=True):
            with written_whole(ROOT / name) as draft:
                draft.write_bytes(image.read_bytes())
        for name in (*texts, *FIGURES):
            console().print(name, markup=False)


# -- what is measured ------------------------------------------------------------------------------


def _begin(out: Path, numbers: Mapping[str, int]) -> None:
    """Note what is measured, of which checkpoint, or go on with the same.

    Raises:
        RunError: the folder holds measurements of another checkpoint or plan.
    """
    plan = {
        "checkpoint": _fingerprint(),
        "clamps of layers": [*CLAMPS_OF_LAYERS],
        "clamps of the best layer": [*CLAMPS],
        **numbers,
    }
    keep_plan(out / PLAN, plan)


def _check_checkpoint(out: Path) -> None:
    """Refuse to write what was not measured, not in full, or not of this checkpoint.

    Raises:
        RunError: so it is.
    """
    path = out / PLAN
    if not path.exists():
        raise RunError(f"nothing was measured in {out}; `atlas_release measure` does it")
    plan = json.loads(path.read_text(encoding="utf-8"))
    if plan["checkpoint"] != _fingerprint():
        raise RunError(f"{out} holds measurements of another checkpoint; measure again")
    if any(plan.get(name) != n for name, n in NUMBERS.items()):
        raise RunError(
            f"{out} holds a look at few records; measure without --quick, in another --out"
        )


def _fingerprint() -> str:
    from factlens.fingerprints import fingerprint
    from factlens.models import load_model

    return fingerprint(load_model())


def _step(
    out: Path, table: str, command: Sequence[object], how: Sequence[object] = (), rows: int = 1
) -> None:
    """Run one of factlens's commands unless its table is there with all its rows; note the command, and how long all its parts took.

    `how` is what the result does not depend on.
    """
    path = out / table
    if path.exists() and len(pd.read_csv(path)) >= rows:
        return
    words, seconds = " ".join(map(str, command)), 0.0
    noted = path.with_name("step.json")
    if noted.exists():
        before = json.loads(noted.read_text(encoding="utf-8"))
        seconds = before[SECONDS] if before[COMMAND] == words else 0.0
    began = time.monotonic()
    try:
        run_command([*command, *how, "--out", path.parent])
    finally:
        noted.parent.mkdir(parents=True, exist_ok=True)
        note = {COMMAND: words, SECONDS: seconds + time.monotonic() - began}
        with written_whole(noted) as draft:
            draft.write_text(json.dumps(note) + "\n", encoding="utf-8")


def _sweeping(layers: Sequence[int], clamps: Sequence[float], n: int) -> list[object]:
    where = [part for layer in layers for part in ("--layer", layer)]
    bounds = [part for clamp in clamps for part in ("--clamp", f"{clamp:g}")]
    return ["sweep", *where, *bounds, "--n", n]


def _count_records(to: Path) -> None:
    """How many facts of each relation make a record of atlas-CounterFact, and why the others do not."""
    from factlens.atlas import relations
    from factlens.benchmarks.atlas_counterfact import FEW_NEIGHBOURS, NEW_LIKELIER, counterfact
    from factlens.models import load_model

    made = counterfact(load_model())
    dropped = made.dropped.set_index(["relation", "reason"])["n"]
    kept = pd.Series([record.relation_id for record in made]).value_counts()
    rows = [
        {
            "relation": one.name,
            "facts": len(one.facts),
            "records": int(kept.get(one.name, 0)),
            "too few neighbours": int(dropped.get((one.name, FEW_NEIGHBOURS), 0)),
            "new object likelier": int(dropped.get((one.name, NEW_LIKELIER), 0)),
        }
        for one in relations()
    ]
    with written_whole(to) as draft:
        pd.DataFrame(rows).to_csv(draft, index=False)


def _kinds(to: Path, averaged: Path) -> None:
    """The early site of the averaged facts by kind of subject, and of those that the last token settles and leaves open."""
    from factlens.atlas.recipes import Recipe
    from factlens.atlas_measures import by_kind, groups
    from factlens.averages import read_run
    from factlens.models import load_model

    found = by_kind(read_run(averaged).main, groups(load_model(), Recipe()))
    with written_whole(to) as draft:
        found.to_csv(draft, index=False)


def _report(to: Path) -> None:
    """The checkpoint's report with what it knows and writes measured anew; its recipe and run stay."""
    from factlens.atlas import CHECKPOINT
    from factlens.atlas.__main__ import EXAMPLES
    from factlens.atlas.measuring import as_text, read_checkpoint, report
    from factlens.atlas.recipes import Recipe

    if to.exists():
        return
    found = json.loads((CHECKPOINT / "report.json").read_text(encoding="utf-8"))
    found |= report(read_checkpoint(CHECKPOINT), EXAMPLES, Recipe())
    with written_whole(to) as draft:
        draft.write_text(as_text(found), encoding="utf-8")


def chosen(folder: Path) -> tuple[int, float]:
    """The layer and the clamp that are best in a sweep (`sweeps.best`)."""
    from factlens.sweeps import best

    return _layer_and_clamp(best(read_table(folder / "sweep.csv")))


def tuned(out: Path) -> tuple[int, float]:
    """ROME's layer and clamp as they were chosen, in the same way as every editor's numbers."""
    found = read_table(out / TUNED)
    return _layer_and_clamp(found[(found["editor"] == "rome") & found["taken"]].iloc[0])


def _layer_and_clamp(row: pd.Series) -> tuple[int, float]:
    return int(row["layer"]), float(row["max_norm_ratio"])


def _depth() -> int:
    """How many layers the checkpoint has."""
    from factlens.atlas import CHECKPOINT

    found = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    return int(found["n_layer"])


if __name__ == "__main__":
    app()
