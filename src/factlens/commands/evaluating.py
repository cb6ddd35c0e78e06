"""`factlens evaluate`: how well edits hold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from factlens.commands.measuring import (
    COUNTERFACT,
    SHOWN,
    ZSRE,
    ConfigFile,
    Records,
    cells,
    gather_first,
    records_of,
    settings_of,
)
from factlens.commands.options import Device, ModelName, Precision, RayAddress, Workers
from factlens.commands.shared import (
    EDITORS,
    WITHOUT_LAYER,
    check_writable,
    clear_errors,
    editor_named,
    executor_for,
    usage,
)
from factlens.terminal import console, print_table, progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd


SHOWN_ZSRE = ("efficacy", "paraphrase", "specificity")
SHOWN_TEXTS = ("free", "GE", "RS")
PROGRESS = "evaluating"


def evaluate(
    model: ModelName = "atlas",
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="How many records.")] = 200,
    skip: Annotated[
        int, typer.Option(min=0, help="Leave out so many of the first: records looked at before.")
    ] = 0,
    benchmark: Annotated[
        str, typer.Option("--benchmark", "-b", help=f"{COUNTERFACT} or {ZSRE}.")
    ] = COUNTERFACT,
    records: Records = None,
    editor: Annotated[
        list[str] | None,
        typer.Option(
            "--editor", "-e", help=f"{', '.join(EDITORS)}; repeat for several. ROME without it."
        ),
    ] = None,
    layer: Annotated[
        int | None, typer.Option("--layer", "-l", help="0-based; the config's without it.")
    ] = None,
    clamp: Annotated[
        float | None, typer.Option(help="ROME's bound of the shift, as a multiple of ‖v0‖.")
    ] = None,
    config: ConfigFile = None,
    control: Annotated[
        bool,
        typer.Option(
            help="Also the unedited model, and beside ROME itself with the identity for C."
        ),
    ] = True,
    mode: Annotated[
        str,
        typer.Option(
            help="independent: each edit alone; sequential: all are kept, and measured after the last; batch: all as one edit."
        ),
    ] = "independent",
    every: Annotated[
        int | None, typer.Option(min=1, help="In sequential mode, measure after so many edits too.")
    ] = None,
    generate: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Also scores of texts of so many tokens with their prompt; 100 in the paper.",
        ),
    ] = None,
    snippets: Annotated[
        Path | None,
        typer.Option(
            help="The official attribute_snippets.json, or that name of `factlens data`: what RS compares texts with."
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="End with 1 if any record has no scores.")
    ] = False,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="Folder for records.parquet and table.csv; the same command goes on there.",
        ),
    ] = Path("runs/evaluation"),
    workers: Workers = 1,
    ray_address: RayAddress = None,
    device: Device = None,
    dtype: Precision = "float32",
) -> None:
    """Edit each record by itself, measure it, undo it: efficacy, paraphrases, neighbours, and the subject's other facts.

    ES, PS and NS are shares of prompts (ROME, Section 3.3), EM, PM and NM differences of probability, S the harmonic mean of
    the first three; all in per cent, with 95 % intervals over records. All of them are in table.csv. Retention is the share of the subject's other facts,
    known before, that survive: the damage that S does not show. Stop it whenever you like: the same command goes on.

    Examples:

      factlens evaluate

      factlens evaluate --n 50 --layer 3 --clamp 2 --no-control --out runs/layer-3

      factlens evaluate --editor rome --editor ft --editor ft-l --editor attn-edit --editor kn

      factlens evaluate --model gpt2-xl --records counterfact --n 1000 --generate 100

      factlens evaluate --mode sequential --n 100 --every 10 --no-control --out runs/sequence

      factlens evaluate --benchmark zsre --records zsre_mend_eval --model gpt2-xl
    """
    from factlens.benchmarks.references import read_references
    from factlens.data_folder import file_of
    from factlens.evaluation_runs import RECORDS, Contestant, evaluate_run

    with clear_errors(kept=out):
        check_writable(out)
        plans = _plans(editor or ["rome"], settings_of(config, layer, clamp), control)
        _check_texts(benchmark, generate, snippets)
        texts, records = file_of(snippets, "snippets"), file_of(records, benchmark)
        references = read_references(texts) if texts is not None else None
        executor = executor_for(model, device, None, dtype, workers, ray_address)
        try:
            executor.call(gather_first, [given for label, _, given in plans if label == "rome"])
            chosen, others = records_of(executor, benchmark, records, n, "test", skip)
            with progress(PROGRESS) as tell:
                frame = evaluate_run(
                    executor,
                    [Contestant(*plan) for plan in plans],
                    chosen,
                    out=out,
                    mode=mode,
                    every=every,
                    generations=generate,
                    others=others,
                    references=references,
                    progress=tell,
                )
        finally:
            executor.close()
        _show(frame)
        console().print(str(out / RECORDS), soft_wrap=True, markup=False)
        if (frame["reason"] != "").any() and strict:
            raise typer.Exit(1)


def _plans(
    names: Sequence[str], settings: dict[str, Any], control: bool
) -> list[tuple[str, Any, Any]]:
    """Label, editor and settings of every row of the table; ROME's settings, but for the layer, are of ROME alone."""
    if unknown := [name for name in names if name not in EDITORS]:
        raise usage(f"no editor {unknown[0]!r}; there are {', '.join(EDITORS)}")
    if "layer" in settings and not set(names) - set(WITHOUT_LAYER):
        raise usage(f"layer (--layer or --config): {', '.join(names)} looks in all layers")
    if "rome" not in names and (foreign := settings.keys() - {"layer"}):
        raise usage(
            f"{', '.join(sorted(foreign))} (--clamp or --config): only ROME takes it, which is not among the editors"
        )
    plans: list[tuple[str, Any, Any]] = [("none", None, None)] if control else []
    for name in dict.fromkeys(names):
        made_by = editor_named(name)
        if name == "rome" and control:
            plans.append(("C = identity", made_by, {**settings, "moment": "identity"}))
        plans.append((name, made_by, settings if name == "rome" else _layer_of(name, settings)))
    return plans


def _layer_of(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Of ROME's settings what another editor takes."""
    return {k: v for k, v in settings.items() if k == "layer" and name not in WITHOUT_LAYER}


def _check_texts(benchmark: str, generate: int | None, snippets: Path | None) -> None:
    """Refuse what does not go together before the model is loaded."""
    if benchmark not in (COUNTERFACT, ZSRE):
        raise usage(f"no benchmark {benchmark!r}; there are {COUNTERFACT}, {ZSRE}")
    if benchmark == ZSRE and generate is not None:
        raise usage("zsRE has no prompts for texts; leave out --generate")
    if snippets is not None and generate is None:
        raise usage("--snippets are compared with generated texts; give --generate too")


def _show(frame: pd.DataFrame) -> None:
    from factlens.evaluation import table

    found = table(frame)
    shown = tuple(name for name in (*SHOWN, *SHOWN_ZSRE, *SHOWN_TEXTS) if name in found)
    after = ("measured_after",) if "/independent/" not in found["protocol"].iloc[0] else ()
    rows = [
        (row["editor"], *(row[name] for name in after), *cells(row, shown), row["n"])
        for _, row in found.iterrows()
    ]
    print_table(("editor", *("edits" for _ in after), *shown, "n"), rows)
    asked = (
        f"; retention over {', '.join(map(str, found['n_retention']))} records whose subject has other known facts"
        if "n_retention" in found
        else ""
    )
    console().print(
        f"{found['protocol'].iloc[0]}; per cent, ± half of the 95 % interval{asked}",
        style="dim",
        soft_wrap=True,
        markup=False,
    )
    for name, group in frame[frame["reason"] != ""].groupby("editor", sort=False):
        console().print(
            f"{name}: {len(group)} records have no scores, such as {group['case_id'].iloc[0]}: {group['reason'].iloc[0]}",
            soft_wrap=True,
            markup=False,
        )
