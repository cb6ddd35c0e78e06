"""`factlens tune`: every editor's numbers chosen on a model, with the same number of settings for each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from factlens.commands.measuring import (
    COUNTERFACT,
    HELD,
    SHOWN,
    Records,
    gather_first,
    records_of,
)
from factlens.commands.options import Device, ModelName, Precision, RayAddress, Workers
from factlens.commands.shared import (
    EDITORS,
    check_writable,
    clear_errors,
    executor_for,
    keep_plan,
    usage,
)
from factlens.terminal import console, print_table, progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from factlens.executors import Executor
    from factlens.models import Model


def tune(
    model: ModelName = "atlas",
    editor: Annotated[
        list[str] | None,
        typer.Option(
            "--editor",
            "-e",
            help=f"{', '.join(EDITORS)}; repeat for several. Without it all that have no need of training, or are trained, but for zsRE.",
        ),
    ] = None,
    settings: Annotated[
        int, typer.Option(min=2, help="How many settings of each editor, the default among them.")
    ] = 32,
    n: Annotated[
        int,
        typer.Option(
            "--n",
            "-n",
            min=1,
            help="How many records; most settings are tried on a sixteenth of them.",
        ),
    ] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw of settings.")] = 0,
    records: Records = None,
    write: Annotated[
        Path | None,
        typer.Option(
            help="The model's config, such as configs/atlas.yaml, to write the choices into."
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="Folder for tuning.csv and tuning.html; the same command goes on there, also with more editors.",
        ),
    ] = Path("runs/tuning"),
    workers: Workers = 1,
    ray_address: RayAddress = None,
    device: Device = None,
    dtype: Precision = "float32",
) -> None:
    """Choose every editor's numbers on a model: as many settings for each, on the same records, which no table tests on.

    All settings are tried on a few of the records; the better ones on more, the best on all. The default setting is always among them.
    The one with the highest S is taken; of those alike in S the one that changes unrelated text least. Stop it whenever you like: the
    same command goes on.

    Examples:

      factlens tune

      factlens tune --workers 2 --write configs/atlas.yaml

      factlens tune --editor ft --editor rome --settings 64 --n 96
    """
    from factlens.data_folder import file_of
    from factlens.files import written_whole
    from factlens.tunings import BENCHMARK, TABLE, check_config
    from factlens.tunings import tune as try_settings

    with clear_errors(kept=out):
        check_writable(out)
        if unknown := [name for name in editor or () if name not in EDITORS]:
            raise usage(f"no editor {unknown[0]!r}; there are {', '.join(EDITORS)}")
        if write is not None:
            check_writable(write.absolute().parent)
        records = file_of(records, COUNTERFACT)
        executor = executor_for(model, device, None, dtype, workers, ray_address)
        try:
            if write is not None:
                executor.call(check_config, write)
            names = _with_networks(executor, editor)
            executor.call(_gather, (names, settings, seed))
            chosen, others = records_of(executor, COUNTERFACT, records, n, HELD)
            plan = {"settings": settings, "seed": seed, "records": len(chosen)}
            keep_plan(out / "plan.json", {"model": model, **plan})
            with progress("tuning") as tell:
                found = try_settings(
                    executor,
                    names,
                    chosen,
                    out=out,
                    settings=settings,
                    seed=seed,
                    others=others,
                    of=BENCHMARK if records is None else records.name,
                    progress=tell,
                )
            depth = int(executor.call(_depth, None))
        finally:
            executor.close()
        with written_whole(out / TABLE) as partial:
            found.to_csv(partial, index=False)
        _show(found)
        _write_page(found, model, out / "tuning.html")
        for path in (out / TABLE, out / "tuning.html"):
            console().print(str(path), soft_wrap=True, markup=False)
        if write is not None:
            _write_choices(write, found, depth)


def _with_networks(executor: Executor, given: Sequence[str] | None) -> list[str]:
    """The editors that were asked for; without any, all but those that lack a trained network."""
    from factlens.errors import EditorError
    from factlens.tunables import TUNABLE, untrained

    # Those trained on zsRE are for zsRE's questions, and these are CounterFact's records.
    names = list(given or (name for name in TUNABLE if not name.endswith("-zsre")))
    missing = executor.call(untrained, names)
    if given and missing:
        raise EditorError(next(iter(missing.values())))
    if missing:
        said = f"without a network for this model: {', '.join(missing)} (`factlens train-editor` trains one)"
        console(stderr=True).print(said, style="dim", soft_wrap=True, markup=False)
    return [name for name in names if name not in missing]


def _gather(model: Model, plan: tuple[Sequence[str], int, int]) -> None:
    """The statistics of every layer that ROME is going to edit."""
    from factlens.tunables import settings_of

    names, settings, seed = plan
    if "rome" in names:
        gather_first(model, settings_of(model, "rome", settings, seed))


def _depth(model: Model, _: Any) -> int:
    from factlens.models import n_layers

    return n_layers(model)


def _show(found: pd.DataFrame) -> None:
    from factlens.tunings import in_words, summary

    rows = [
        (
            taken["editor"],
            *[_score(taken, name) for name in SHOWN],
            f"{default['S']:.1f}",
            int(taken["n"]),
        )
        for taken, default in summary(found)
    ]
    print_table(("editor", *SHOWN, "default S", "n"), rows)
    for taken, _ in summary(found):
        numbers = f"{in_words(taken)}{', the default' if taken['setting'] == 0 else ''}"
        console().print(f"{taken['editor']}: {numbers}", soft_wrap=True, markup=False)
    said = f"{found['how'].iloc[0]}; per cent, ± half of the 95 % interval. S of the one that is taken is the best of several, so a little too high."
    console().print(said, style="dim", soft_wrap=True, markup=False)


def _score(row: pd.Series, name: str) -> str:
    return f"{row[name]:.1f} ±{row[f'{name}_margin']:.1f}"


def _write_page(found: pd.DataFrame, model: str, path: Path) -> None:
    """The figure, and every setting with its scores, on one page."""
    import pandas as pd

    from factlens import plots
    from factlens.reports import Section, page, write_text
    from factlens.tunings import in_words

    rows = [
        {
            "editor": row["editor"],
            "setting": "default" if row["setting"] == 0 else row["setting"],
            "": "taken" if row["taken"] else "",
            "numbers": in_words(row),
            **{name: _score(row, name) for name in SHOWN},
            "KL": float(row["KL"]),
            "n": int(row["n"]),
            "failed": int(row["failed"]),
        }
        for _, row in found.iterrows()
    ]
    note = "Per cent, ± half of the 95 % interval over records; KL in nats per token of unrelated text. tuning.csv has all scores."
    sections = [
        Section(figure=plots.tuning(found)),
        Section("Every setting", note, table=pd.DataFrame(rows)),
    ]
    write_text(page(f"Editors tuned on {model}", f"{found['how'].iloc[0]}.", sections), path)


def _write_choices(path: Path, found: pd.DataFrame, depth: int) -> None:
    from factlens.configs import known_configs
    from factlens.files import written_whole
    from factlens.tunings import with_choices

    text = with_choices(path, found, depth)
    with written_whole(path) as partial:
        partial.write_bytes(text.encode("utf-8"))
    known_configs.cache_clear()
    console().print(str(path), soft_wrap=True, markup=False)
