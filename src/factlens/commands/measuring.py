"""What `factlens evaluate` and `factlens sweep` share: their options, records, and how scores are printed."""

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
    """The first `n` records of a file, or of the bundled ones' test or tune part; and where their subjects' other facts are."""
    from factlens.benchmarks import counterfact, zsre
    from factlens.benchmarks.atlas_counterfact import other_facts
    from factlens.benchmarks.atlas_zsre import zsre as bundled_zsre
    from factlens.benchmarks.draws import is_tuned

    if given is not None:
        read: Callable[..., list[Any]] = (
            counterfact.read_records if benchmark == COUNTERFACT else zsre.read_records
        )
        # By subject, as the bundled ones: what is chosen on some is reported on others.
        bad: list[str] = []
        every = read(given, on_bad_row=bad.append)
        tell_left_out(bad)
        mine = [r for r in every if is_tuned(r.subject) == (part == "tune")]
        if len(mine) <= skip:
            raise usage(
                f"{given} has {len(mine)} {part} records (the others' subjects are of the other part), and {skip} are left out"
            )
        return mine[skip : skip + n], _no_others
    bundled: Any = executor.call(_bundled, None) if benchmark == COUNTERFACT else bundled_zsre()
    found = getattr(bundled, part)
    left_out = bundled.dropped.groupby("reason")["n"].sum()
    why = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
    console(stderr=True).print(
        f"{len(bundled)} records of the bundled facts; left out: {why}", style="dim", soft_wrap=True
    )
    if len(found) <= skip:
        raise usage(
            f"there are {len(found)} {part} records of the bundled facts, and {skip} are left out"
        )
    return list(found[skip : skip + n]), other_facts


def _bundled(model: Model, _: None) -> Any:
    """The bundled records of what the model knows."""
    from factlens.benchmarks.atlas_counterfact import counterfact

    with progress("asking") as tell:
        return counterfact(model, progress=lambda done, total: tell(done, total, ""))


def _no_others(record: Record) -> tuple[()]:
    """Of a file's subjects no other facts are known."""
    return ()


def cells(row: Any, shown: Sequence[str]) -> list[str]:
    """The scores of a table's row with half of their intervals, as they are printed."""
    return [
        f"{row[name]:.1f}" + (f" ±{row[f'{name}_margin']:.1f}" if name != "S" else "")
        for name in shown
    ]
