"""Causal tracing (ROME, Section 2): facts and a plan in, the same plan with probabilities out."""

import logging
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch

from factlens import models, runs
from factlens.corruption import NoiseLevel, fact_seed, noise_for, noise_level
from factlens.engines.choosing import ENGINES, run_engine
from factlens.engines.problems import METRICS, SIGNS, Answers, Problem, Readout
from factlens.errors import FactError, FactWarning, PlanError, PromptTooLong
from factlens.facts import Fact
from factlens.fingerprints import provenance
from factlens.models import Model
from factlens.plans import KINDS, as_tuple, plan, plan_sites
from factlens.tokens import TokenizedPrompt, answer_ids, tokenize
from factlens.traces import Trace, concat

log = logging.getLogger("factlens")

FactProgress = Callable[[int, int, Fact], None]
"""Told (cells done, cells in all, the fact at work)."""


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """The arguments of `trace`, checked once for all facts."""

    kinds: tuple[str, ...]
    windows: tuple[int, ...]
    severed: tuple[str, ...]
    noise: str
    level: NoiseLevel
    samples: int
    seed: int
    metric: str
    answer: str | None
    foil: str | None
    sites: tuple[str, ...]
    include_embedding: bool
    prepend_bos: bool | None
    engine: str
    budget: int | None


def trace(
    model: Model,
    facts: Fact | str | Iterable[Fact],
    *,
    subject: str | None = None,
    kinds: str | Sequence[str] = KINDS,
    window: int | Sequence[int] | None = None,
    severed: str | Sequence[str] = "none",
    noise: str = "gaussian",
    noise_level: float | str | None = None,
    samples: int | None = None,
    seed: int = 0,
    metric: str = "prob",
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
        noise: "gaussian", "uniform", "rome" (the official code's draws), "replace:<other subject>".
        noise_level: a number; None for the model's own (`factlens.corruption.noise_level`); "facts" for 3 sigma over
            the subjects of the facts given.
        samples: noise draws per fact; None takes the model's config (10).
        metric: "prob", "logprob", "logit_diff" (with `foil=`), or "kl" (from the clean run's next-token distribution,
            in nats; its effects count what it falls); what `effect` is measured in.
        answer: the token to measure; None for the fact's object, or what the model ranks first. "whole" measures the
            product over all tokens of the object.
        sites: other hook points, such as "blocks.{l}.attn.hook_z", instead of `kinds`; one forward pass per cell.
        subject_at: which occurrence of the subject, from 0.
        include_embedding: also restore the embedding alone, the control for token identity.
        engine: "one-pass", "plain", or "auto": one-pass, unless it does not agree with plain on this model.
        budget: bytes that one pass may take; None for half of what is free.
        progress: called with (cells done, cells in all, fact).

    Raises:
        FactError, SubjectNotFound, PromptTooLong: a single fact that cannot be traced; of several, such facts are
            skipped, and `Trace.skipped` says why.
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
    defaults = models.trace_defaults(model)
    settings = _Settings(
        kinds=as_tuple(kinds),
        windows=as_tuple(window if window is not None else defaults.window),
        severed=as_tuple(severed),
        noise=noise,
        level=_level(model, noise, noise_level, wanted),
        samples=samples if samples is not None else defaults.samples,
        seed=seed,
        metric=metric,
        answer=answer,
        foil=foil,
        sites=as_tuple(sites) if sites is not None else (),
        include_embedding=include_embedding,
        prepend_bos=prepend_bos,
        engine=engine,
        budget=budget,
    )
    _check(settings)
    begun, about_model = time.perf_counter(), provenance(model)
    traces: list[Trace] = []
    skipped: list[tuple[str, str]] = []
    for fact in wanted:
        try:
            traced = _trace_one(model, fact, settings, subject_at, single, progress)
        except FactError as error:
            if single:
                raise
            skipped.append((fact.prompt, str(error)))
            log.info("skipped %r: %s", fact.prompt, error)
            continue
        traces.append(traced)
    if not traces:
        raise FactError(f"none of {len(wanted)} facts could be traced; the first: {skipped[0][1]}")
    result = concat(traces)
    engines = {each.info["engine"] for each in traces}
    return replace(
        result,
        info={
            **about_model,
            **_about(settings, samples=traces[0].info["samples"], subject_at=subject_at),
            "seconds": round(time.perf_counter() - begun, 3),
            "engine": engines.pop() if len(engines) == 1 else "mixed",
            "prefix_reuse": all(each.info["prefix_reuse"] for each in traces),
            "fallback_reason": next(
                (each.info["fallback_reason"] for each in traces if each.info["fallback_reason"]),
                None,
            ),
        },
        skipped=tuple(skipped),
    )


def _as_fact(facts: object, subject: str | None) -> Fact:
    if isinstance(facts, Fact):
        return facts if subject is None else replace(facts, subject=subject)
    if subject is None:
        raise FactError(
            f"the prompt {facts!r} comes without a subject; say subject='...', or give a Fact"
        )
    return Fact(str(facts), subject)


def _level(model: Model, noise: str, given: float | str | None, facts: list[Fact]) -> NoiseLevel:
    if noise.startswith("replace:"):
        return NoiseLevel(0.0, "not used: the subject's embeddings are replaced")
    return noise_level(model, given, [fact.subject for fact in facts])


def _check(settings: _Settings) -> None:
    """Refuse settings that do not exist, before any model is run."""
    for name, value, known in (
        ("metric", settings.metric, METRICS),
        ("engine", settings.engine, ENGINES),
    ):
        if value not in known:
            raise PlanError(f"no {name} {value!r}; there are {', '.join(known)}")
    if settings.samples < 1:
        raise PlanError(f"at least one noise sample is needed, not {settings.samples}")
    if settings.metric == "logit_diff" and settings.foil is None:
        raise PlanError("logit_diff compares the answer with another; say foil='...'")
    if settings.sites and settings.engine == "one-pass":
        raise PlanError(f"the sites {', '.join(settings.sites)} are traced by engine='plain' only")


def _trace_one(
    model: Model,
    fact: Fact,
    settings: _Settings,
    subject_at: int,
    single: bool,
    progress: FactProgress | None,
) -> Trace:
    prompt = tokenize(
        models.tokenizer(model),
        fact.prompt,
        fact.subject,
        subject_at=subject_at,
        prepend_bos=settings.prepend_bos,
        context=int(models.cfg(model).n_ctx),
    )
    if single and prompt.occurrences > 1:
        _warn(
            f"the subject {fact.subject!r} occurs {prompt.occurrences} times in {fact.prompt!r}; "
            f"occurrence {subject_at} is corrupted, subject_at= picks another"
        )
    if single and prompt.subject[1] == len(prompt.words):
        _warn(
            f"the prompt {fact.prompt!r} ends with its subject, so its last token is the last "
            "subject token too"
        )
    readout, text, note = _readout(model, fact, prompt, settings)
    if note is not None and not single:
        raise FactError(note)
    if note is not None:
        _warn(f"{note}; traced all the same")
    cells = _cells(model, prompt, settings)
    tokens = torch.cat([prompt.ids, readout.answer[None, :-1]], dim=1)
    if tokens.shape[1] > int(models.cfg(model).n_ctx):
        raise PromptTooLong(
            f"prompt and answer have {tokens.shape[1]} tokens and the model {models.cfg(model).n_ctx} positions"
        )
    seed = fact_seed(settings.seed, fact.prompt, fact.subject)
    noise = noise_for(
        model,
        prompt.ids,
        prompt.subject,
        rule=settings.noise,
        level=settings.level.value,
        samples=settings.samples,
        seed=seed,
    )
    problem = Problem(tokens, prompt.subject, noise, cells, readout)

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress(done, total, fact)

    run = run_engine(model, problem, settings.engine, budget=settings.budget, progress=tell)
    frame = _measured(cells, run.answers, settings.metric)
    info = {
        "engine": run.engine,
        "prefix_reuse": run.answers.prefix_reuse,
        "fallback_reason": run.fallback_reason,
        "metric": settings.metric,
        "samples": int(noise.shape[0]),
    }
    return Trace(frame, (fact,), (text,), (prompt.subject,), info)


def _warn(message: str) -> None:
    # Named from the user's own line: this function, _trace_one, trace.
    warnings.warn(message, FactWarning, stacklevel=4)


def _cells(model: Model, prompt: TokenizedPrompt, settings: _Settings) -> pd.DataFrame:
    depth = models.n_layers(model)
    if settings.sites:
        heads = _site_heads(model, prompt, settings.sites)
        return plan_sites(prompt, depth, settings.sites, heads, severed=settings.severed)
    return plan(
        prompt,
        depth,
        kinds=settings.kinds,
        windows=settings.windows,
        severed=settings.severed,
        include_embedding=settings.include_embedding,
    )


def _site_heads(model: Model, prompt: TokenizedPrompt, sites: Sequence[str]) -> dict[str, int]:
    """How many heads each site has, 0 for those without; refuses sites that are not one value per position.

    Raises:
        PlanError: no such hook point, or one whose second axis is not the position.
    """
    heads = {}
    for name in sites:
        try:
            first = name.format(l=0)
        except (KeyError, IndexError, ValueError):
            raise PlanError(
                f"the site {name!r} must say {{l}} for the layer, and nothing else"
            ) from None
        if not models.has_site(model, first):
            raise PlanError(
                f"this model has no hook point {first!r}; sites look like 'blocks.{{l}}.attn.hook_z'"
            )
        _, stored = runs.run_with_cache(model, prompt.ids, [first])
        shape = tuple(stored[first].shape) if first in stored else ()
        if len(shape) not in (3, 4) or shape[1] != prompt.ids.shape[1]:
            raise PlanError(
                f"{first} carries {shape or 'nothing'}; only sites with one value per position "
                "[row, pos, ...] can be traced"
            )
        heads[name] = shape[2] if len(shape) == 4 else 0
    return heads


def _readout(
    model: Model, fact: Fact, prompt: TokenizedPrompt, settings: _Settings
) -> tuple[Readout, str, str | None]:
    """What is measured: the given answer, else the object, else what the model ranks first.

    With it the answer as text, and what is to be said if the model does not rank the fact's object first.
    """
    tokenizer = models.tokenizer(model)
    top = int(runs.logits_of(model, prompt.ids, keep=1)[0, -1].argmax())
    whole = settings.answer == "whole"
    given = fact.object if whole or settings.answer is None else settings.answer
    if whole and given is None:
        raise FactError(f"answer='whole' needs the fact's object; {fact.prompt!r} has none")
    ids = [top] if given is None else answer_ids(tokenizer, fact.prompt, given)
    note = None
    if ids[0] != top and settings.answer in (None, "whole"):
        said = tokenizer.decode([top])
        note = f"the model continues {fact.prompt!r} with {said!r}, not with {given!r}"
    chosen = ids if whole else ids[:1]
    foil = None
    if settings.foil is not None:
        foil = answer_ids(tokenizer, fact.prompt, settings.foil)[0]
    text = tokenizer.decode(chosen) + ("…" if len(ids) > len(chosen) else "")
    answer, reference = torch.tensor(chosen), None
    if settings.metric == "kl":
        tokens = torch.cat([prompt.ids, answer[None, :-1]], dim=1)
        reference = runs.logits_of(model, tokens, keep=len(chosen))[0].float().log_softmax(-1)
    return Readout(answer, foil, reference), text, note


def _measured(cells: pd.DataFrame, answers: Answers, metric: str) -> pd.DataFrame:
    """The plan with its measurements: means over samples, and their spread."""
    restored = answers.restored.double()
    frame = cells.copy()
    for name in dict.fromkeys(("prob", metric)):
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


def _about(settings: _Settings, *, samples: int, subject_at: int) -> dict:
    """What was measured, as a reader of the trace needs to know it."""
    return {
        "noise": settings.noise,
        "noise_level": settings.level.value,
        "noise_source": settings.level.source,
        "samples": int(samples),
        "seed": int(settings.seed),
        "subject_at": subject_at,
        "prepend_bos": settings.prepend_bos,
        "include_embedding": settings.include_embedding,
        "metric": settings.metric,
        "answer": settings.answer,
        "foil": settings.foil,
    }
