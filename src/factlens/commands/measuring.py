"""What `factlens evaluate`, `sweep` and `tune` share: their options, records, and how scores are printed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from factlens.commands.shared import tell_left_out, usage
from factlens.terminal import console, progress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from factlens.benchmarks.counterfact import Record
    from factlens.executors import Executor
    from factlens.models import Model

Records = Annotated[
    Path | None,
    typer.Option(
        "--records",
        help="A file in the benchmark's form, or a name of `factlens data`; without it the bundled records of atlas.",
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(help="Settings: YAML, the official JSON, or one of EasyEdit's YAML files."),
]
COUNTERFACT, ZSRE = "counterfact", "zsre"
HELD = "held"
"""The part of the records that no editor is trained on and no table tests on."""
SHOWN = ("S", "ES", "PS", "NS", "retention")
"""Columns that are printed of CounterFact."""


def settings_of(config: Path | None, layer: int | None, clamp: float | None) -> dict[str, Any]:
    """What differs from the model's own settings."""
    from factlens.editors.rome_config import as_mapping, read_rome_config

    settings = as_mapping(read_rome_config(config)) if config is not None else {}
    if layer is not None:
        settings["layer"] = layer
    if clamp is not None:
        settings["max_norm_ratio"] = clamp
    return settings


def gather_first(model: Model, plans: Sequence[dict[str, Any]]) -> None:
    """The statistics that the edits need, with a bar, before anything else takes time: all layers in one pass."""
    from factlens.editors.rome_config import rome_config_for
    from factlens.key_statistics import gather_missing

    layers: dict[Any, list[int]] = {}
    for settings in plans:
        plan = rome_config_for(model, settings)
        if plan.moment == "statistics":
            layers.setdefault(plan.moment_tokens, []).append(int(str(plan.layer)))
    for tokens, wanted in layers.items():
        with progress("statistics") as tell:
            gather_missing(
                model,
                wanted,
                tokens=tokens,
                progress=lambda done, total: tell(done, total, "tokens"),
            )


def records_of(
    executor: Executor, benchmark: str, given: Path | None, n: int, part: str, skip: int = 0
) -> tuple[list[Any], Callable[..., Sequence[Any]]]:
    """The first `n` records of a file, or of the bundled ones' test, tune or held part; and where their subjects' other facts are.

    A row of the file of which no record can be made is one of the test part, where an evaluation says why; of the others it is told and left out.
    """
    from factlens.benchmarks import counterfact, zsre
    from factlens.benchmarks.atlas_counterfact import other_facts
    from factlens.benchmarks.atlas_zsre import zsre as bundled_zsre
    from factlens.benchmarks.draws import is_of
    from factlens.benchmarks.record_files import Unusable

    if given is not None:
        read: Callable[..., list[Any]] = (
            counterfact.read_rows if benchmark == COUNTERFACT else zsre.read_rows
        )
        # By subject, as the bundled ones: what is chosen on some is reported on others. A row without a subject is reported.
        mine = [
            r
            for r in read(given)
            if (is_of(part, r.subject) if r.subject.strip() else part == "test")
        ]
        if part != "test":  # An evaluation has a row for each that is none; here they say nothing.
            tell_left_out([f"{given}, {r.reason}" for r in mine if isinstance(r, Unusable)])
            mine = [r for r in mine if not isinstance(r, Unusable)]
        if len(mine) <= skip:
            raise usage(
                f"{given} has {len(mine)} {part} records (the others' subjects are of the other part), and {skip} are left out"
            )
        return mine[skip : skip + n], _no_others
    asked = (part, skip + n)
    found: Any = executor.call(_bundled, asked) if benchmark == COUNTERFACT else bundled_zsre()
    mine = [each for each in found if is_of(part, each.subject)]
    left_out = found.dropped.groupby("reason")["n"].sum()
    why = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
    said = f"{part} records of the bundled facts" + (f"; left out: {why}" if why else "")
    console(stderr=True).print(said, style="dim", soft_wrap=True)
    if len(mine) <= skip:
        raise usage(
            f"there are {len(mine)} {part} records of the bundled facts, and {skip} are left out"
        )
    return mine[skip : skip + n], other_facts


def _bundled(model: Model, asked: tuple[str, int]) -> Any:
    """The first bundled records of a part, of what the model knows."""
    from factlens.benchmarks.atlas_counterfact import counterfact

    part, first = asked
    with progress("asking") as tell:
        return counterfact(
            model, part=part, first=first, progress=lambda done, total: tell(done, total, "")
        )


def _no_others(record: Record) -> tuple[()]:
    """Of a file's subjects no other facts are known."""
    return ()


def cells(row: Any, shown: Sequence[str]) -> list[str]:
    """The scores of a table's row with half of their intervals, as they are printed."""
    return [
        f"{row[name]:.1f}" + (f" ±{row[f'{name}_margin']:.1f}" if name != "S" else "")
        for name in shown
    ]
