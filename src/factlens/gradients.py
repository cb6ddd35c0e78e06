"""Gradients beside causal tracing: what a few backward passes say of the cells that tracing measures one by one.

*Integrated gradients* (ROME's Figure 16, its less informative comparison) follow p(answer) along the straight path from
the corrupted run's states at a layer to the clean run's. *Attribution patching* is the first-order estimate of every
cell's indirect effect from one forward and one backward pass. Both come as frames with the keys of a trace and
`attribution` in place of `effect`, and `rank_correlation` says how far they agree with the exact effects. Attribution
patching is the cheap one: a path of 20 steps through every layer takes longer than tracing all states does.

`transformer_lens.tools.analysis.attribution_patching` serves as a check in the tests and not here: it compares two
prompts of tokens and knows no noise on embeddings; its nodes are the embedding, heads and MLPs, not states or attention
outputs; it runs pairs one by one and returns their mean; and it exists for `TransformerBridge` only.
"""

import time
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from factlens import models
from factlens.derivatives import (
    differentiable,
    first_order,
    integrate,
    nodes_of,
    paths_of,
    summed,
)
from factlens.engines.problems import Progress, no_progress
from factlens.errors import FactError, PlanError
from factlens.facts import Fact
from factlens.models import Model
from factlens.patches import EMBEDDING
from factlens.plans import CELL, KINDS
from factlens.preparations import Asked, first_choices, prepare, tokenized
from factlens.settings import Settings, settings_for
from factlens.traces import Trace

BASELINES = ("corrupted", "zero")
BATCH = 64
"""Rows in one forward and backward pass: enough to fill a CPU, and about 3 GB of activations on GPT-2 XL."""


def integrated_gradients(
    model: Model,
    traced: Trace | Fact | Iterable[Fact],
    *,
    steps: int = 20,
    samples: int | None = None,
    baseline: str = "corrupted",
    layers: Sequence[int] | None = None,
    include_embedding: bool = True,
    noise: str | None = None,
    noise_level: float | str | None = None,
    seed: int | None = None,
    batch: int = BATCH,
    progress: Progress = no_progress,
) -> pd.DataFrame:
    """Integrated gradients of p(answer) with respect to the states of each layer (ROME, Figure 16).

    All positions of a layer go together from the baseline to the clean run; a state's attribution is its way times the
    mean gradient along it, averaged over noise samples. A layer's attributions therefore sum to
    `prob_clean - prob_baseline`, which is the total effect TE for the corrupted baseline, up to the error of the
    quadrature (Gauss-Legendre). That error can be read off the frame: with 20 steps it is mostly below 0.01, larger
    where p jumps; and larger from zero, since layer norm undoes the length of a state and much happens at the start.

    Args:
        model: from `load_model`, or your own `TransformerBridge` or `HookedTransformer`.
        traced: a `Trace`, whose facts, answers and noise are taken over, draw by draw; or facts.
        steps: points on the path.
        samples: noise draws, the first of the trace's; None for all of them (of facts, the model's config).
        baseline: "corrupted", or "zero": all states of the layer zero, and no noise.
        layers: blocks whose outputs are attributed to; None for all.
        include_embedding: also the token embeddings, as layer -1.
        noise: as in `trace`, as are the next two; only with facts, since a trace brings its own.
        batch: rows (samples x steps) in one pass; memory grows with it.
        progress: told (layers done, layers of all facts).

    Returns:
        The columns of a plan, of kind "state"; `prob_clean`; `prob_baseline`, of the run that goes on from the
        baseline's states; and `attribution`. `attrs["seconds"]` is the time it took.

    Raises:
        PlanError: an unknown baseline or layer, no steps, or a trace of something else than one token's probability.
        FactError: a fact that cannot be traced.
    """
    begun = time.perf_counter()
    if baseline not in BASELINES:
        raise PlanError(f"no baseline {baseline!r}; there are {', '.join(BASELINES)}")
    if steps < 1 or batch < 1:
        raise PlanError(f"steps and batch are numbers from 1 up, not {steps} and {batch}")
    chosen = _layers(model, layers, include_embedding)
    given = {"samples": samples, "noise": noise, "noise_level": noise_level, "seed": seed}
    asked, settings = _asked(
        model, traced, given, kinds=("state",), window=1, include_embedding=True
    )
    zero, frames = baseline == "zero", []
    with differentiable(model):
        for each, top in asked:
            problem = prepare(model, each, top, settings).problem
            cells = problem.cells.assign(fact=each.number)
            for path in paths_of(model, problem, chosen, zero=zero):
                found = integrate(model, problem, path, nodes_of(steps, zero=zero), batch)
                frames.append(cells[cells["layer"] == path.layer].assign(**found))
                progress(len(frames), len(asked) * len(chosen))
    return _timed(frames, begun)


def attribution_patching(
    model: Model,
    traced: Trace | Fact | Iterable[Fact],
    *,
    kinds: str | Sequence[str] | None = None,
    window: int | Sequence[int] | None = None,
    samples: int | None = None,
    include_embedding: bool = True,
    noise: str | None = None,
    noise_level: float | str | None = None,
    seed: int | None = None,
    progress: Progress = no_progress,
) -> pd.DataFrame:
    """The first-order estimate of every cell's indirect effect, from one forward and one backward pass per fact.

    An activation's attribution is (clean - corrupted) times the gradient of p(answer) on the corrupted run, averaged
    over noise samples: exact to first order in the noise for states and for windows of one layer. A wider window adds
    up its layers, which counts the paths between them twice: when tracing restores several MLPs, the upper ones no
    longer answer to the lower, while each gradient goes through all that lies above.

    Args:
        model: from `load_model`, or your own `TransformerBridge` or `HookedTransformer`.
        traced: a `Trace`, whose facts, answers, noise, kinds and windows are taken over; or facts.
        kinds: "state", "mlp", "attn"; None for the trace's, or all.
        window: widths in layers; None for the trace's, or the model's own.
        samples: noise draws, the first of the trace's; None for all of them (of facts, the model's config).
        include_embedding: also the token embeddings, as states of layer -1.
        noise: as in `trace`, as are the next two; only with facts, since a trace brings its own.
        progress: told (facts done, facts in all).

    Returns:
        The columns of a plan, and `attribution`. `attrs["seconds"]` is the time it took.

    Raises:
        PlanError: an unknown kind or an impossible window, or a trace of something else than one token's probability.
        FactError: a fact that cannot be traced.
    """
    begun = time.perf_counter()
    kinds, window = _kinds_and_window(traced, kinds, window)
    given = {"samples": samples, "noise": noise, "noise_level": noise_level, "seed": seed}
    asked, settings = _asked(
        model, traced, given, kinds=kinds, window=window, include_embedding=include_embedding
    )
    frames = []
    with differentiable(model):
        for each, top in asked:
            problem = prepare(model, each, top, settings).problem
            found = first_order(model, problem, settings.kinds)
            attribution = summed(problem.cells, found, models.n_layers(model))
            frames.append(problem.cells.assign(fact=each.number, attribution=attribution))
            progress(len(frames), len(asked))
    return _timed(frames, begun)


def rank_correlation(
    traced: pd.DataFrame, attributed: pd.DataFrame, by: Sequence[str] = ("kind",)
) -> pd.DataFrame:
    """Spearman's rho between exact `effect` and `attribution` over the cells of each fact, then its mean over facts.

    Cells before the subject are left out, whose effect is zero by causality, and so is the embedding.

    Args:
        traced: a trace's frame.
        attributed: what `integrated_gradients` or `attribution_patching` returned for it.
        by: columns whose values are ranked apart.

    Returns:
        `by`, `rho`, `se`, `low`, `high` (normal 95 % interval), `n_facts`. Facts whose effects or attributions are all
        equal have no rho and are not counted.

    Raises:
        PlanError: the two share no cell, or `by` names no column.
    """
    columns, keys = list(by), ["fact", *CELL]
    if not columns or not set(columns) <= set(traced):
        raise PlanError(f"by={columns} must name columns of the trace's frame, such as 'kind'")
    both = traced.merge(attributed[[*keys, "attribution"]], on=keys)
    both = both[(both["layer"] > EMBEDDING) & (both["role"] != "before subject")]
    if both.empty:
        raise PlanError("trace and attributions share no cell: other facts, kinds or windows")
    pairs = both.groupby([*columns, "fact"], sort=False)[["effect", "attribution"]]
    rho = pairs.corr("spearman")["effect"].xs("attribution", level=-1)
    stats = rho.groupby(level=columns, sort=False).agg(rho="mean", se="sem", n_facts="count")
    margin = 1.96 * stats["se"]
    stats = stats.assign(low=stats["rho"] - margin, high=stats["rho"] + margin).reset_index()
    return stats[[*columns, "rho", "se", "low", "high", "n_facts"]]


# -- what is differentiated ------------------------------------------------------------------------


DEFAULTS = {"noise": "gaussian", "noise_level": None, "seed": 0, "samples": None}
DEFAULTS |= {"subject_at": 0, "prepend_bos": None, "answer": None}
"""`trace`'s own, for facts that come without a trace."""


def _asked(
    model: Model, traced: Trace | Fact | Iterable[Fact], given: dict[str, Any], **cells: Any
) -> tuple[list[tuple[Asked, int]], Settings]:
    """Each fact's tokens with what the model ranks first, and the settings of the trace, or else the defaults.

    `given` are the arguments that change them, None for those that do not; `cells` what the plan is made of.
    """
    models.check_model(model)
    facts, about = _facts_and_options(traced, given)
    settings = settings_for(
        model,
        facts,
        severed="none",
        roles=None,
        metric="prob",
        sites=None,
        effect="indirect",
        foil=None,
        engine="auto",
        budget=None,
        **about,
        **cells,
    )
    asked = [tokenized(model, number, fact, settings) for number, fact in enumerate(facts)]
    return list(zip(asked, first_choices(model, asked), strict=True)), settings


def _facts_and_options(
    traced: Trace | Fact | Iterable[Fact], given: dict[str, Any]
) -> tuple[list[Fact], dict[str, Any]]:
    given = {name: value for name, value in given.items() if value is not None}
    if isinstance(traced, Trace):
        if given.keys() - {"samples"}:
            raise PlanError("a trace brings its own noise, level and seed; give them with facts")
        _check_measured(traced)
        own = {name: traced.info[name] for name in DEFAULTS}
        return list(traced.facts), {**own, **given}
    facts = [traced] if isinstance(traced, Fact) else list(traced)
    if not facts:
        raise FactError("no facts to attribute; give a trace or facts")
    if wrong := [each for each in facts if not isinstance(each, Fact)]:
        raise FactError(f"{wrong[0]!r} is no Fact; give a trace, or Fact(prompt, subject)")
    return facts, {**DEFAULTS, **given}


def _check_measured(traced: Trace) -> None:
    info = traced.info
    if (info["effect"], info["metric"]) != ("indirect", "prob") or info["answer"] == "whole":
        raise PlanError(
            "gradients estimate indirect effects on the probability of one token; this trace measured "
            f"{info['effect']} effects in {info['metric']}, with answer={info['answer']!r}"
        )


def _layers(model: Model, layers: Sequence[int] | None, include_embedding: bool) -> list[int]:
    depth = models.n_layers(model)
    chosen = list(range(depth)) if layers is None else sorted(set(layers))
    if wrong := [layer for layer in chosen if not 0 <= layer < depth]:
        raise PlanError(f"no layer {wrong[0]}; this model's are 0 to {depth - 1}")
    chosen = [EMBEDDING, *chosen] if include_embedding else chosen
    if not chosen:
        raise PlanError("no layers to attribute to; give some, or include_embedding=True")
    return chosen


def _kinds_and_window(
    traced: object, kinds: str | Sequence[str] | None, window: int | Sequence[int] | None
) -> tuple[str | Sequence[str], int | Sequence[int] | None]:
    """What was asked for, else what the trace holds, else all kinds and the model's own window."""
    if isinstance(traced, Trace):
        held = traced.frame[traced.frame["kind"].isin(KINDS)]
        kinds = kinds or list(held["kind"].unique())
        widths = [int(width) for width in held.loc[held["kind"] != "state", "window"].unique()]
        window = window if window is not None else (widths or None)
    return kinds or KINDS, window


def _timed(frames: list[pd.DataFrame], begun: float) -> pd.DataFrame:
    frame = pd.concat(frames, ignore_index=True)
    frame.attrs["seconds"] = time.perf_counter() - begun
    return frame
