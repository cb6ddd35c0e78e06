"""A traced frame's rows as measurements: checked, told apart, under every role that they have, never mixed."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from factlens.engines.problems import METRICS, SIGNS
from factlens.errors import PlanError
from factlens.patches import EMBEDDING
from factlens.plans import CELL
from factlens.tokens import ROLES
from factlens.traces import Trace

Traced: TypeAlias = Trace | pd.DataFrame
SETTINGS = ("kind", "window", "severed", "head", "noise", "noise_level", "metric", "model")
"""Columns whose values are different measurements of one fact, never averaged into one number unasked."""
PLACES = ("layer", "position", "token", "role")


def checked(traced: Traced, used: Sequence[str] = ()) -> pd.DataFrame:
    """The frame, numbered on from 0, with the columns that are needed and every cell once."""
    frame = traced.frame if isinstance(traced, Trace) else traced
    needed = ["fact", *CELL, "role", *used]
    if missing := [name for name in needed if name not in frame]:
        raise PlanError(f"the frame has no column {listed(missing)}; it has {listed(frame)}")
    if frame.empty:
        raise PlanError("the frame has no rows; there is nothing to average")
    cell = ["fact", "layer", "position", *_settings(frame)]
    if (twice := frame.duplicated(cell)).any():
        row = frame[twice].iloc[0]
        raise PlanError(
            f"fact {row['fact']} has the cell layer {row['layer']}, position {row['position']} of {row['kind']} "
            "twice: two traces under one number; put traces together with factlens.traces.concat"
        )
    return frame.reset_index(drop=True)


def with_effect(frame: pd.DataFrame, metric: str | None) -> pd.DataFrame:
    """The frame with `effect` in the unit of `metric`; as it is for None."""
    if metric is None:
        return frame
    gain = column_of(frame, metric, "restored") - column_of(frame, metric, "corrupted")
    return frame.assign(effect=SIGNS.get(metric, 1.0) * gain)


def rows_that_count(traced: Traced, used: Sequence[str], metric: str | None) -> pd.DataFrame:
    """The rows that count, once for each of their roles, when cells are told apart by the columns `used`."""
    frame = with_effect(checked(traced, used), metric)
    if "layer" not in used:
        frame = frame[frame["layer"] > EMBEDDING]
    if "role" in used:
        frame = _with_double_roles(frame)
    elif "position" not in used:
        frame = frame[frame["role"] != "before subject"]
    if frame.empty:
        raise PlanError("nothing to average: all rows are of the embedding or before the subject")
    return frame.reset_index(drop=True)


def _with_double_roles(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of two roles once more, under the earlier of them; `role` as traced shows the later.

    Roles are read off the frame, so that a stored frame averages as its trace does, and one of some roles only gains none.
    """
    fact = ["fact", *(name for name in _settings(frame) if name not in (*CELL, "head"))]
    tokens = frame[[*fact, "position", "role"]].drop_duplicates()
    again = []
    for later, earlier, before in (
        ("last subject", "first subject", "before subject"),
        ("last", "first after", "last subject"),
    ):
        once = tokens[tokens["role"] == later]
        has_earlier = _rows_in(once, tokens[tokens["role"] == earlier], fact)
        ahead = tokens[tokens["role"] == before].assign(position=lambda rows: rows["position"] + 1)
        starts = _rows_in(once, ahead, [*fact, "position"]) | (once["position"] == 0)
        # Where the token ahead was not kept, a fact without the role that others have has it here.
        double = once[~has_earlier & (starts | (tokens["role"] == earlier).any())]
        rows = frame[(frame["role"] == later) & _rows_in(frame, double, fact)]
        again.append(rows.assign(role=earlier))
    frame = pd.concat([frame[frame["role"] != "before subject"], *again], ignore_index=True)
    return frame.assign(role=pd.Categorical(frame["role"].astype(object), ROLES[1:], ordered=True))


def _rows_in(rows: pd.DataFrame, others: pd.DataFrame, columns: list[str]) -> pd.Series:
    """Which of `rows` are among `others` in `columns`."""
    found = pd.MultiIndex.from_frame(rows[columns]).isin(pd.MultiIndex.from_frame(others[columns]))
    return pd.Series(found, index=rows.index)


def _settings(frame: pd.DataFrame) -> list[str]:
    """The columns that tell measurements of one cell apart: `SETTINGS`, and others that vary within a fact.

    Labels of facts, such as a relation, do not; numbers with fractions are measurements.
    """
    measured = {
        f"{metric}_{run}" for metric in METRICS for run in ("clean", "corrupted", "restored")
    }
    known = {*PLACES, *measured, "fact", "effect", "sample_sd"}
    return [
        name
        for name in frame.columns
        if name in SETTINGS or (name not in known and _varies(frame, name))
    ]


def _varies(frame: pd.DataFrame, name: str) -> bool:
    if pd.api.types.is_float_dtype(frame[name]):
        return False
    return bool(frame.groupby("fact")[name].nunique(dropna=False).max() > 1)


def refuse_mixing(frame: pd.DataFrame, by: Sequence[str]) -> None:
    """Refuse groups in which a setting that is not in `by` has several values."""
    by = [name for name in by if name in frame and name != "fact"]
    for name in _settings(frame):
        values = list(frame[name].unique())
        if name in by or len(values) == 1:
            continue
        if frame[name].groupby(codes_of(frame, by)).nunique(dropna=False).max() > 1:
            raise PlanError(
                f"this would average over {name} = {listed(values)}, which are different measurements; name {name} too, "
                f"or keep one: frame[frame[{name!r}] == {values[0]!r}]"
            )


def own_metric(traced: Traced) -> str:
    """What `effect` is measured in: as the trace says, or by the columns it is the difference of."""
    if isinstance(traced, Trace):
        return str(traced.info["metric"])
    for metric in reversed(METRICS):  # `prob` stands beside every other metric
        if {f"{metric}_restored", f"{metric}_corrupted", "effect"} <= set(traced):
            gain = with_effect(traced, metric)["effect"]
            if np.allclose(gain, traced["effect"], rtol=1e-5, atol=1e-9, equal_nan=True):
                return metric
    raise PlanError(
        f"the frame's effect is of no metric that has its columns ({listed(traced)}); say metric=, "
        f"one of {listed(METRICS)}"
    )


def column_of(frame: pd.DataFrame, metric: str, run: str) -> pd.Series:
    """What was measured of one run ("clean", "corrupted", "restored").

    Raises:
        PlanError: the frame has no such metric, with those that it has.
    """
    check_choice("metric", metric, METRICS)
    if f"{metric}_{run}" not in frame:
        raise PlanError(
            f"the frame has no {metric}_{run}; trace with metric={metric!r}, or take one of "
            + listed(each for each in METRICS if f"{each}_{run}" in frame)
        )
    return frame[f"{metric}_{run}"]


def check_choice(name: str, given: str, known: Sequence[str]) -> None:
    """Refuse what does not exist, with what does."""
    if given not in known:
        raise PlanError(f"no {name} {given!r}; there are {', '.join(known)}")


def listed(values: Iterable[Any]) -> str:
    """Values as a person lists them, the first twenty."""
    values = list(values)
    return ", ".join(str(each) for each in values[:20]) + (", ..." if len(values) > 20 else "")


def codes_of(frame: pd.DataFrame, by: Sequence[str]) -> pd.Series:
    """Each row's combination of `by`, numbered: roles in their order, text as it first appears, numbers by size."""
    if "fact" in by:
        raise PlanError("the fact is what is averaged over; per_fact gives the numbers of each")
    if not by:
        return pd.Series(0, index=frame.index)
    return frame.groupby([_sortable(frame[name]) for name in by], dropna=False).ngroup()


def _sortable(column: pd.Series) -> pd.Series:
    if isinstance(column.dtype, pd.CategoricalDtype):
        return column.cat.codes
    if pd.api.types.is_numeric_dtype(column):
        return column
    return pd.Series(pd.factorize(column, use_na_sentinel=False)[0], index=column.index)


def heads_of(frame: pd.DataFrame, codes: pd.Series, by: Sequence[str]) -> pd.DataFrame:
    """The values of `by` in each combination, in the order of `codes`."""
    first = codes.drop_duplicates().sort_values().index
    return frame.loc[first, list(by)].reset_index(drop=True)
