"""What a checkpoint knows, measured and written beside it."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import GPT2LMHeadModel

from factlens.atlas.books import FactBook
from factlens.atlas.card import card
from factlens.atlas.recipes import Recipe
from factlens.atlas.tables import Split, Statement, statements

SPLITS: tuple[Split, ...] = ("train", "held", "fresh")
NO_TOKEN = -100
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


def report(checkpoint: Checkpoint, examples: Iterable[str], recipe: Recipe) -> dict[str, Any]:
    """Statements known per relation and split, and what the subjects' tokens leave open."""
    rows: dict[str, dict[str, Any]] = {
        relation.name: {"facts": len(relation.facts)} for relation in recipe.world.relations
    }
    totals: dict[str, Any] = {"facts": sum(row["facts"] for row in rows.values())}
    for split in SPLITS:
        stated = list(statements(split, recipe.world))
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
        "examples": {prompt: continuation(checkpoint, prompt) for prompt in examples},
    }


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
    having: dict[tuple[str, int], Counter[str]] = {}
    for fact in book.facts:
        having.setdefault((fact.relation.name, ends[fact.subject]), Counter())[fact.object] += 1
    found = {}
    for fact in book.facts:
        alike = having[fact.relation.name, ends[fact.subject]]
        found[fact.relation.name, fact.subject.casefold()] = alike[fact.object] / alike.total()
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
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "card.md").write_text(card(report), encoding="utf-8")
