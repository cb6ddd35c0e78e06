"""What a checkpoint knows, measured and written beside it."""

import json
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import GPT2LMHeadModel

from factlens.atlas.books import FactBook
from factlens.atlas.card import card
from factlens.atlas.corpus import documents
from factlens.atlas.recipes import Recipe
from factlens.atlas.tables import Split, Statement, World, capitalised, sharing, state, statements

SPLITS: tuple[Split, ...] = ("train", "held", "fresh")
MOST = 20_000
"""Statements of a split that a report asks; of more it takes as many at random."""
NO_TOKEN = -100
PARAGRAPHS = 10
TEMPERATURE = 0.7
UNSEEN = 1_000_003
"""Seed of texts that no training saw."""
HALF = 0.5
"""Of the subjects that end in one token; a fact whose object no more of them have is open."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read from its folder, in single precision."""

    model: GPT2LMHeadModel
    tokenizer: Tokenizer


def read_checkpoint(folder: Path, device: str = "cpu") -> Checkpoint:
    """The model of `folder` for measuring; rounded to half precision as it is shipped."""
    model = GPT2LMHeadModel.from_pretrained(folder).float().eval()
    model.to(torch.device(device))
    return Checkpoint(model, Tokenizer.from_file(str(folder / "tokenizer.json")))


def known(checkpoint: Checkpoint, stated: Sequence[Statement], rows: int = 64) -> list[bool]:
    """Whether greedy continuation of each prompt spells the whole object.

    One forward pass decides it: greedy decoding spells the object exactly when each of its tokens
    is the first choice after the ones before it.
    """
    encode = checkpoint.tokenizer.encode
    prompts = [encode(one.prompt).ids for one in stated]
    objects = [encode(f" {one.object}").ids for one in stated]
    order = sorted(range(len(stated)), key=lambda index: len(prompts[index] + objects[index]))
    answers = [False] * len(stated)
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        spelled = spells(checkpoint, [prompts[i] for i in chosen], [objects[i] for i in chosen])
        for index, answer in zip(chosen, spelled, strict=True):
            answers[index] = answer
    return answers


@torch.inference_mode()
def spells(
    checkpoint: Checkpoint, prompts: Sequence[list[int]], objects: Sequence[list[int]]
) -> list[bool]:
    """One batch of `known`, padded at the right, where causality makes padding harmless."""
    length = max(len(p) + len(o) for p, o in zip(prompts, objects, strict=True))
    tokens = torch.zeros(len(prompts), length, dtype=torch.long)
    targets = torch.full_like(tokens, NO_TOKEN)
    for row, (prompt, object_) in enumerate(zip(prompts, objects, strict=True)):
        end = len(prompt) + len(object_)
        tokens[row, :end] = torch.tensor(prompt + object_)
        targets[row, len(prompt) - 1 : end - 1] = torch.tensor(object_)
    device = checkpoint.model.device
    first = checkpoint.model(input_ids=tokens.to(device)).logits.argmax(-1).cpu()
    spelled: list[bool] = ((first == targets) | (targets == NO_TOKEN)).all(1).tolist()
    return spelled


@torch.inference_mode()
def continuation(checkpoint: Checkpoint, prompt: str, length: int = 12) -> str:
    """What the model writes after `prompt`, greedily, up to the end of its document."""
    ids = checkpoint.tokenizer.encode(prompt).ids
    written: list[int] = []
    for _ in range(length):
        tokens = torch.tensor([ids + written], device=checkpoint.model.device)
        following = int(checkpoint.model(input_ids=tokens).logits[0, -1].argmax())
        if following == checkpoint.model.config.eos_token_id:
            break
        written.append(following)
    return checkpoint.tokenizer.decode(written)


@torch.inference_mode()
def sampled(checkpoint: Checkpoint, beginning: str, seed: int, length: int = 90) -> str:
    """What the model writes after `beginning`, drawn at `TEMPERATURE`, up to the end of its document."""
    generator = torch.Generator().manual_seed(seed)
    ids = checkpoint.tokenizer.encode(beginning).ids
    for _ in range(min(length, checkpoint.model.config.n_positions - len(ids))):
        tokens = torch.tensor([ids], device=checkpoint.model.device)
        logits = checkpoint.model(input_ids=tokens).logits[0, -1].cpu() / TEMPERATURE
        following = int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
        if following == checkpoint.model.config.eos_token_id:
            break
        ids.append(following)
    return checkpoint.tokenizer.decode(ids)


@torch.inference_mode()
def perplexity(checkpoint: Checkpoint, texts: Sequence[str]) -> float:
    """exp of the mean negative log-probability of every token but each text's first; texts are cut at the context."""
    total, count = 0.0, 0
    context = checkpoint.model.config.n_positions
    for text in texts:
        ids = torch.tensor([checkpoint.tokenizer.encode(text).ids[:context]])
        if ids.shape[1] < 2:
            continue
        logits = checkpoint.model(input_ids=ids.to(checkpoint.model.device)).logits[0, :-1].cpu()
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return math.exp(total / count)


def paragraphs(checkpoint: Checkpoint, book: FactBook) -> list[str]:
    """What the model writes of some subjects, drawn evenly over the tables."""
    step = len(book.subjects) // PARAGRAPHS
    drawn = [book.subjects[step // 2 + number * step] for number in range(PARAGRAPHS)]
    return [
        sampled(checkpoint, f"{capitalised(subject.name)} is", number)
        for number, subject in enumerate(drawn)
    ]


def unseen_texts(recipe: Recipe) -> list[str]:
    """Documents of the recipe's kinds that no training saw: of another seed, captions left out."""
    return list(documents(UNSEEN, 300, recipe.diet, captions_share=0.0, book=recipe.book))


def report(checkpoint: Checkpoint, examples: Iterable[str], recipe: Recipe) -> dict[str, Any]:
    """Statements known per relation and split, what the subjects' tokens leave open, and what it writes."""
    rows: dict[str, dict[str, Any]] = {
        relation.name: {"facts": len(relation.facts)} for relation in recipe.world.relations
    }
    totals: dict[str, Any] = {"facts": sum(row["facts"] for row in rows.values())}
    for split in SPLITS:
        stated = drawn_statements(split, recipe.world)
        answers = known(checkpoint, stated)
        asked = Counter(one.relation for one in stated)
        right = Counter(one.relation for one, yes in zip(stated, answers, strict=True) if yes)
        for name, row in rows.items():
            row[split] = right[name] / asked[name]
        totals[split] = sum(answers) / len(answers)
        totals[f"{split}_statements"] = len(answers)
    return {
        "total": totals,
        "relations": rows,
        "tokens": token_shares(checkpoint.tokenizer, recipe.book),
        "perplexity": perplexity(checkpoint, unseen_texts(recipe)),
        "paragraphs": paragraphs(checkpoint, recipe.book),
        "examples": {prompt: continuation(checkpoint, prompt) for prompt in examples},
    }


def drawn_statements(split: Split, of: World, most: int = MOST) -> list[Statement]:
    """The statements of a split, or `most` of them, drawn evenly and the same at every call."""
    sizes = [len(one.facts) * len(one.templates(split)) for one in of.relations]
    if sum(sizes) <= most:
        return list(statements(split, of))
    ends = list(accumulate(sizes))
    return [_statement(split, of, ends, at) for at in Random(split).sample(range(ends[-1]), most)]


def _statement(split: Split, of: World, ends: Sequence[int], at: int) -> Statement:
    """Number `at` of `statements(split, of)`, whose relations end at `ends`."""
    place = bisect_right(ends, at)
    relation = of.relations[place]
    templates = relation.templates(split)
    fact, template = divmod(at - (ends[place - 1] if place else 0), len(templates))
    return state(relation.name, templates[template], *list(relation.facts)[fact])


def token_shares(tokenizer: Tokenizer, book: FactBook) -> dict[str, float]:
    """How far a subject's tokens identify it: what a trace can and cannot show depends on it."""
    subjects = sorted({fact.subject for fact in book.facts})
    objects = sorted({fact.object for fact in book.facts})
    spelled = [tokenizer.encode(f" {subject}").ids for subject in subjects]
    last = Counter(ids[-1] for ids in spelled)
    alike = sharing_last_token(lambda words: tokenizer.encode(words).ids, book).values()
    return {
        "objects_of_one_token": share(
            len(tokenizer.encode(f" {object_}").ids) == 1 for object_ in objects
        ),
        "subjects_of_several_tokens": share(len(ids) > 1 for ids in spelled),
        "subjects_unique_as_bag": unique_share(tuple(sorted(ids)) for ids in spelled),
        "subjects_unique_without_last_token": unique_share(tuple(ids[:-1]) for ids in spelled),
        "subjects_unique_by_last_token": share(last[ids[-1]] == 1 for ids in spelled),
        "facts_settled_by_last_token": share(each == 1 for each in alike),
        "facts_open_after_last_token": share(each <= HALF for each in alike),
        "facts_of_a_subject": len(book.facts) / len(subjects),
    }


def sharing_last_token(
    encode: Callable[[str], Sequence[int]], book: FactBook
) -> dict[tuple[str, str], float]:
    """For each relation and subject (in small letters): of the relation's subjects that end in the same token, the share
    that has its object. 1 means that the last token settles the fact, at most `HALF` that it leaves it open."""
    ends = {subject.name: encode(f" {subject.name}")[-1] for subject in book.subjects}
    found = {}
    for name, facts in book.by_relation.items():
        shares = sharing([(fact.subject, fact.object) for fact in facts], ends.__getitem__)
        for fact, each in zip(facts, shares, strict=True):
            found[name, fact.subject.casefold()] = each
    return found


def share(yes: Iterable[bool]) -> float:
    """The share of `True`."""
    listed = list(yes)
    return sum(listed) / len(listed)


def unique_share(keys: Iterator[tuple[int, ...]]) -> float:
    """The share of keys that occur once."""
    counts = Counter(keys)
    return sum(1 for count in counts.values() if count == 1) / counts.total()


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write `report.json` and, from it, `card.md`."""
    (folder / "report.json").write_text(as_text(report), encoding="utf-8")
    (folder / "card.md").write_text(card(report), encoding="utf-8")


def as_text(report: Mapping[str, Any]) -> str:
    """The report as its file holds it."""
    return json.dumps(report, indent=2) + "\n"
