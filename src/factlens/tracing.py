"""Causal tracing (ROME, Section 2): facts and a plan in, the same plan with probabilities out."""

import logging
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pandas as pd
import torch

from factlens import models
from factlens.engines.choosing import problems_together, run_engine
from factlens.engines.passes import TOGETHER
from factlens.engines.problems import METRICS, SIGNS, Answers
from factlens.errors import FactError, FactWarning, NothingTraced
from factlens.facts import Fact
from factlens.fingerprints import provenance
from factlens.models import Model
from factlens.plans import KINDS
from factlens.preparations import Asked, Prepared, first_choices, prepare, tokenized
from factlens.settings import Settings, settings_for
from factlens.traces import Trace, common_info, concat

log = logging.getLogger("factlens")

FactProgress = Callable[[int, int, Fact], None]
"""Told (cells done, cells in all, the fact at work)."""


def trace(
    model: Model,
    facts: Fact | str | Iterable[Fact],
    *,
    subject: str | None = None,
    kinds: str | Sequence[str] = KINDS,
    window: int | Sequence[int] | None = None,
    severed: str | Sequence[str] = "none",
    roles: str | Sequence[str] | None = None,
    effect: str = "indirect",
    noise: str = "gaussian",
    noise_level: float | str | None = None,
    samples: int | None = None,
    seed: int = 0,
    metric: str | Sequence[str] = "prob",
    answer: str | None = None,
    foil: str | None = None,
    sites: str | Sequence[str] | None = None,
    subject_at: int = 0,
    include_embedding: bool = True,
    prepend_bos: bool | None = None,
    engine: str = "auto",
    budget: int | None = None,
    progress: FactProgress | None = None,
) -> Trace:
    """Trace where a model keeps a fact: the indirect effect of every state, MLP and attention window.

    The subject's embeddings are corrupted with noise, one part of the network is returned to its clean value, and the
    answer's probability is measured: `effect = prob_restored - prob_corrupted` is the indirect effect IE, and
    `prob_clean - prob_corrupted` the total effect TE (ROME, Section 2.1).

    Args:
        model: from `load_model`, or your own `TransformerBridge` or `HookedTransformer`.
        facts: a `Fact`, a prompt (with `subject=`), or several facts.
        kinds: "state" (block outputs, and the embedding as layer -1), "mlp", "attn".
        window: width of MLP and attention windows in layers, one or several; None takes the model's own
            (`models.trace_defaults`): the paper's 10, or half the layers where 10 would be all of them.
        severed: "none", "mlp", "attn", "both": what is frozen at its corrupted value (ROME, Figure 3).
        roles: which tokens, such as "last subject" or "last" (`factlens.tokens.ROLES`); None for all.
        effect: "indirect" restores a part in the corrupted run; "direct" (ROME, footnote 5) holds it at its corrupted
            value in the clean run, and `prob_restored` is then what the other paths restore.
        noise: "gaussian", "uniform", "rome" (the official code's draws); "replace" (every subject token by a random
            one of other names); "swap" (symmetric replacement by other subjects of equal length, one a sample), or
            "swap:<other subject>".
        noise_level: a number; None for the model's own (`factlens.corruption.noise_level`), "2x" for a multiple of
            it; "facts" for 3 sigma over the subjects of the facts given.
        samples: noise draws per fact; None takes the model's config (10).
        metric: "prob", "logprob", "logit_diff" (with `foil=`), or "kl" (from the clean run's next-token distribution,
            in nats; its effects count what it falls). `effect` is measured in the first; further ones get their columns.
        answer: the token to measure; None for the fact's object, or what the model ranks first. "whole" measures the
            product over all tokens of the object.
        foil: the other word of "logit_diff"; "auto" for what the corrupted run says most instead of the answer.
        sites: other hook points, such as "blocks.{l}.attn.hook_z", instead of `kinds`; one forward pass per cell.
        subject_at: which occurrence of the subject, from 0.
        include_embedding: also restore the embedding alone, the control for token identity.
        engine: "one-pass", "plain", or "auto": one-pass, unless it does not agree with plain on this model.
        budget: bytes that one pass may take; None for half of what is free.
        progress: called with (cells done, cells in all, fact). Facts of one length share their passes.

    Raises:
        FactError, SubjectNotFound, PromptTooLong: a single fact that cannot be traced; of several, such facts are
            skipped, and `Trace.skipped` says why. `NothingTraced`: that is all of them.
        PlanError: something to trace that does not exist.
        ModelUnsupported: the model lacks hook points.
    """
    models.check_model(model)
    single = isinstance(facts, Fact | str)
    wanted: list[Fact] = [_as_fact(facts, subject)] if single else list(facts)  # type: ignore
    if not wanted:
        raise FactError("no facts to trace")
    if not single and subject is not None:
        raise FactError("subject= goes with one prompt; several facts bring their own subjects")
    if wrong := [each for each in wanted if not isinstance(each, Fact)]:
        raise FactError(f"{wrong[0]!r} is no Fact; give Fact(prompt, subject) for each of several")
    settings = settings_for(
        model,
        wanted,
        kinds=kinds,
        window=window,
        severed=severed,
        roles=roles,
        effect=effect,
        noise=noise,
        noise_level=noise_level,
        samples=samples,
        seed=seed,
        metric=metric,
        answer=answer,
        foil=foil,
        sites=sites,
        subject_at=subject_at,
        include_embedding=include_embedding,
        prepend_bos=prepend_bos,
        engine=engine,
        budget=budget,
    )
    begun, about = time.perf_counter(), {**provenance(model), **settings.about()}
    work = _Work(model, settings, single, progress)
    work.run(wanted)
    about["seconds"] = round(time.perf_counter() - begun, 3)
    skipped = tuple((wanted[n].prompt, reason) for n, reason in sorted(work.skipped.items()))
    if not work.traces:
        raise NothingTraced(
            f"none of {len(wanted)} facts could be traced; the first: {skipped[0][1]}", skipped
        )
    traces = [work.traces[number] for number in sorted(work.traces)]
    return replace(concat(traces), info={**about, **common_info(traces)}, skipped=skipped)


def _as_fact(facts: object, subject: str | None) -> Fact:
    if isinstance(facts, Fact):
        return facts if subject is None else replace(facts, subject=subject)
    if subject is None:
        raise FactError(
            f"the prompt {facts!r} comes without a subject; say subject='...', or give a Fact"
        )
    return Fact(str(facts), subject)


class _Work:
    """One call of `trace` while it runs: what is traced, what was skipped, how far it has come."""

    def __init__(
        self, model: Model, settings: Settings, single: bool, progress: FactProgress | None
    ) -> None:
        self.model, self.settings, self.single, self.progress = model, settings, single, progress
        self.traces: dict[int, Trace] = {}
        self.skipped: dict[int, str] = {}
        self.done = self.total = 0

    def run(self, facts: Sequence[Fact]) -> None:
        """Trace `facts`, those of one length together, and skip those that cannot be (a single one raises)."""
        asked, self.total = [], len(facts)
        for number, fact in enumerate(facts):
            with self._skipping(number, fact):
                asked.append(tokenized(self.model, number, fact, self.settings))
        if self.single:
            _warn_of(asked[0], self.settings)
        tops = first_choices(self.model, asked)
        by_length = sorted(
            zip(asked, tops, strict=True), key=lambda each: each[0].prompt.ids.shape[1]
        )
        # A few at a time: plans and noise of a thousand facts of a large model would fill gigabytes.
        for begin in range(0, len(by_length), TOGETHER):
            self._run_some(by_length[begin : begin + TOGETHER])

    def _run_some(self, chosen: Sequence[tuple[Asked, int]]) -> None:
        by_shape: dict[tuple, list[Prepared]] = defaultdict(list)
        for asked, top in chosen:
            with self._skipping(asked.number, asked.fact):
                ready = prepare(self.model, asked, top, self.settings)
                if ready.note is not None and not self.single:
                    raise FactError(ready.note)
                if ready.note is not None:
                    _warn(f"{ready.note}; traced all the same")
                by_shape[ready.problem.shape].append(ready)
        for group in by_shape.values():
            size = problems_together(self.model, group[0].problem, self.settings.budget)
            for begin in range(0, len(group), size):
                self._trace_batch(group[begin : begin + size])

    def _trace_batch(self, batch: Sequence[Prepared]) -> None:
        def tell(done: int, total: int) -> None:
            if self.progress is not None:
                # In cells of this batch, as if all facts had as many.
                cells = total // len(batch)
                self.progress(self.done * cells + done, self.total * cells, batch[0].asked.fact)

        problems = [each.problem for each in batch]
        settings = self.settings
        found = run_engine(
            self.model, problems, settings.engine, budget=settings.budget, progress=tell
        )
        for ready, run in zip(batch, found, strict=True):
            asked, problem = ready.asked, ready.problem
            info = {
                "engine": run.engine,
                "prefix_reuse": run.answers.prefix_reuse,
                "fallback_reason": run.fallback_reason,
                "metric": settings.metric,
                "samples": int(problem.noise.shape[0]),
            }
            frame = _measured(problem.cells, run.answers, settings.metrics)
            self.traces[asked.number] = Trace(
                frame,
                (asked.fact,),
                (ready.answer,),
                (asked.prompt.subject,),
                (len(asked.prompt.words),),
                info,
            )
        self.done += len(batch)

    @contextmanager
    def _skipping(self, number: int, fact: Fact) -> Iterator[None]:
        """Skip a fact that cannot be traced, with its reason; if it is the only one, let the error go on."""
        try:
            yield
        except FactError as error:
            if self.single:
                raise
            self.skipped[number] = str(error)
            self.done += 1
            log.info("skipped %r: %s", fact.prompt, error)


def _warn_of(asked: Asked, settings: Settings) -> None:
    """What is worth saying of a single fact's tokens."""
    fact, prompt = asked.fact, asked.prompt
    if prompt.occurrences > 1:
        _warn(
            f"the subject {fact.subject!r} occurs {prompt.occurrences} times in {fact.prompt!r}; "
            f"occurrence {settings.subject_at} is corrupted, subject_at= picks another"
        )
    if prompt.subject[1] == len(prompt.words):
        _warn(
            f"the prompt {fact.prompt!r} ends with its subject, so its last token is the last "
            "subject token too"
        )


def _warn(message: str) -> None:
    # Named from the user's own line: this function, one or two of ours, run, trace.
    warnings.warn(message, FactWarning, stacklevel=5)


def _measured(cells: pd.DataFrame, answers: Answers, metrics: Sequence[str]) -> pd.DataFrame:
    """The plan with its measurements: means over samples, and their spread."""
    restored, metric = answers.restored.double(), metrics[0]
    frame = cells.copy()
    for name in dict.fromkeys(("prob", *metrics)):
        at = METRICS.index(name)
        frame[f"{name}_clean"] = float(answers.clean[at])
        frame[f"{name}_corrupted"] = float(answers.corrupted[:, at].double().mean())
        frame[f"{name}_restored"] = restored[:, :, at].mean(dim=1).numpy()
    chosen = restored[:, :, METRICS.index(metric)]
    spread = chosen.std(dim=1) if chosen.shape[1] > 1 else torch.zeros(len(cells))
    frame.insert(frame.columns.get_loc("prob_clean"), "sample_sd", spread.numpy())
    gain = frame[f"{metric}_restored"] - frame[f"{metric}_corrupted"]
    frame["effect"] = SIGNS.get(metric, 1.0) * gain
    return frame
