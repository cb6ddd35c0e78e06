"""`factlens evaluate` and `factlens sweep`: how well edits hold, and where they hold best."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from factlens.commands.layer_figures import draw_layers, main_trace
from factlens.commands.options import Device, ModelName, Precision, RayAddress, Workers
from factlens.commands.shared import (
    EDITORS,
    WITHOUT_LAYER,
    check_writable,
    clear_errors,
    editor_named,
    executor_for,
    load,
    usage,
)
from factlens.terminal import console, print_table, progress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pandas as pd

    from factlens.benchmarks.counterfact import Record
    from factlens.executors import Executor
    from factlens.models import Model

Records = Annotated[
    Path | None,
    typer.Option(
        "--records", help="A file in the benchmark's form; without it the bundled records of atlas."
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(help="Settings: YAML, the official JSON, or one of EasyEdit's YAML files."),
]
COUNTERFACT, ZSRE = "counterfact", "zsre"
SHOWN = ("S", "ES", "PS", "NS", "retention")
"""Columns that are printed of CounterFact."""
SHOWN_ZSRE = ("efficacy", "paraphrase", "specificity")
SHOWN_TEXTS = ("free", "GE", "RS")
PROGRESS = "evaluating"
TOKENS = {
    "first-subject": "subject-first",
    "middle-subject": "subject-middle",
    "last-subject": "subject-last",
}
"""Roles of tokens in traces, and what ROME's config calls them; of the others both say the same."""


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
        typer.Option(help="The official attribute_snippets.json, which RS compares texts with."),
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

      factlens evaluate --model gpt2-xl --records counterfact.json --n 1000 --generate 100

      factlens evaluate --mode sequential --n 100 --every 10 --no-control --out runs/sequence

      factlens evaluate --benchmark zsre --records zsre_mend_eval.json --model gpt2-xl
    """
    from factlens.benchmarks.references import read_references
    from factlens.evaluation_runs import RECORDS, Contestant, evaluate_run

    with clear_errors(kept=out):
        check_writable(out)
        plans = _plans(editor or ["rome"], _settings(config, layer, clamp), control)
        _check_texts(benchmark, generate, snippets)
        references = read_references(snippets) if snippets is not None else None
        executor = executor_for(model, device, None, dtype, workers, ray_address)
        try:
            executor.call(_gather_first, [given for label, _, given in plans if label == "rome"])
            chosen, others = _records(executor, benchmark, records, n, "test", skip)
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
            "--out", "-o", help="Folder for sweep.csv and records.parquet, of tokens layers.html."
        ),
    ] = Path("runs/sweep"),
    device: Device = None,
    dtype: Precision = "float32",
) -> None:
    """Evaluate ROME at several layers, tokens and clamps, on records that `factlens evaluate` does not use.

    The one marked has the highest S; of those within a tenth of a point, it keeps most of the subject's other facts. With tokens, the
    paper's Figure 5 is drawn.

    Examples:

      factlens sweep --n 50

      factlens sweep --layer 1 --layer 2 --clamp 1.5 --clamp 2.5 --clamp 4

      factlens sweep --token first-subject --token middle-subject --token last-subject --token last --average runs/average
    """
    from factlens.editors.rome import rome
    from factlens.executors import InProcess
    from factlens.files import written_whole
    from factlens.models import n_layers
    from factlens.sweeps import best, combinations, sweep_records, tabulated

    with clear_errors():
        check_writable(out)
        if average is not None and not token:
            raise usage("--average is drawn beside edits at tokens; give --token last-subject")
        if token and len(clamp or ()) > 1:
            raise usage(
                "with --token there is one figure, of one clamp; run the command for each --clamp"
            )
        settings = _settings(config, None, None)
        hooked = load(model, device, dtype)
        traced = None if average is None else main_trace(average, hooked)
        grid: dict[str, Sequence[Any]] = {"layer": layer or list(range(n_layers(hooked)))}
        if token:
            grid["fact_token"] = [TOKENS.get(each, each) for each in dict.fromkeys(token)]
        if clamp:
            grid["max_norm_ratio"] = clamp
        _gather_first(hooked, [{**settings, **each} for each in combinations(grid)])
        chosen, _ = _records(InProcess(hooked), COUNTERFACT, records, n, "tune")
        with progress("editing") as tell:
            measured = sweep_records(
                hooked,
                rome,
                chosen,
                grid,
                config=settings,
                progress=lambda done, total: tell(done, total, ""),
            )
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
                *_cells(row, SHOWN),
                row["n"],
            )
            for _, row in swept.iterrows()
        ]
        print_table(columns, rows)
        console().print(str(out / "sweep.csv"), soft_wrap=True, markup=False)
        if token:
            draw_layers(measured, traced, out)


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


def _settings(config: Path | None, layer: int | None, clamp: float | None) -> dict[str, Any]:
    """What differs from the model's own settings."""
    from factlens.editors.rome_config import as_mapping, read_rome_config

    settings = as_mapping(read_rome_config(config)) if config is not None else {}
    if layer is not None:
        settings["layer"] = layer
    if clamp is not None:
        settings["max_norm_ratio"] = clamp
    return settings


def _gather_first(model: Model, plans: Sequence[dict[str, Any]]) -> None:
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


def _check_texts(benchmark: str, generate: int | None, snippets: Path | None) -> None:
    """Refuse what does not go together before the model is loaded."""
    if benchmark not in (COUNTERFACT, ZSRE):
        raise usage(f"no benchmark {benchmark!r}; there are {COUNTERFACT}, {ZSRE}")
    if benchmark == ZSRE and generate is not None:
        raise usage("zsRE has no prompts for texts; leave out --generate")
    if snippets is not None and generate is None:
        raise usage("--snippets are compared with generated texts; give --generate too")


def _records(
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
        mine = [r for r in read(given) if is_tuned(r.subject) == (part == "tune")]
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


def _show(frame: pd.DataFrame) -> None:
    from factlens.evaluation import table

    found = table(frame)
    shown = tuple(name for name in (*SHOWN, *SHOWN_ZSRE, *SHOWN_TEXTS) if name in found)
    after = ("measured_after",) if "/independent/" not in found["protocol"].iloc[0] else ()
    rows = [
        (row["editor"], *(row[name] for name in after), *_cells(row, shown), row["n"])
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


def _cells(row: Any, shown: Sequence[str]) -> list[str]:
    return [
        f"{row[name]:.1f}" + (f" ±{row[f'{name}_margin']:.1f}" if name != "S" else "")
        for name in shown
    ]
