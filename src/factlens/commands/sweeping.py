"""`factlens sweep`: where edits hold best."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from factlens.commands.layer_figures import draw_layers, main_trace
from factlens.commands.measuring import (
    COUNTERFACT,
    SHOWN,
    ConfigFile,
    Records,
    cells,
    gather_first,
    records_of,
    settings_of,
)
from factlens.commands.options import Device, ModelName, Precision, RayAddress, Workers
from factlens.commands.shared import check_writable, clear_errors, executor_for, usage
from factlens.terminal import console, print_table, progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from factlens.models import Model

TOKENS = {
    "first-subject": "subject-first",
    "middle-subject": "subject-middle",
    "last-subject": "subject-last",
}
"""Roles of tokens in traces, and what ROME's config calls them; of the others both say the same."""


def sweep(
    model: ModelName = "atlas",
    layer: Annotated[
        list[int] | None, typer.Option("--layer", "-l", help="Repeat for several; all without it.")
    ] = None,
    token: Annotated[
        list[str] | None,
        typer.Option(
            "--token",
            "-t",
            help=f"Where the fact is looked up: {', '.join(TOKENS)}, first-after, last; repeat for several. The config's without it.",
        ),
    ] = None,
    clamp: Annotated[
        list[float] | None,
        typer.Option(help="Bounds of the shift, as multiples of ‖v0‖; repeat for several."),
    ] = None,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="How many records.")] = 100,
    records: Records = None,
    config: ConfigFile = None,
    average: Annotated[
        Path | None,
        typer.Option(
            help="A finished run of `factlens average` of this model, whose AIE is drawn and correlated beside; with --token."
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="Folder for sweep.csv and records.parquet, of tokens layers.html; the same command goes on there.",
        ),
    ] = Path("runs/sweep"),
    workers: Workers = 1,
    ray_address: RayAddress = None,
    device: Device = None,
    dtype: Precision = "float32",
) -> None:
    """Evaluate ROME at several layers, tokens and clamps, on records that `factlens evaluate` does not use.

    The one marked has the highest S; of those within a tenth of a point, it keeps most of the subject's other facts. With tokens, the
    paper's Figure 5 is drawn. Stop it whenever you like: the same command goes on.

    Examples:

      factlens sweep --n 50

      factlens sweep --layer 1 --layer 2 --clamp 1.5 --clamp 2.5 --clamp 4

      factlens sweep --token first-subject --token middle-subject --token last-subject --token last --average runs/average
    """
    from factlens.data_folder import file_of
    from factlens.editors.rome import rome
    from factlens.files import written_whole
    from factlens.sweep_runs import sweep_run
    from factlens.sweeps import best, combinations, tabulated

    with clear_errors(kept=out):
        check_writable(out)
        if average is not None and not token:
            raise usage("--average is drawn beside edits at tokens; give --token last-subject")
        if token and len(clamp or ()) > 1:
            raise usage(
                "with --token there is one figure, of one clamp; run the command for each --clamp"
            )
        records = file_of(records, COUNTERFACT)
        settings = settings_of(config, None, None)
        executor = executor_for(model, device, None, dtype, workers, ray_address)
        try:
            traced = None if average is None else main_trace(average, executor)
            grid: dict[str, Sequence[Any]] = {"layer": layer or executor.call(_layers, None)}
            if token:
                grid["fact_token"] = [TOKENS.get(each, each) for each in dict.fromkeys(token)]
            if clamp:
                grid["max_norm_ratio"] = clamp
            plans = [{**settings, **each} for each in combinations(grid)]
            executor.call(gather_first, plans)
            chosen, others = records_of(executor, COUNTERFACT, records, n, "tune")
            with progress("editing") as tell:
                measured = sweep_run(
                    executor,
                    rome,
                    chosen,
                    grid,
                    out=out / "edits",
                    config=settings,
                    others=others,
                    progress=tell,
                )
        finally:
            executor.close()
        swept = tabulated(measured, list(grid))
        out.mkdir(parents=True, exist_ok=True)
        with written_whole(out / "sweep.csv") as partial:
            swept.to_csv(partial, index=False)
        with written_whole(out / "records.parquet") as partial:
            measured.to_parquet(partial)
        taken = best(swept)
        columns = ("", *grid, *SHOWN, "n")
        rows = [
            (
                "*" if row.name == taken.name else "",
                *[row[c] for c in grid],
                *cells(row, SHOWN),
                row["n"],
            )
            for _, row in swept.iterrows()
        ]
        print_table(columns, rows)
        console().print(str(out / "sweep.csv"), soft_wrap=True, markup=False)
        if token:
            draw_layers(measured, traced, out)


def _layers(model: Model, _: Any) -> list[int]:
    from factlens.models import n_layers

    return list(range(n_layers(model)))
