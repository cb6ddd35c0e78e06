"""Which engine runs: the one asked for, or for "auto" one-pass, unless it does not agree with plain on this model."""

import logging
import weakref
from dataclasses import dataclass, replace

import pandas as pd
import torch

from factlens import models
from factlens.engines.one_pass import run_one_pass
from factlens.engines.plain import run_plain
from factlens.engines.problems import Answers, Problem, Progress, is_out_of_memory, no_progress
from factlens.errors import OutOfMemory
from factlens.models import Model

log = logging.getLogger("factlens")

ENGINES = ("auto", "one-pass", "plain")
TOLERANCE = 1e-4
"""Largest difference in probability between the engines at which `auto` trusts one-pass in float32."""
TOLERANCE_NARROW = 5e-2
"""The same for narrower types, which round more with every change of the batch size."""

_probed: "weakref.WeakKeyDictionary[Model, str | None]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Run:
    """What an engine answered, which one it was, and why `auto` had to fall back to plain, if it did."""

    answers: Answers
    engine: str
    fallback_reason: str | None = None


def run_engine(
    model: Model,
    problem: Problem,
    engine: str = "auto",
    *,
    budget: int | None = None,
    progress: Progress = no_progress,
) -> Run:
    """Measure every cell of `problem`.

    Raises:
        OutOfMemory: not even the smallest pass fits.
    """
    others = sorted(set(problem.cells["kind"]) - {"state", "mlp", "attn"})
    reason = None
    if others:
        engine, reason = "plain", f"the sites {', '.join(others)} have no one-pass form"
    elif engine == "auto":
        reason = distrust(model, problem)
        engine = "one-pass" if reason is None else "plain"
        if reason is not None:
            log.warning("tracing with one forward pass per cell: %s", reason)
    try:
        if engine == "plain":
            return Run(run_plain(model, problem, progress=progress), engine, reason)
        return Run(run_one_pass(model, problem, progress=progress, budget=budget), engine)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"{models.model_name(model)} needs more memory than {models.device_of(model)} has for "
            f"{problem.noise.shape[0]} noise samples of {problem.tokens.shape[1]} tokens; use fewer samples, "
            "a narrower dtype, or another device"
        ) from error


def distrust(model: Model, problem: Problem) -> str | None:
    """Why one-pass cannot serve this model, or None: six cells are traced by both engines, once a model.

    A few forward passes buy that an architecture nobody has tried is either right or slow, never wrong.
    """
    if model not in _probed:
        _probed[model] = _probe(model, problem)
    return _probed[model]


def _probe(model: Model, problem: Problem) -> str | None:
    middle = models.n_layers(model) // 2
    cells = pd.DataFrame(
        [
            (0, kind, width, "none", middle, position)
            for kind, width in (("state", 1), ("mlp", 2), ("attn", 2))
            for position in (problem.subject[1] - 1, problem.tokens.shape[1] - problem.readout.keep)
        ],
        columns=["fact", "kind", "window", "severed", "layer", "position"],
    )
    probe = replace(problem, cells=cells)
    expected = run_plain(model, probe)
    try:
        found = run_one_pass(model, probe)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        line = str(error).split("\n")[0][:120]
        return f"the one-pass engine does not run on it ({type(error).__name__}: {line})"
    gap = float((found.restored[..., 0] - expected.restored[..., 0]).abs().max())
    wide = models.dtype_of(model) in (torch.float32, torch.float64)
    if gap <= (TOLERANCE if wide else TOLERANCE_NARROW):
        return None
    return f"the one-pass engine differs from the plain one by {gap:.1g}"
