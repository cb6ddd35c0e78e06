"""ROME at every layer and every token of the subject, and its scores beside causal tracing (ROME, Section 3.4 and Figure 5)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import rankdata

from factlens import models
from factlens.benchmarks.atlas_counterfact import other_facts
from factlens.benchmarks.counterfact import Record
from factlens.editors.rome import rome
from factlens.editors.rome_config import rome_config_for
from factlens.effects import fact_effects
from factlens.engines.problems import Progress, no_progress
from factlens.errors import PlanError
from factlens.evaluation import Others, table
from factlens.intervals import LEVEL
from factlens.key_statistics import gather_missing
from factlens.measurements import Traced
from factlens.metrics import PARTS_OF_S, harmonic_half_width
from factlens.models import Model
from factlens.sweeps import sweep_records
from factlens.traces import Trace

TOKENS = ("subject-first", "subject-middle", "subject-last", "last")
"""Where Figure 5 looks facts up, as `fact_token` of ROME's config says it."""
SCORES = (*PARTS_OF_S, "S", "retention")
PLACE = ["layer", "fact_token"]
LAST_SUBJECT = "subject-last"
METHODS = ("pearson", "spearman")
FEWEST = 3
"""Layers over which a correlation can be other than 1 or -1."""
DIGITS = 12
"""Decimals of means that count: rounding must not rank layers that are alike."""


def layer_sweep(
    model: Model,
    records: Iterable[Record],
    *,
    layers: Sequence[int] | None = None,
    tokens: Sequence[str] = TOKENS,
    config: Mapping[str, Any] | None = None,
    others: Others = other_facts,
    progress: Progress = no_progress,
) -> pd.DataFrame:
    """Edit the same records by ROME at each layer and token: the rows of `evaluate`, one a record, behind `layer` and `fact_token`.

    A record that has no such token, as a subject of two tokens has none in the middle, is a row with its reason: tokens compare on the
    records that have them all. Key statistics that are not stored are gathered first, in one pass for all layers.

    Args:
        model: a hooked model without edits.
        records: CounterFact records.
        layers: 0-based; None for all.
        tokens: values of ROME's `fact_token`.
        config: ROME's other settings.
        others: as in `evaluate`.
        progress: told (records measured, records at all layers and tokens).

    Raises:
        PlanError: no records, layers or tokens.
        ConfigError: a layer, a token or a setting that cannot be.
        MomentError: no statistics of a layer's keys, and no text to gather them from.
    """
    settings = dict(config or {})
    chosen = list(range(models.n_layers(model)) if layers is None else layers)
    plans = [rome_config_for(model, {**settings, "layer": layer}) for layer in chosen]
    if plans and plans[0].moment == "statistics":
        gather_missing(model, chosen, tokens=plans[0].moment_tokens)
    grid: dict[str, Sequence[Any]] = {"layer": chosen, "fact_token": list(tokens)}
    return sweep_records(
        model, rome, records, grid, config=settings, others=others, progress=progress
    )


def by_layer(swept: pd.DataFrame) -> pd.DataFrame:
    """The means of `layer_sweep`'s rows in per cent, one row for each layer and token.

    Columns: `layer, fact_token`; ES, PS, NS, S and retention, each with its `..._margin`, half of the 95 % interval over records;
    `n` records measured, `n_retention` of them with other facts that were known, `failed` records without an edit, `protocol`.

    Raises:
        PlanError: numbers of several protocols, editors or settings.
    """
    _check(swept)
    rows = []
    for (layer, token), group in swept.groupby(PLACE, sort=False):
        means = table(group.drop(columns=PLACE)).iloc[0]
        parts = group.loc[group["reason"] == "", [*PARTS_OF_S]].to_numpy(float)
        margins = {"S_margin": 100 * harmonic_half_width(parts)}
        names = [name for score in SCORES for name in (score, f"{score}_margin")]
        values = {name: margins.get(name, means.get(name)) for name in names}
        counts = {name: means[name] for name in ("n", "n_retention", "failed", "protocol")}
        rows.append({"layer": layer, "fact_token": token, **values, **counts})
    return pd.DataFrame(rows)


def correlation(
    swept: pd.DataFrame,
    traced: Traced,
    *,
    fact_token: str = LAST_SUBJECT,
    window: int | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """How far, over layers, scores of edits at the last subject token go with the AIE of MLP windows there (Section 3.4).

    Columns: `score, method` ("pearson" or "spearman"), `r, low, high, n_layers, n_records, n_facts`. NaN where a score is the same at
    all layers.

    This is the paper's "strong correlations with the causal analysis": of two curves of means. It does not say that the layer to
    edit can be read off a trace. Hase et al. (2023, "Does Localization Inform Editing?") find that how strongly tracing places a
    fact at a layer says next to nothing of whether an edit of that fact succeeds at that layer, and that many layers where nothing is
    traced edit as well. Choose a layer by editing (`sweeps.best`).

    The 95 % interval is over records and over facts, each drawn again by itself, since those are what was sampled. Layers are not: a
    model has no others, and neighbours share most of their window and their residual stream, so that drawing them as if they were
    independent would count one layer many times. Noise in the means pulls a correlation towards 0, and a resample's twice, so the
    interval is the bootstrap's basic one, which is reflected about r; that of the resamples themselves lies too low. Ranks jump, so
    Spearman's is too short: with 8 layers it covered the truth in 73 to 81 % of simulations, and Pearson's in 90 to 96 %.

    Args:
        swept: rows of `layer_sweep`.
        traced: a trace of MLP windows at the same layers, such as `read_run(folder).main`; its facts need not be the records'.
        fact_token: of which edits.
        window: width of the MLP windows; None for the first there is.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        PlanError: no such token or window, fewer than three layers in common, or fewer than two records or facts.
    """
    _check(swept)
    scores, effects = _by_record(swept, fact_token), _by_fact(traced, window)
    layers = sorted(set(effects.columns) & set(scores["ES"].columns))
    if len(layers) < FEWEST:
        raise PlanError(
            f"edits and trace have {len(layers)} layers in common, and a correlation needs {FEWEST}; sweep and trace the same ones"
        )
    draws = np.random.default_rng(seed)
    records = _weights(len(scores["ES"]), "records", resamples, draws)
    aie = _means(effects[layers], _weights(len(effects), "facts", resamples, draws))
    means = {name: _means(each[layers], records) for name, each in scores.items()}
    means["S"] = _harmonic(np.stack([means[name] for name in PARTS_OF_S]))
    counts = {"n_layers": len(layers), "n_records": len(scores["ES"]), "n_facts": len(effects)}
    return pd.DataFrame(
        [
            {"score": score, "method": method, **_estimate(method, means[score], aie), **counts}
            for score in SCORES
            for method in METHODS
        ]
    )


# -- tables of records and of facts ----------------------------------------------------------------


def _check(swept: pd.DataFrame) -> None:
    if missing := [name for name in (*PLACE, "case_id", "reason", "protocol") if name not in swept]:
        raise PlanError(
            f"the frame has no column {', '.join(missing)}; layer_sweep makes one that has"
        )
    if (protocols := swept["protocol"].nunique()) != 1:
        raise PlanError(f"the frame has numbers of {protocols} protocols, which do not compare")
    if (twice := swept.duplicated([*PLACE, "case_id"])).any():
        row = swept[twice].iloc[0]
        raise PlanError(
            f"record {row['case_id']} is there twice at layer {row['layer']}, {row['fact_token']}: choose one editor, and one value of "
            "each other setting"
        )


def _by_record(swept: pd.DataFrame, fact_token: str) -> dict[str, pd.DataFrame]:
    """Of each score that is a mean, records x layers; NaN where there is no edit."""
    rows = swept[swept["fact_token"] == fact_token]
    if rows.empty:
        found = ", ".join(dict.fromkeys(swept["fact_token"]))
        raise PlanError(f"no edits at the token {fact_token}; there are some at {found}")
    rows = rows[rows["reason"] == ""]
    scores = [score for score in SCORES if score != "S"]
    return {name: rows.pivot(index="case_id", columns="layer", values=name) for name in scores}


def _by_fact(traced: Traced, window: int | None) -> pd.DataFrame:
    """Effects of MLP windows at the last subject token, facts x layers."""
    frame = traced.frame if isinstance(traced, Trace) else traced
    frame = frame[(frame["kind"] == "mlp") & (frame["severed"] == "none")]
    widths = list(dict.fromkeys(frame["window"]))
    if not widths or (window is not None and window not in widths):
        wanted = "" if window is None else f" of width {window}"
        found = ", ".join(map(str, widths)) or "none"
        raise PlanError(f"the trace has no MLP windows{wanted}; it has {found}")
    frame = frame[frame["window"] == (widths[0] if window is None else window)]
    found = fact_effects(frame, ("layer", "role")).xs("last subject", level="role").T
    return found.dropna(how="all")


# -- the bootstrap ---------------------------------------------------------------------------------


def _weights(
    count: int, what: str, resamples: int, draws: np.random.Generator
) -> Float[np.ndarray, "draw unit"]:
    """How often each of `count` is drawn: first all of them once, then each resample."""
    if count < 2 or resamples < 2:
        raise PlanError(
            f"an interval needs two {what} and two resamples, and better hundreds, not {count} and {resamples}"
        )
    drawn = draws.multinomial(count, np.full(count, 1 / count), size=resamples)
    return np.concatenate([np.ones((1, count)), drawn])


def _means(
    values: pd.DataFrame, weights: Float[np.ndarray, "draw unit"]
) -> Float[np.ndarray, "draw layer"]:
    """The mean of each layer in each draw, over the units that have a value there."""
    held = values.to_numpy(float)
    there = ~np.isnan(held)
    with np.errstate(invalid="ignore"):
        return (weights @ np.where(there, held, 0.0)) / (weights @ there)


def _harmonic(means: Float[np.ndarray, "part draw layer"]) -> Float[np.ndarray, "draw layer"]:
    """S of each draw and layer."""
    with np.errstate(divide="ignore"):
        return len(means) / (1 / means).sum(axis=0)


def _estimate(
    method: str, score: Float[np.ndarray, "draw layer"], aie: Float[np.ndarray, "draw layer"]
) -> dict[str, float]:
    """r of the first draw, which is the whole, and its interval from the others."""
    curves = [score.round(DIGITS), aie.round(DIGITS)]
    if method == "spearman":
        curves = [rankdata(each, axis=1) for each in curves]
    whole, *rest = _pearson(*curves)
    low, high = _reflected(float(whole), np.array(rest))
    return {"r": float(whole), "low": low, "high": high}


def _pearson(
    one: Float[np.ndarray, "draw layer"], other: Float[np.ndarray, "draw layer"]
) -> Float[np.ndarray, " draw"]:
    """The correlation over layers in each draw; NaN where a curve is flat or has a gap."""
    away = [each - each.mean(axis=1, keepdims=True) for each in (one, other)]
    flat = (np.ptp(one, axis=1) == 0) | (np.ptp(other, axis=1) == 0)
    size = np.sqrt((away[0] ** 2).sum(axis=1) * (away[1] ** 2).sum(axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(flat, np.nan, (away[0] * away[1]).sum(axis=1) / size)


def _reflected(whole: float, drawn: Float[np.ndarray, " draw"]) -> tuple[float, float]:
    """The basic bootstrap interval: what the draws miss the whole's value by, the whole misses the truth by; it holds the whole."""
    drawn = drawn[~np.isnan(drawn)]
    if np.isnan(whole) or not len(drawn):
        return float("nan"), float("nan")
    low, high = 2 * whole - np.quantile(drawn, [(1 + LEVEL) / 2, (1 - LEVEL) / 2])
    return max(-1.0, min(float(low), whole)), min(1.0, max(float(high), whole))
