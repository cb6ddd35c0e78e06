"""`make bench-evaluate`: `evaluate` against a straightforward loop over the same edits, in one process, alternating.

The scores of the loop (`plain_evaluation`) must be those of `evaluate`: the largest difference is printed, and one that matters ends
with 1. Texts are of the likeliest tokens on both sides, since draws depend on which prompts share a batch. A ratio of two ways
measured beside each other means something on any machine; seconds do not.
"""

import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import pandas as pd
import torch
import typer

from factlens import counterfact_scores, editors, models
from factlens.benchmark import _now
from factlens.benchmarks.atlas_counterfact import counterfact
from factlens.benchmarks.counterfact import Record
from factlens.benchmarks.references import bundled_references
from factlens.edit_benchmark import LAYERS, _print_header, build, contexts
from factlens.editors.rome import rome
from factlens.editors.rome_config import ROMEConfig
from factlens.edits import Edit
from factlens.evaluation import BATCH, evaluate
from factlens.facts import Rewrite
from factlens.models import Model
from factlens.plain_evaluation import Plain, straightforward
from factlens.scoring import Texts

RECORDS = {"atlas": (32, 4), "gpt2-small": (4, 1)}
"""Records of a shape's two rows, without texts and with them, which take the straightforward way minutes."""
LENGTH = 100
"""Tokens of a text with its prompt, as in the paper."""
AGREE = 1e-3
"""Two ways of adding up in float32 differ by less, two shares of ten prompts by more."""


@dataclass(frozen=True)
class Row:
    """One line of the table. Seconds are for all records, medians over the rounds."""

    shape: str
    texts: bool
    records: int
    straightforward: float
    """Measuring one record after another on the plain model."""
    ours: float
    """`evaluate` with edits that are there already."""
    one_by_one: float
    """Making the edits, one at a time."""
    side_by_side: float
    """Making them as `evaluate` lets ROME do."""
    difference: float
    """The largest of any score of any record."""
    score: str
    """Which score that is."""

    @property
    def ratio(self) -> float:
        """How many times faster `evaluate` measures."""
        return self.straightforward / self.ours

    @property
    def whole_ratio(self) -> float:
        """The same with the making of the edits on both sides."""
        return (self.straightforward + self.one_by_one) / (self.ours + self.side_by_side)


# -- our way ---------------------------------------------------------------------------------------


def ours(
    model: Model, records: Sequence[Record], edits: Mapping[str, Edit], tokens: int | None = None
) -> pd.DataFrame:
    """The rows of `evaluate` under edits that are there already, texts being of the likeliest tokens."""

    def made(model: Model, rewrite: Rewrite, config: object = None) -> Edit:
        return edits[str(rewrite.id)]

    drawn, counterfact_scores.TOP_K = counterfact_scores.TOP_K, 1
    try:
        return evaluate(model, made, records, generations=tokens)
    finally:
        counterfact_scores.TOP_K = drawn


def difference(one: pd.DataFrame, other: pd.DataFrame) -> tuple[float, str]:
    """The largest difference of a score of the second frame in the first, and which score; a score that one of them lacks is infinitely far."""
    mine = one[[*other.columns]].astype(float)
    gaps = (mine - other).abs().mask(mine.isna() != other.isna(), math.inf).max()
    return float(gaps.max()), str(gaps.fillna(0.0).idxmax())


# -- measuring -------------------------------------------------------------------------------------


def measure(
    shape: str, model: Model, plain: Plain, records: Sequence[Record], *, texts: bool, rounds: int
) -> Row:
    """Both ways in turn, `rounds` times, after one record that does not count."""
    config = ROMEConfig(layer=LAYERS[shape], contexts=contexts(), moment="identity")
    rewrites = [record.rewrite for record in records]
    wanted = Texts(LENGTH, bundled_references()) if texts else None

    def side_by_side() -> dict[str, Edit]:
        found = [
            edit
            for start in range(0, len(rewrites), BATCH)
            for edit in editors.each(rome, model, rewrites[start : start + BATCH], config)
        ]
        return {str(r.id): edit for r, edit in zip(rewrites, found, strict=True)}

    edits = side_by_side()
    ways: dict[str, Callable[[], Any]] = {
        "side_by_side": side_by_side,
        "ours": lambda: ours(model, records, edits, LENGTH if texts else None),
        "one_by_one": lambda: [rome(model, each, config) for each in rewrites],
        "straightforward": lambda: straightforward(plain, records, edits, wanted),
    }
    ours(model, records[:1], edits)
    straightforward(plain, records[:1], edits)
    times: dict[str, list[float]] = {name: [] for name in ways}
    found, device = {}, models.device_of(model)
    for _ in range(rounds):
        for name, way in ways.items():
            begun = _now(device)
            found[name] = way()
            times[name].append(_now(device) - begun)
    middle: dict[str, Any] = {name: statistics.median(each) for name, each in times.items()}
    gap, score = difference(found["ours"], found["straightforward"])
    return Row(shape, texts, len(records), **middle, difference=gap, score=score)


HEADER = (
    "| shape | texts | records | straightforward, records/min | `evaluate`, records/min | ratio "
    "| with editing, one by one | with editing, side by side | ratio | largest difference |"
)


def show(row: Row) -> str:
    """One row as Markdown."""

    def rate(seconds: float) -> str:
        return f"{60 * row.records / seconds:.1f}"

    return (
        f"| {row.shape} | {f'10 of {LENGTH} tokens' if row.texts else 'none'} | {row.records} "
        f"| {rate(row.straightforward)} | {rate(row.ours)} | **{row.ratio:.1f}x** "
        f"| {rate(row.straightforward + row.one_by_one)} | {rate(row.ours + row.side_by_side)} "
        f"| **{row.whole_ratio:.1f}x** | {row.difference:.0e} ({row.score}) |"
    )


def main(
    shapes: Annotated[list[str] | None, typer.Option("--shape", help="atlas, gpt2-small.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Alternations per row.")] = 3,
    quick: Annotated[bool, typer.Option(help="atlas only, one round.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
) -> None:
    """Compare `evaluate` with a straightforward loop; prints a Markdown table, and ends with 1 if their scores differ."""
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    if threads:
        torch.set_num_threads(threads)
    if wrong := [each for each in shapes or [] if each not in RECORDS]:
        raise typer.BadParameter(f"no shape {wrong[0]!r}; there are {', '.join(RECORDS)}")
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen, rounds = (["atlas"], 1) if quick else (shapes or list(RECORDS), rounds)
    records = counterfact().test
    console.print(
        f"atlas-CounterFact records, ROME's edits with {len(contexts())} contexts, float32, {where}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    _print_header(console, HEADER)
    far = False
    for shape in chosen:
        model, hf_model = build(shape, where)
        plain = Plain(hf_model, models.tokenizer(model))
        for texts, count in zip((False, True), RECORDS[shape], strict=True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Random weights take no edit, and say so.
                row = measure(shape, model, plain, records[:count], texts=texts, rounds=rounds)
            console.print(show(row))
            far = far or row.difference > AGREE
        del model, hf_model, plain
    if far:
        console.print(f"the two ways differ by more than {AGREE}")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
