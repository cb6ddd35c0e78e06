"""Figure 5 of a sweep over tokens, with causal tracing beside it: what `factlens sweep --token` writes and prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from factlens.commands.shared import usage
from factlens.terminal import console, print_table

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from factlens.executors import Executor
    from factlens.models import Model
    from factlens.traces import Trace


def main_trace(folder: Path, executor: Executor) -> Trace:
    """The trace of a finished run of the same model.

    Raises:
        PlanError: the run is of another model.
        RunError: no run is there, or it is not finished.
    """
    from factlens.averages import read_run

    run = read_run(folder)
    if run.config["model"]["fingerprint"] != executor.call(_fingerprint, None):
        raise usage(
            f"the run in {folder} is of other weights ({run.config['model']['model']}) than the model that is edited"
        )
    return run.main


def _fingerprint(model: Model, _: None) -> str:
    from factlens.fingerprints import fingerprint

    return fingerprint(model)


def draw_layers(measured: pd.DataFrame, traced: Trace | None, out: Path) -> None:
    """Write `layers.html` and, with a trace, `correlation.csv`; print what it says.

    Args:
        measured: rows of `sweep_runs.sweep_run` over `layer` and `fact_token`.
        traced: with MLP windows, or None.
        out: the folder.
    """
    from factlens import plots
    from factlens.effects import average_effects
    from factlens.files import written_whole
    from factlens.layer_sweeps import LAST_SUBJECT, by_layer, correlation

    found = None
    if traced is not None and LAST_SUBJECT in set(measured["fact_token"]):
        found = correlation(measured, traced)
        with written_whole(out / "correlation.csv") as partial:
            found.to_csv(partial, index=False)
        columns = ("score", "method", "r", "low", "high")
        print_table(columns, [tuple(row) for row in found[[*columns]].itertuples(index=False)])
    aie = None if traced is None else average_effects(traced)
    figure = plots.sweep(by_layer(measured), aie=aie, correlations=found)
    path = plots.save(figure, out / "layers.html")
    console().print(str(path), soft_wrap=True, markup=False)
