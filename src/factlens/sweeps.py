"""The same records under several settings of an editor: how a layer or a bound is chosen."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import pandas as pd

from factlens.benchmarks.atlas_counterfact import other_facts
from factlens.benchmarks.counterfact import Record
from factlens.counterfact_scores import Others
from factlens.editors import Editor
from factlens.engines.problems import Progress, no_progress
from factlens.errors import PlanError
from factlens.evaluation import evaluate, table
from factlens.models import Model


def sweep(
    model: Model,
    editor: Editor,
    records: Iterable[Record],
    grid: Mapping[str, Sequence[Any]],
    *,
    config: Mapping[str, Any] | None = None,
    others: Others = other_facts,
    progress: Progress = no_progress,
) -> pd.DataFrame:
    """Evaluate every combination of `grid` (setting -> values) on the same records.

    One row for each: the settings, then the columns of `evaluation.table`, best first (`best`). What is chosen here is to be
    reported on other records. `config` holds the settings that stay, `others` is `evaluate`'s.

    Raises:
        PlanError: nothing to choose from.
    """
    measured = sweep_records(
        model, editor, records, grid, config=config, others=others, progress=progress
    )
    return tabulated(measured, list(grid))


def sweep_records(
    model: Model,
    editor: Editor,
    records: Iterable[Record],
    grid: Mapping[str, Sequence[Any]],
    *,
    config: Mapping[str, Any] | None = None,
    others: Others = other_facts,
    progress: Progress = no_progress,
) -> pd.DataFrame:
    """What `sweep` tabulates: for every combination the rows of `evaluate`, one a record, behind the settings. Raises what `sweep` raises."""
    chosen, every = planned(records, grid)
    total, frames = len(every) * len(chosen), []
    for number, settings in enumerate(every):

        def tell(done: int, of: int, number: int = number) -> None:
            progress(number * len(chosen) + done, total)

        frame = evaluate(
            model,
            editor,
            chosen,
            config={**(config or {}), **settings},
            others=others,
            progress=tell,
        )
        frames.append(behind(settings, frame))
    return pd.concat(frames, ignore_index=True)


def planned(
    records: Iterable[Record], grid: Mapping[str, Sequence[Any]]
) -> tuple[list[Record], list[dict[str, Any]]]:
    """What a sweep consists of: the records, and every combination of settings.

    Raises:
        PlanError: nothing to choose from.
    """
    chosen = list(records)
    if not chosen or not grid or not all(grid.values()):
        raise PlanError("a sweep needs records, and at least one value of each setting")
    return chosen, combinations(grid)


def behind(settings: Mapping[str, Any], frame: pd.DataFrame) -> pd.DataFrame:
    """An evaluation's rows behind the settings that they are of."""
    columns = {name: pd.Series([value] * len(frame)) for name, value in settings.items()}
    return pd.concat([pd.DataFrame(columns), frame], axis=1)


def combinations(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every choice of one value of each setting, the last setting changing fastest."""
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def tabulated(measured: pd.DataFrame, settings: Sequence[str]) -> pd.DataFrame:
    """The table of `sweep` from the rows of `sweep_records`: one row for each combination of the `settings`, best first."""
    # By what they look like: a value may be a list, by which nothing can be grouped.
    looks = [measured[name].map(repr) for name in settings]
    rows = [
        {
            **{name: group[name].iloc[0] for name in settings},
            **table(group.drop(columns=[*settings])).iloc[0],
        }
        for _, group in measured.groupby(looks, sort=False)
    ]
    return pd.DataFrame(rows).sort_values(["S", "retention"], ascending=False, kind="stable")


def best(swept: pd.DataFrame, slack: float = 0.1) -> pd.Series:
    """The row to take: of those whose S is within `slack` points of the highest, the one that keeps most of the subject's other facts.

    S alone does not see that damage; the slack lets it decide between settings that S cannot tell apart.
    """
    good = swept[swept["S"] >= swept["S"].max() - slack]
    return good.sort_values(["retention", "S"], ascending=False, kind="stable").iloc[0]
