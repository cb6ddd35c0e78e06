"""`factlens average` and `factlens report`: a thousand facts, and their page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from factlens.commands.options import (
    Device,
    Level,
    ModelName,
    Noise,
    Precision,
    RayAddress,
    Samples,
    Workers,
)
from factlens.commands.shared import (
    check_writable,
    clear_errors,
    executor_for,
    level_of,
    tell_left_out,
)
from factlens.terminal import console, progress, show_run

if TYPE_CHECKING:
    from factlens.averages import Run


def average(
    model: ModelName = "atlas",
    facts: Annotated[
        Path | None,
        typer.Option(
            help="A .csv, .jsonl or known_1000 .json file of facts, or a name of `factlens data`; the bundled ones without it."
        ),
    ] = None,
    n: Annotated[
        int, typer.Option("--n", "-n", help="How many facts that the model knows.")
    ] = 1000,
    study: Annotated[
        list[str] | None,
        typer.Option(
            "--study",
            help="Further studies beside the main figures: all (the default), none, or names; repeat for several. "
            "uniform, replace, swap, half the noise, twice the noise, metrics, direct, widths, integrated gradients, "
            "attribution patching.",
        ),
    ] = None,
    part: Annotated[int, typer.Option(help="Facts of each further study.")] = 100,
    window: Annotated[
        int | None, typer.Option("--window", "-w", help="Width of MLP and attention windows.")
    ] = None,
    noise: Noise = "gaussian",
    noise_level: Level = None,
    samples: Samples = None,
    known: Annotated[
        str,
        typer.Option(
            help="whole: the model says the whole object; first-token: the official rule."
        ),
    ] = "whole",
    seed: Annotated[int, typer.Option(help="Seed of the draw of facts and of the noise.")] = 0,
    engine: Annotated[
        str, typer.Option(help="auto, one-pass, or plain (one forward per cell).")
    ] = "auto",
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The run's folder; the same command resumes there.")
    ] = Path("runs/average"),
    workers: Workers = 1,
    ray_address: RayAddress = None,
    device: Device = None,
    device_map: Annotated[
        str | None, typer.Option(help="auto: spread a model larger than one GPU over all.")
    ] = None,
    dtype: Precision = "float32",
) -> None:
    """Trace a thousand facts: average effects, the paper's Figures 2, 3 and 7, and its claims with verdicts.

    Stop it whenever you like: what is finished is kept, and the same command goes on. Ends with a page that needs
    neither model nor network.

    Examples:

      factlens average

      factlens average --n 200 --study none --out runs/quick

      factlens average --model gpt2-xl --facts known_1000 --dtype bfloat16 --out runs/gpt2-xl

      factlens average --workers 4 --out runs/four
    """
    from factlens.averages import average as run
    from factlens.data_folder import file_of
    from factlens.facts import read_facts

    bad_rows: list[str] = []
    with clear_errors(kept=out):
        check_writable(out)
        path = file_of(facts, "facts")
        wanted = read_facts(path, on_bad_row=bad_rows.append) if path is not None else None
        tell_left_out(bad_rows)
        executor = executor_for(model, device, device_map, dtype, workers, ray_address)
        try:
            with progress("averaging") as tell:
                done = run(
                    executor,
                    wanted,
                    out=out,
                    n=n,
                    variants=study or "all",
                    part=part,
                    window=window,
                    noise=noise,
                    noise_level=level_of(noise_level),
                    samples=samples,
                    known=known,
                    seed=seed,
                    engine=engine,
                    bad_rows=bad_rows,
                    progress=tell,
                )
        finally:
            executor.close()
        _write_run(done)


def report(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    images: Annotated[
        str | None,
        typer.Option(help="Also write the figures as images: png, svg or pdf (needs kaleido)."),
    ] = None,
) -> None:
    """Write a run's page again, from its files alone: no model, no network.

    Examples:

      factlens report runs/average

      factlens report runs/average --images svg
    """
    from factlens.averages import read_run

    with clear_errors():
        _write_run(read_run(run), images)


def _write_run(run: Run, images: str | None = None) -> None:
    from factlens import plots
    from factlens.reports import run_page, write_text
    from factlens.summaries import Summary

    summary = Summary(run)
    show_run(summary)
    paths = [write_text(run_page(summary), run.folder / "report.html")]
    paths.append(write_text(summary.aie.to_csv(index=False), run.folder / "aie.csv"))
    paths.append(write_text(summary.claims.to_csv(index=False), run.folder / "claims.csv"))
    if images is not None:
        drawn = {"figure-2": plots.heatmap(summary.aie), "figure-7": plots.lines(summary.aie)}
        if len(summary.severed):
            drawn["figure-3"] = plots.severed(summary.severed, gaps=summary.gaps)
        paths += [plots.save(fig, run.folder / f"{name}.{images}") for name, fig in drawn.items()]
    for path in paths:
        console().print(str(path), soft_wrap=True, markup=False)
