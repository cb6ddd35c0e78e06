"""`python -m factlens.atlas_release`: measure anew what depends on the bundled checkpoint, and write it wherever it stands.

python -m factlens.atlas_release measure     # layer and clamp, edits, a thousand facts; goes on where it was stopped
python -m factlens.atlas_release write       # configs/atlas.yaml, the tables of the README and of docs/, the figures
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from factlens.commands.shared import check_writable, clear_errors
from factlens.errors import OutputError, RunError
from factlens.files import written_whole
from factlens.terminal import console

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Measure anew what depends on the bundled checkpoint, and write it wherever it stands.",
)

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of the measurements.")]
OUT = Path("runs/release")
ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "docs/average-effects.md", "docs/editing.md", "docs/atlas.md")
CONFIG = "configs/atlas.yaml"
CLAMPS_OF_LAYERS = (1.5, 3.0)
"""At every layer, on few records."""
CLAMPS = (1.0, 1.25, 1.5, 1.75, 2.0, 3.0)
"""At the best layer, on many."""
FEW, MANY = 48, 300
TESTED = 200
ROME = re.compile(r"rome: \{layer: \d+, max_norm_ratio: [\d.]+, ")


@app.command()
def measure(
    out: Out = OUT,
    quick: Annotated[bool, typer.Option(help="A few records and facts, for a look.")] = False,
) -> None:
    """Everything that the documents say of the bundled checkpoint. What is finished is kept, and belongs to one checkpoint."""
    scale = 20 if quick else 1
    with clear_errors(kept=out):
        check_writable(out)
        out.mkdir(parents=True, exist_ok=True)
        _of_this_checkpoint(out)
        _once(out / "layers", lambda to: _sweep(to, [], CLAMPS_OF_LAYERS, FEW // scale))
        layer = int(_best(out / "layers")["layer"])
        _once(out / "clamps", lambda to: _sweep(to, [layer], CLAMPS, MANY // scale))
        _write_config(_best(out / "clamps"))
        _once(out / "records.csv", _records)
        _once(out / "edits", lambda to: _factlens("evaluate", "--n", TESTED // scale, "--out", to))
        _factlens("average", "--n", 1000 // scale, "--out", out / "average")
        console().print(str(out), markup=False)


@app.command()
def write(out: Out = OUT) -> None:
    """Write what `measure` found into the configuration, the documents and the figures."""
    from factlens import atlas_blocks, plots
    from factlens.atlas import CHECKPOINT
    from factlens.images import save

    with clear_errors():
        _of_this_checkpoint(out)
        report = json.loads((CHECKPOINT / "report.json").read_text(encoding="utf-8"))
        measured = atlas_blocks.Measured(out, report)
        _write_config(_best(out / "clamps"))
        for name in DOCUMENTS:
            console().print(f"{name}: {', '.join(atlas_blocks.fill(ROOT / name, measured))}")
        summary = measured.summary
        save(plots.heatmap(summary.aie), ROOT / "docs/figures/figure-2.png")
        figure = plots.severed(summary.severed, gaps=summary.gaps)
        save(figure, ROOT / "docs/figures/figure-3.png")


def _of_this_checkpoint(out: Path) -> None:
    """Refuse to go on with the measurements of another checkpoint.

    Raises:
        RunError: they are of another.
    """
    from factlens.fingerprints import fingerprint
    from factlens.models import load_model

    mark, path = fingerprint(load_model()), out / "checkpoint.txt"
    if not path.exists():
        path.write_text(mark, encoding="utf-8")
    elif path.read_text(encoding="utf-8") != mark:
        raise RunError(
            f"{out} holds measurements of another checkpoint; remove it, or give another --out"
        )


def _once(path: Path, make: Callable[[Path], None]) -> None:
    """Make a file or a folder unless it is there; it appears whole or not at all."""
    if path.exists():
        return
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    make(partial)
    partial.rename(path)


def _sweep(to: Path, layers: Sequence[int], clamps: Sequence[float], n: int) -> None:
    where = [part for layer in layers for part in ("--layer", layer)]
    bounds = [part for clamp in clamps for part in ("--clamp", clamp)]
    _factlens("sweep", *where, *bounds, "--n", n, "--out", to)


def _factlens(*words: object) -> None:
    """Run one of factlens's own commands, as a user would.

    Raises:
        RunError: it failed; it has said why.
    """
    command = [sys.executable, "-m", "factlens.cli", *map(str, words)]
    if code := subprocess.run(command, check=False).returncode:
        raise RunError(f"`factlens {' '.join(map(str, words))}` ended with {code}")


def _records(to: Path) -> None:
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
    pd.DataFrame(rows).to_csv(to, index=False)


def _best(folder: Path) -> pd.Series:
    from factlens.sweeps import best

    return best(pd.read_csv(folder / "sweep.csv"))


def _write_config(chosen: pd.Series) -> None:
    """Put the chosen layer and clamp into the configuration that edits of atlas read."""
    path = ROOT / CONFIG
    setting = (
        f"rome: {{layer: {int(chosen['layer'])}, max_norm_ratio: {chosen['max_norm_ratio']:g}, "
    )
    text, count = ROME.subn(setting, path.read_text(encoding="utf-8"))
    if count != 1:
        raise OutputError(f"{path} has no line that begins with {ROME.pattern!r}")
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    app()
