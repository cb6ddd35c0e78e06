"""Sweeps that are kept part by part: stopped, gone on with, shared out among workers."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from factlens.benchmarks.atlas_counterfact import other_facts
from factlens.benchmarks.counterfact import Record
from factlens.counterfact_scores import Others
from factlens.editors import Editor
from factlens.evaluation import BATCH, name_of
from factlens.evaluation_runs import Contestant, RunProgress, evaluate_run
from factlens.executors import Executor
from factlens.models import Model
from factlens.sweeps import behind, planned


def sweep_run(
    model: Model | Executor,
    editor: Editor,
    records: Iterable[Record],
    grid: Mapping[str, Sequence[Any]],
    *,
    out: str | Path,
    config: Mapping[str, Any] | None = None,
    others: Others = other_facts,
    batch: int = BATCH,
    progress: RunProgress = lambda done, total, label: None,
) -> pd.DataFrame:
    """`sweeps.sweep_records`, kept in the folder `out` as `evaluate_run` keeps it, each setting under a name that says it.

    The same call goes on where an earlier one stopped.

    Args:
        model: a hooked model without edits, or an `executors.OnRay` for several workers.
        editor: whose settings.
        records: on which each is measured.
        grid: setting -> values.
        out: the run's folder.
        config: settings that stay.
        others: as in `evaluate`, as is `batch`.
        progress: told (records measured, records under all settings, the setting at work).

    Raises:
        PlanError: nothing to choose from.
        What `evaluate_run` raises.
    """
    chosen, every = planned(records, grid)
    of = {in_words(settings): settings for settings in every}
    frame = evaluate_run(
        model,
        [Contestant(label, editor, {**(config or {}), **each}) for label, each in of.items()],
        chosen,
        out=out,
        others=others,
        batch=batch,
        progress=progress,
    )
    rows = [
        behind(of[str(label)], group.assign(editor=name_of(editor)).reset_index(drop=True))
        for label, group in frame.groupby("editor", sort=False)
    ]
    return pd.concat(rows, ignore_index=True)


def in_words(settings: Mapping[str, Any]) -> str:
    """A combination of settings: "layer 3, fact_token last"."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())
