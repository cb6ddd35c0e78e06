"""What a model knows: of a set of facts, those whose object it says by itself."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from factlens import models, runs
from factlens.engines.problems import Progress, no_progress
from factlens.errors import FactError, PlanError
from factlens.facts import Fact, bundled_facts
from factlens.models import Model
from factlens.tokens import answer_ids, token_ids, tokenize

RULES = ("whole", "first-token")
BATCH = 64


@dataclass(frozen=True)
class Knowledge:
    """Facts asked, and what became of each."""

    frame: pd.DataFrame
    """One row a fact: `prompt, subject, object, relation, known` (True or False), `reason` (empty if known), and
    `tokens`, the length of the prompt (0 where it was not asked)."""
    facts: tuple[Fact, ...]
    """The known ones."""

    @property
    def skipped(self) -> dict[str, int]:
        """How many facts fell to each reason."""
        reasons = self.frame.loc[~self.frame["known"], "reason"]
        return dict(Counter(reason.split(":")[0] for reason in reasons))

    def by_relation(self) -> pd.DataFrame:
        """`relation, asked, known, share` for each relation."""
        groups = self.frame.assign(relation=self.frame["relation"].fillna("")).groupby("relation")
        table = groups["known"].agg(asked="size", known="sum").reset_index()
        return table.assign(share=table["known"] / table["asked"])


def known_facts(
    model: Model,
    facts: Iterable[Fact] | None = None,
    *,
    known: str = "whole",
    prepend_bos: bool | None = None,
    progress: Progress = no_progress,
) -> list[Fact]:
    """The facts of which the model's greedy continuation spells the object (REFERENCE: "known fact").

    Args:
        model: a hooked model.
        facts: None asks the bundled ones, each in one sentence that atlas was not trained on.
        known: "whole": the whole object is spelled; "first-token": the official rule, which keeps only objects of
            one token.
        prepend_bos: force a start token in, or take it out.
        progress: told (facts asked, facts in all).

    Raises:
        PlanError: another rule.
        FactError: none is known.
    """
    asked = ask(model, facts, known=known, prepend_bos=prepend_bos, progress=progress)
    if not asked.facts:
        raise FactError(
            f"the model knows none of the {len(asked.frame)} facts ({asked.skipped}); give other facts"
        )
    return list(asked.facts)


def ask(
    model: Model,
    facts: Iterable[Fact] | None = None,
    *,
    known: str = "whole",
    prepend_bos: bool | None = None,
    progress: Progress = no_progress,
) -> Knowledge:
    """Ask for each fact's object by teacher forcing: greedy spells it if every token of it ranks first in its turn.

    Facts of one length share a forward pass, so nothing is padded.

    Raises:
        PlanError: another rule than "whole" or "first-token".
    """
    if known not in RULES:
        raise PlanError(f"no rule {known!r} for known facts; there are {', '.join(RULES)}")
    wanted = list(bundled_facts(one_per_fact=True) if facts is None else facts)
    reasons = [_unusable(model, fact) for fact in wanted]
    lengths = [0] * len(wanted)
    asked: list[tuple[int, list[int], list[int]]] = []
    tokenizer = models.tokenizer(model)
    for number, fact in enumerate(wanted):
        if reasons[number]:
            continue
        answer = answer_ids(tokenizer, fact.prompt, str(fact.object))
        ids = token_ids(tokenizer, fact.prompt, prepend_bos)
        lengths[number] = len(ids)
        if len(ids) + len(answer) - 1 > int(models.cfg(model).n_ctx):
            reasons[number] = "PromptTooLong: prompt and object do not fit the context"
            continue
        if known == "first-token" and len(answer) > 1:
            reasons[number] = "object of several tokens"
            continue
        asked.append((number, ids, answer))
    asked.sort(key=lambda each: (len(each[1]) + len(each[2]), len(each[2])))
    done = len(wanted) - len(asked)
    for batch in _batches(asked):
        for (number, _, _), said in zip(batch, _first_ranked(model, batch), strict=True):
            if not said:
                reasons[number] = "object not ranked first"
        done += len(batch)
        progress(done, len(wanted))
    frame = pd.DataFrame(
        {
            "prompt": [fact.prompt for fact in wanted],
            "subject": [fact.subject for fact in wanted],
            "object": [fact.object for fact in wanted],
            "relation": [fact.relation for fact in wanted],
            "known": [not reason for reason in reasons],
            "reason": reasons,
            "tokens": lengths,
        }
    )
    kept = tuple(fact for fact, reason in zip(wanted, reasons, strict=True) if not reason)
    return Knowledge(frame, kept)


def _unusable(model: Model, fact: Fact) -> str:
    if fact.object is None:
        return "no object given"
    try:
        tokenize(
            models.tokenizer(model), fact.prompt, fact.subject, context=int(models.cfg(model).n_ctx)
        )
    except FactError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _batches(
    asked: Sequence[tuple[int, list[int], list[int]]],
) -> Iterable[list[tuple[int, list[int], list[int]]]]:
    """Runs of facts with equally long prompts and equally long answers."""
    batch: list[tuple[int, list[int], list[int]]] = []
    for each in asked:
        same = not batch or [len(part) for part in batch[0][1:]] == [len(part) for part in each[1:]]
        if batch and (not same or len(batch) == BATCH):
            yield batch
            batch = []
        batch.append(each)
    if batch:
        yield batch


def _first_ranked(model: Model, batch: Sequence[tuple[int, list[int], list[int]]]) -> list[bool]:
    rows = torch.tensor([prompt + answer[:-1] for _, prompt, answer in batch])
    answers = torch.tensor([answer for _, _, answer in batch])
    logits = runs.logits_of(model, rows, keep=answers.shape[1])
    return (logits.argmax(dim=-1).cpu() == answers).all(dim=1).tolist()
