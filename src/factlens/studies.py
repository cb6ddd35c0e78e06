"""Studies: the named ways in which a run traces its facts, each an ordinary call of `trace` that anyone can repeat.

`main` and `severed` give the paper's Figures 2, 3 and 7 and take all facts. The others vary one thing each (the
corruption, the metric, the window, the effect, the method) on a part of the facts, to see whether the picture stays.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from factlens.corruption import WITHOUT_LEVEL
from factlens.errors import NothingTraced, PlanError
from factlens.facts import Fact
from factlens.gradients import attribution_patching, integrated_gradients
from factlens.models import Model
from factlens.plans import KINDS
from factlens.traces import Trace
from factlens.tracing import trace

GRADIENTS = ("integrated gradients", "attribution patching")
"""Studies that are no tracing, and their methods."""
WIDTHS = (1, 3, 5, 10)
TWO_SITES = ("last subject", "last")
"""The roles of the paper's two sites."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """One way of tracing, by name."""

    name: str
    about: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `trace`, or of the method's own function."""
    method: str = "trace"
    whole: bool = False
    """All facts of the run, not a part of them."""


NOISE_RULES = ("half the noise", "twice the noise", "uniform", "replace", "swap")
"""The studies that corrupt in another way than `main`."""


def studies(*, window: int, depth: int, base: Mapping[str, Any]) -> dict[str, Study]:
    """Every study by its name. `base` are the arguments of `trace` that all of them share.

    Args:
        window: the width of MLP and attention windows in `main`, in layers.
        depth: number of layers; wider windows than that are left out.
    """
    widths = [width for width in WIDTHS if width != window and width < depth]
    cuts = {"kinds": ["state"], "severed": ["mlp", "attn"], "roles": ["last subject"]}
    fewer = {"kinds": ["mlp", "attn"], "window": widths, "roles": list(TWO_SITES)}
    made = [
        Study(
            name="main",
            about="states, MLP and attention windows (Figures 2 and 7)",
            options={"kinds": ["state", "mlp", "attn"], "metric": ["prob", "logprob"]},
            whole=True,
        ),
        Study(
            name="severed",
            about="states at the last subject token with MLPs or attention severed (Figure 3)",
            options=cuts,
            whole=True,
        ),
        Study(name="half the noise", about="noise of half the level", options=_level(base, 0.5)),
        Study(name="twice the noise", about="noise of twice the level", options=_level(base, 2.0)),
        Study(
            name="uniform",
            about="uniform noise, as wide to each side as the Gaussian's level",
            options={"noise": "uniform"},
        ),
        Study(
            name="replace",
            about="each subject token replaced by a random one of other names",
            options={"noise": "replace"},
        ),
        Study(
            name="swap",
            about="symmetric token replacement: another subject of equal length",
            options={"noise": "swap"},
        ),
        Study(
            name="metrics",
            about="logit difference to what the corrupted run says, and KL from the clean run",
            options={"metric": ["logit_diff", "kl"], "foil": "auto"},
        ),
        Study(
            name="direct",
            about="the direct effect: a part held at its corrupted value in the clean run (footnote 5)",
            options={"effect": "direct"},
        ),
        Study(
            name="integrated gradients",
            about="integrated gradients from the corrupted states to the clean ones (Figure 16)",
            method="integrated gradients",
            options={"steps": 10, "samples": 2},
        ),
        Study(
            name="attribution patching",
            about="the first-order estimate of every effect, by one backward pass",
            method="attribution patching",
        ),
    ]
    if widths:
        made.append(Study(name="widths", about=f"windows of {widths} layers", options=fewer))
    return {study.name: study for study in made if not _repeats(study, base)}


def _repeats(study: Study, base: Mapping[str, Any]) -> bool:
    """Whether a study would be `main` once more, since the run itself corrupts as it does."""
    noise = base.get("noise", "gaussian")
    leveled = "noise_level" in study.options and noise.split(":")[0] in WITHOUT_LEVEL
    return leveled or study.options.get("noise") == noise


def _level(base: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """A multiple of the run's own noise level, which `base` states as a number."""
    level = base.get("noise_level")
    return {"noise_level": factor * level if isinstance(level, int | float) else f"{factor:g}x"}


def chosen(names: Sequence[str] | str, known: Mapping[str, Study]) -> list[Study]:
    """The studies called `names`: "all", "none" (only those of all facts), or some; `main` is always among them.

    Raises:
        PlanError: an unknown name.
    """
    wanted = [names] if isinstance(names, str) else list(names)
    if wrong := [name for name in wanted if name not in (*known, "all", "none")]:
        raise PlanError(f"no study {wrong[0]!r}; there are all, none, {', '.join(known)}")
    if "all" in wanted:
        return list(known.values())
    return [study for name, study in known.items() if study.whole or name in wanted]


@dataclass(frozen=True)
class Chunk:
    """Some facts of one study: what a worker is given, and what becomes one part of a run."""

    study: Study
    numbers: tuple[int, ...]
    """Of the facts, in the run."""
    facts: tuple[Fact, ...]
    base: Mapping[str, Any]


def do_chunk(model: Model, chunk: Chunk) -> Trace:
    """Trace the facts of a chunk. Facts that cannot be traced are in `skipped`, also if that is all of them."""
    options = {**chunk.base, **chunk.study.options}
    try:
        if chunk.study.method == "trace":
            traced = trace(model, chunk.facts, **options)
        else:
            traced = _attributed(model, chunk, options)
    except NothingTraced as error:
        traced = Trace(pd.DataFrame(), (), (), (), (), {}, error.skipped)
    return _numbered(traced, chunk)


def _numbered(traced: Trace, chunk: Chunk) -> Trace:
    """The trace with its facts' numbers in the run, in `info["numbers"]`."""
    numbers, left = [], list(zip(chunk.numbers, chunk.facts, strict=True))
    for fact in traced.facts:
        while left[0][1] != fact:
            left.pop(0)
        numbers.append(left.pop(0)[0])
    traced.info["numbers"] = numbers
    return traced


def _attributed(model: Model, chunk: Chunk, options: Mapping[str, Any]) -> Trace:
    """Gradients for the facts of a chunk, from the very noise that tracing them uses."""
    base = {**chunk.base, "kinds": "state", "roles": "last subject"}
    traced = trace(model, chunk.facts, **base)
    samples = min(options.get("samples") or traced.info["samples"], traced.info["samples"])
    if chunk.study.method == "integrated gradients":
        frame = integrated_gradients(model, traced, steps=options["steps"], samples=samples)
    else:
        frame = attribution_patching(model, traced, kinds=KINDS, window=options.get("window"))
    about = {
        "method": chunk.study.method,
        "method_samples": samples,
        "seconds": frame.attrs.pop("seconds"),
    }
    return replace(traced, frame=frame, info={**traced.info, **about})
