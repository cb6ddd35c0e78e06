"""From a fact to the problem that an engine solves: its tokens, its cells, its noise, and what is read."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from einops import repeat

from factlens import models, runs
from factlens.corruption import noise_for, spread
from factlens.engines.problems import Problem, Readout
from factlens.errors import FactError, PlanError, PromptTooLong
from factlens.facts import Fact
from factlens.models import Model
from factlens.patches import corrupt
from factlens.plans import plan, plan_sites
from factlens.settings import Settings
from factlens.tokens import TokenizedPrompt, answer_ids, tokenize
from factlens.types import Noise

BATCH = 64
"""Prompts whose first choices are asked for together."""


@dataclass(frozen=True)
class Asked:
    """A fact with its tokens; `number` is its place among the facts given."""

    number: int
    fact: Fact
    prompt: TokenizedPrompt


@dataclass(frozen=True)
class Prepared:
    """A fact ready to be traced."""

    asked: Asked
    problem: Problem
    answer: str
    """What is measured, as text."""
    note: str | None
    """What is to be said if the model does not rank the fact's object first."""


def tokenized(model: Model, number: int, fact: Fact, settings: Settings) -> Asked:
    """The fact's tokens.

    Raises:
        FactError, SubjectNotFound, PromptTooLong: it cannot be traced.
    """
    prompt = tokenize(
        models.tokenizer(model),
        fact.prompt,
        fact.subject,
        subject_at=settings.subject_at,
        prepend_bos=settings.prepend_bos,
        context=int(models.cfg(model).n_ctx),
    )
    return Asked(number, fact, prompt)


def first_choices(model: Model, asked: Sequence[Asked]) -> list[int]:
    """The token that the model ranks first after each prompt; prompts of one length go together."""
    found: dict[int, int] = {}
    by_length: dict[int, list[int]] = {}
    for place, each in enumerate(asked):
        by_length.setdefault(each.prompt.ids.shape[1], []).append(place)
    for places in by_length.values():
        for begin in range(0, len(places), BATCH):
            some = places[begin : begin + BATCH]
            ids = torch.cat([asked[place].prompt.ids for place in some])
            tops = runs.logits_of(model, ids, keep=1)[:, -1].argmax(dim=-1).tolist()
            found |= dict(zip(some, tops, strict=True))
    return [found[place] for place in range(len(asked))]


def prepare(model: Model, asked: Asked, top: int, settings: Settings) -> Prepared:
    """The problem of one fact; `top` is what the model ranks first.

    Raises:
        FactError: no cell to trace, no object where one is needed, or no subject to swap in.
        PlanError: sites that do not exist.
        PromptTooLong: prompt and answer together.
    """
    fact, prompt = asked.fact, asked.prompt
    answer, more = _answer(model, fact, top, settings)
    note = None
    if settings.answer in (None, "whole") and answer[0] != top:
        said = models.tokenizer(model).decode([top])
        note = f"the model continues {fact.prompt!r} with {said!r}, not with {fact.object!r}"
    tokens = torch.cat([prompt.ids, torch.tensor([answer[:-1]], dtype=torch.long)], dim=1)
    if tokens.shape[1] > int(models.cfg(model).n_ctx):
        raise PromptTooLong(
            f"prompt and answer have {tokens.shape[1]} tokens and the model {models.cfg(model).n_ctx} positions"
        )
    noise = noise_for(
        model,
        prompt.ids,
        prompt.subject,
        fact,
        rule=settings.noise,
        level=settings.level.value,
        samples=settings.samples,
        seed=settings.seed,
    )
    readout = Readout(
        torch.tensor(answer),
        _foil(model, asked, answer[0], noise, settings),
        _reference(model, tokens, len(answer)) if "kl" in settings.metrics else None,
    )
    direct = settings.effect == "direct"
    cells = cells_of(model, prompt, settings)
    problem = Problem(tokens, prompt.subject, noise, cells, readout, direct)
    text = models.tokenizer(model).decode(answer) + ("…" if more else "")
    return Prepared(asked, problem, text, note)


def _answer(model: Model, fact: Fact, top: int, settings: Settings) -> tuple[list[int], bool]:
    """The tokens to measure: the given answer's, else the object's, else the first choice; and if there were more."""
    whole = settings.answer == "whole"
    given = fact.object if whole or settings.answer is None else settings.answer
    if whole and given is None:
        raise FactError(f"answer='whole' needs the fact's object; {fact.prompt!r} has none")
    if given is None:
        return [top], False
    ids = answer_ids(models.tokenizer(model), fact.prompt, given)
    return (ids, False) if whole else (ids[:1], len(ids) > 1)


def _foil(model: Model, asked: Asked, answer: int, noise: Noise, settings: Settings) -> int | None:
    """The token that the answer is compared with; "auto" is what the corrupted runs say most instead of it."""
    if settings.foil is None:
        return None
    if settings.foil != "auto":
        return answer_ids(models.tokenizer(model), asked.fact.prompt, settings.foil)[0]
    ids, subject = asked.prompt.ids, asked.prompt.subject
    rows = repeat(ids, "1 pos -> row pos", row=noise.shape[0])
    hooks = corrupt(spread(noise, subject, ids.shape[1], clean_rows=0))
    probs = runs.logits_of(model, rows, hooks, keep=1)[:, -1].float().softmax(dim=-1).mean(dim=0)
    probs[answer] = 0.0
    return int(probs.argmax())


def _reference(model: Model, tokens: torch.Tensor, keep: int) -> torch.Tensor:
    return runs.logits_of(model, tokens, keep=keep)[0].float().log_softmax(-1)


def cells_of(model: Model, prompt: TokenizedPrompt, settings: Settings) -> pd.DataFrame:
    """The plan of one prompt, cut to the roles asked for.

    Raises:
        FactError: no token of the prompt has such a role.
    """
    depth = models.n_layers(model)
    if settings.sites:
        heads = _site_heads(model, prompt, settings.sites)
        cells = plan_sites(prompt, depth, settings.sites, heads, severed=settings.severed)
    else:
        cells = plan(
            prompt,
            depth,
            kinds=settings.kinds,
            windows=settings.windows,
            severed=settings.severed,
            include_embedding=settings.include_embedding,
        )
    if not settings.roles:
        return cells
    kept = cells[cells["role"].isin(settings.roles)].reset_index(drop=True)
    if kept.empty:
        raise FactError(
            f"no token of {' '.join(prompt.words)!r} has the role {' or '.join(settings.roles)}"
        )
    return kept


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
