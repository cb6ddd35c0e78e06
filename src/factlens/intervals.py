"""95 % intervals of means over facts: Student's t, and the BCa bootstrap."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.special import ndtr, ndtri, stdtrit

from factlens.errors import PlanError

INTERVALS = ("normal", "bootstrap")
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over facts with its standard error and 95 % interval; NaN where `n` facts say nothing."""

    mean: float
    se: float
    low: float
    high: float
    n: int


def mean_interval(
    values: Iterable[Any], *, interval: str = "normal", resamples: int = 2000, seed: int = 0
) -> Estimate:
    """The mean of one number a fact, such as a paired difference, and its 95 % interval; NaN are left out.

    Raises:
        PlanError: an interval that does not exist.
    """
    check_interval(interval)
    table = np.fromiter(values, dtype=float)[None]
    mean, se, low, high, n = estimates(table, interval, resamples, seed).iloc[0]
    return Estimate(float(mean), float(se), float(low), float(high), int(n))


def estimates(
    values: Float[np.ndarray, "cell fact"], interval: str, resamples: int, seed: int
) -> pd.DataFrame:
    """`mean, se, low, high, n` of each cell over its facts; NaN marks a fact that has no such cell."""
    there = ~np.isnan(values)
    counts = there.sum(axis=1)
    found = np.full((len(values), 4), np.nan)
    for n in sorted({int(count) for count in counts if count}):
        rows = counts == n
        cells = values[rows][there[rows]].reshape(-1, n)
        mean = cells.mean(axis=1)
        found[rows, 0] = mean
        if n > 1:
            se = cells.std(axis=1, ddof=1) / np.sqrt(n)
            flat = np.ptp(cells, axis=1) == 0
            bounds = _student(mean, se, n) if interval == "normal" else _bca(cells, resamples, seed)
            bounds[flat] = mean[flat, None]
            found[rows, 1] = np.where(flat, 0.0, se)
            found[rows, 2:] = bounds
    stats = pd.DataFrame(found, columns=["mean", "se", "low", "high"])
    return stats.assign(n=counts)


def _student(
    mean: Float[np.ndarray, " cell"], se: Float[np.ndarray, " cell"], n: int
) -> Float[np.ndarray, "cell 2"]:
    margin = stdtrit(n - 1, (1 + LEVEL) / 2) * se
    return np.stack([mean - margin, mean + margin], axis=1)


def _bca(
    cells: Float[np.ndarray, "cell fact"], resamples: int, seed: int
) -> Float[np.ndarray, "cell 2"]:
    """BCa intervals of the mean (Efron 1987), with `scipy.stats.bootstrap`'s draws and its numbers.

    Of a mean, every resample is a product with how often it drew each fact, and the jackknife has a closed form: 40 times as
    fast as scipy for 250 cells of 1 000 facts.
    """
    if resamples < 2:
        raise PlanError(f"a bootstrap needs resamples, 2 at least and better 2000, not {resamples}")
    weights = _weights(cells.shape[1], resamples, seed)
    parts = np.array_split(cells, ceil(len(cells) / 1000))  # 16 MB each of resampled means
    return np.concatenate([_bca_part(part, weights) for part in parts])


def _weights(n: int, resamples: int, seed: int) -> Float[np.ndarray, "resample fact"]:
    """How often each resample draws each fact, over n."""
    drawn = np.random.default_rng(seed).integers(0, n, (resamples, n))
    drawn += n * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n) / n


def _bca_part(
    cells: Float[np.ndarray, "cell fact"], weights: Float[np.ndarray, "resample fact"]
) -> Float[np.ndarray, "cell 2"]:
    mean = cells.mean(axis=1, keepdims=True)
    away = cells - mean
    moved = np.sort(away @ weights.T, axis=1)
    resamples = moved.shape[1]
    rounding = 1e-12 * np.abs(away).max(axis=1, keepdims=True)
    below, to = ((moved < edge).mean(axis=1) for edge in (-rounding, rounding))
    # A share of 0 or 1 has no quantile: as if half a resample lay beyond.
    share = np.clip((below + to) / 2, 0.5 / resamples, 1 - 0.5 / resamples)
    cubes, squares = (away**3).sum(axis=1), (away**2).sum(axis=1)
    spread = np.where(squares > 0, squares, 1.0) ** 1.5
    bias, acceleration = ndtri(share)[:, None], (cubes / spread / 6)[:, None]
    shifted = bias + ndtri(np.array([(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    at = ndtr(bias + shifted / (1 - acceleration * shifted)) * (resamples - 1)
    left = np.floor(at).astype(int)
    lower, upper = (
        np.take_along_axis(moved, np.minimum(each, resamples - 1), 1) for each in (left, left + 1)
    )
    return mean + lower + (at - left) * (upper - lower)


def check_interval(interval: str) -> None:
    """Refuse an interval that does not exist.

    Raises:
        PlanError: with those that do.
    """
    if interval not in INTERVALS:
        raise PlanError(f"no interval {interval!r}; there are {', '.join(INTERVALS)}")
