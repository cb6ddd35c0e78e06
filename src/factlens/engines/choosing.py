"""Which engine runs: the one asked for, or for "auto" one-pass, unless it does not agree with plain on this model."""

import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch

from factlens import models
from factlens.engines.one_pass import run_one_pass, run_together
from factlens.engines.passes import lines_of, lines_together
from factlens.engines.plain import run_plain
from factlens.engines.problems import Answers, Problem, Progress, is_out_of_memory, no_progress
from factlens.errors import OutOfMemory
from factlens.models import Model

log = logging.getLogger("factlens")

ENGINES = ("auto", "one-pass", "plain")
TOLERANCE = 1e-3
"""Largest difference in log-probability between the engines at which `auto` trusts one-pass in float32. Not in
probability: of an improbable answer that would tell nothing."""
TOLERANCE_NARROW = 0.3
"""The same for narrower types, which round more with every change of the batch size."""

_probed: "weakref.WeakKeyDictionary[Model, tuple[int, str | None]]" = weakref.WeakKeyDictionary()
"""For each model the longest prompt that was probed, and what was found."""


@dataclass(frozen=True)
class Run:
    """What an engine answered, which one it was, and why `auto` had to fall back to plain, if it did."""

    answers: Answers
    engine: str
    fallback_reason: str | None = None


def run_engine(
    model: Model,
    problems: Sequence[Problem],
    engine: str = "auto",
    *,
    budget: int | None = None,
    progress: Progress = no_progress,
) -> list[Run]:
    """Measure every cell of `problems`, which have one shape and share passes where the engine can.

    Raises:
        OutOfMemory: not even the smallest pass fits.
    """
    problem = problems[0]
    try:
        engine, reason = _choose(model, problem, engine)
        if engine == "plain":
            return [Run(each, engine, reason) for each in _plain(model, problems, progress)]
        together = run_together(model, problems, progress=progress, budget=budget)
        return [Run(each, engine) for each in together]
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"{models.model_name(model)} needs more memory than {models.device_of(model)} has for "
            f"{problem.noise.shape[0]} noise samples of {problem.tokens.shape[1]} tokens; use fewer samples, "
            "a narrower dtype, or another device"
        ) from error


def problems_together(model: Model, problem: Problem, budget: int | None = None) -> int:
    """How many problems like this one should share their passes."""
    length, samples, keep, _ = problem.shape
    lines = lines_of(problem.cells, models.n_layers(model))
    return lines_together(model, lines, length, samples, keep, budget)


def _plain(model: Model, problems: Sequence[Problem], progress: Progress) -> list[Answers]:
    total, found, before = sum(len(problem.cells) for problem in problems), [], 0
    for problem in problems:

        def tell(done: int, _: int, before: int = before) -> None:
            progress(before + done, total)

        found.append(run_plain(model, problem, progress=tell))
        before += len(problem.cells)
    return found


def _choose(model: Model, problem: Problem, engine: str) -> tuple[str, str | None]:
    others = sorted(set(problem.cells["kind"]) - {"state", "mlp", "attn"})
    if others:
        return "plain", f"the sites {', '.join(others)} have no one-pass form"
    if engine != "auto":
        return engine, None
    reason = distrust(model, problem)
    if reason is not None:
        log.warning("tracing with one forward pass per cell: %s", reason)
    return ("one-pass" if reason is None else "plain"), reason


def distrust(model: Model, problem: Problem) -> str | None:
    """Why one-pass cannot serve this model, or None: a few cells are traced by both engines.

    Once for each model, and again for a prompt longer than any before, which may reach beyond a sliding window. A few
    forward passes buy that an architecture nobody has tried is either right or slow, never wrong.
    """
    length = int(problem.tokens.shape[1])
    probed, reason = _probed.get(model, (0, None))
    if reason is None and length > probed:
        reason = _probe(model, problem)
        _probed[model] = (length, reason)
    return reason


def _probe(model: Model, problem: Problem) -> str | None:
    middle = models.n_layers(model) // 2
    subject, last = problem.subject[1] - 1, problem.tokens.shape[1] - problem.readout.keep
    cells = pd.DataFrame(
        [
            (0, kind, width, "none", middle, position)
            for kind, width in (("state", 1), ("mlp", 2), ("attn", 2))
            for position in (subject, last)
        ]
        + [(0, "state", 1, "both", middle, subject), (0, "state", 1, "none", -1, subject)],
        columns=["fact", "kind", "window", "severed", "layer", "position"],
    )
    # Two samples are enough, and of another scale than none.
    noise = problem.noise[:2]
    probe = replace(problem, cells=cells, noise=noise if bool(noise.any()) else noise + 0.1)
    expected = run_plain(model, probe)
    try:
        found = run_one_pass(model, probe)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        line = str(error).split("\n")[0][:120]
        return f"the one-pass engine does not run on it ({type(error).__name__}: {line})"
    gap = float((found.restored[..., 1] - expected.restored[..., 1]).abs().max())
    wide = models.dtype_of(model) in (torch.float32, torch.float64)
    if gap <= (TOLERANCE if wide else TOLERANCE_NARROW):
        return None
    return f"the one-pass engine differs from the plain one by {gap:.1g} in log-probability"
