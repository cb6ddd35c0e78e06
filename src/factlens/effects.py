"""Traced frames to effects: AIE and ATE over facts with their intervals (ROME, Section 2).

The fact is the unit of sampling: what was measured within a fact is averaged first, and n counts facts.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from factlens.engines.problems import SIGNS
from factlens.errors import PlanError
from factlens.intervals import check_interval, estimates
from factlens.measurements import (
    PLACES,
    Traced,
    check_choice,
    checked,
    codes_of,
    column_of,
    heads_of,
    listed,
    own_metric,
    refuse_mixing,
    rows_that_count,
)

BY = ("kind", "window", "severed", "layer", "role")
POOLINGS = ("facts", "rome")


def average_effects(
    traced: Traced,
    by: Sequence[str] = BY,
    *,
    interval: str = "normal",
    pooling: str = "facts",
    metric: str | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """AIE: the mean over facts of each fact's mean effect, for every combination of the columns `by`.

    Returns `by`, then `aie, se, low, high, n_facts`: one row a combination, in the order of the plan; roles come as
    an ordered categorical. One fact alone has no `se`, `low` or `high` (NaN).

    The only token of a subject counts as its first and its last, and the token after the subject, where it ends the
    prompt, as "first after" and "last"; a prompt that ends with its subject has neither. Left out, being zero or a
    control: positions before the subject, unless `by` has `position` and not `role`; the embedding, unless `by` has
    `layer`.

    Args:
        traced: a trace, or its frame alone.
        by: columns of the frame. One left out is averaged over within the fact if it is a place (layer, position,
            role); kinds, windows, severings, heads, models, noises are never mixed.
        interval: "normal": Student's t over facts. "bootstrap": BCa over facts, the same draws for all cells of as
            many facts; the better one where a few facts make the mean. Neither is long enough for 20 facts.
        pooling: "facts", or "rome", the official code's: all tokens of all facts in one pool, restored value minus
            the mean corrupted value over all facts. Its `se`, `low` and `high` are NaN: tokens of one fact are no
            independent draws, and the official interval has no single count of them.
        metric: what effects are measured in; None for what the trace's `effect` is.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        PlanError: a column, metric, interval or pooling that does not exist, settings that would be mixed, or two
            traces under the same fact numbers.
    """
    check_interval(interval)
    check_choice("pooling", pooling, POOLINGS)
    frame = rows_that_count(traced, by, metric)
    refuse_mixing(frame, by)
    codes = codes_of(frame, by)
    if pooling == "rome":
        stats = _pooled(frame, codes, by, metric or own_metric(traced))
    else:
        per_fact = frame["effect"].groupby([codes, frame["fact"]]).mean().unstack()
        stats = estimates(per_fact.to_numpy(float), interval, resamples, seed)
    stats = stats.rename(columns={"mean": "aie", "n": "n_facts"})
    return pd.concat([heads_of(frame, codes, by), stats], axis=1)


def average_total_effects(
    traced: Traced,
    by: Sequence[str] = (),
    *,
    interval: str = "normal",
    metric: str | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """ATE: what corruption takes away, clean minus corrupted, over facts (ROME, Section 2.1).

    Returns `by`, then `clean, corrupted, ate, se, low, high, n_facts`; without `by` a single row. Kinds, windows and
    severings share their fact's clean and corrupted runs, so only models, noises and the like need to be told apart.

    Raises:
        PlanError: as `average_effects`, and for `by` with a layer, position, token or role, which runs have not.
    """
    check_interval(interval)
    if places := [name for name in by if name in PLACES]:
        raise PlanError(
            f"a total effect has no {', '.join(places)}: it is one number for each fact; take it out of by="
        )
    frame = checked(traced, by)
    refuse_mixing(frame, (*by, "kind", "window", "severed", "head"))
    metric = metric or own_metric(traced)
    codes = codes_of(frame, by)
    runs = [column_of(frame, metric, run) for run in ("clean", "corrupted")]
    clean, corrupted = (run.groupby([codes, frame["fact"]]).first().unstack() for run in runs)
    gain = SIGNS.get(metric, 1.0) * (clean - corrupted)
    stats = estimates(gain.to_numpy(float), interval, resamples, seed)
    stats = stats.rename(columns={"mean": "ate", "n": "n_facts"})
    means = pd.DataFrame({"clean": clean.mean(axis=1), "corrupted": corrupted.mean(axis=1)})
    return pd.concat([heads_of(frame, codes, by), means.reset_index(drop=True), stats], axis=1)


def per_fact(traced: Traced, *, metric: str | None = None, **cell: Any) -> pd.Series:
    """Each fact's mean effect over its cells with the given column values, indexed by fact.

    `per_fact(trace, kind="mlp", role="last subject", layer=range(3))`: a value or several for each column. Double
    roles, and what is left out, are those of `average_effects`; facts without such a cell are absent.

    Raises:
        PlanError: a column or value that does not exist, with those that do; settings that would be mixed.
    """
    frame = rows_that_count(traced, tuple(cell), metric)
    for name, given in cell.items():
        values = list(given) if pd.api.types.is_list_like(given) else [given]
        known = list(frame[name].unique())
        if missing := [each for each in values if each not in known]:
            raise PlanError(
                f"there is no {name} {listed(missing)} among these cells; there are {listed(known)}"
            )
        frame = frame[frame[name].isin(values)]
    refuse_mixing(frame, tuple(cell))
    return frame.groupby("fact")["effect"].mean()


def fact_effects(
    traced: Traced, by: Sequence[str] = BY, *, metric: str | None = None
) -> pd.DataFrame:
    """The effects that `average_effects` averages: a row for each combination of `by` (its index), a column a fact.

    A fact without such a cell has NaN there. Paired differences are differences of two of its rows.

    Raises:
        PlanError: as `average_effects`.
    """
    frame = rows_that_count(traced, by, metric)
    refuse_mixing(frame, by)
    codes = codes_of(frame, by)
    table = frame["effect"].groupby([codes, frame["fact"]]).mean().unstack()
    heads = heads_of(frame, codes, by)
    return table.set_axis(
        pd.MultiIndex.from_frame(heads.astype({"role": object} if "role" in by else {})), axis=0
    )


def _pooled(frame: pd.DataFrame, codes: pd.Series, by: Sequence[str], metric: str) -> pd.DataFrame:
    """The official pooling: each cell's mean over rows, minus the corrupted mean over all facts of its settings."""
    restored, corrupted = (column_of(frame, metric, run) for run in ("restored", "corrupted"))
    settings = codes_of(frame, [name for name in by if name not in PLACES])
    baseline = corrupted.groupby([settings, frame["fact"]]).first().groupby(level=0).mean()
    gain = SIGNS.get(metric, 1.0) * (restored - settings.map(baseline))
    facts = frame["fact"].groupby(codes).nunique()
    found = pd.DataFrame({"mean": gain.groupby(codes).mean(), "se": np.nan})
    return found.assign(low=np.nan, high=np.nan, n=facts).reset_index(drop=True)
