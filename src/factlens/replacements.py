"""Corruption without noise: the subject's embeddings give way to those of other names.

Symmetric token replacement (Zhang & Nanda, 2023) puts another subject of as many tokens in the subject's place, so that
the corrupted prompt is one the model could have read. Replacing each token by a random one of some other name needs no
name of equal length, and leaves nothing of the subject.
"""

import weakref
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from factlens import models, runs
from factlens.errors import FactError
from factlens.facts import Fact, bundled_facts
from factlens.models import Model
from factlens.types import Noise


@dataclass
class Names:
    """The bundled subjects as one tokenizer sees them, in sentences (after a space) or at their beginning."""

    ids: dict[str, list[int]] = field(default_factory=dict)
    objects: dict[tuple[str, str], set[str]] = field(default_factory=lambda: defaultdict(set))
    """(relation, subject) -> its objects."""

    def alike(self, fact: Fact, tokens: int) -> list[str]:
        """Names of `tokens` tokens to put in the subject's place: of the fact's relation, with other objects.

        Any other name where the relation has none, or is not a bundled one.
        """
        fitting = [n for n, ids in self.ids.items() if len(ids) == tokens and n != fact.subject]
        related = [
            name
            for name in fitting
            if (objects := self.objects.get((fact.relation or "", name)))
            and fact.object not in objects
        ]
        return related or fitting


_names: "weakref.WeakKeyDictionary[Model, dict[bool, Names]]" = weakref.WeakKeyDictionary()


def _names_of(model: Model, spaced: bool) -> Names:
    known = _names.setdefault(model, {})
    if spaced not in known:
        names, tokenizer = Names(), models.tokenizer(model)
        # As a name goes on a sentence: some tokenizers mark the start of a text as a word's, a space before it or not.
        lead = "a" if spaced else ""
        ahead = len(tokenizer(lead, add_special_tokens=False)["input_ids"]) if lead else 0
        for fact in bundled_facts("held", one_per_fact=True):
            if fact.subject not in names.ids:
                form = f"{lead} {fact.subject}" if spaced else fact.subject
                ids = tokenizer(form, add_special_tokens=False)["input_ids"]
                names.ids[fact.subject] = ids[ahead:]
            names.objects[fact.relation or "", fact.subject].add(str(fact.object))
        known[spaced] = names
    return known[spaced]


def swap_with(model: Model, ids: Tensor, subject: tuple[int, int], other: str) -> Noise:
    """The noise that turns the subject's embeddings into those of `other`: one sample, no randomness.

    Raises:
        FactError: `other` has another number of tokens, with and without a leading space.
    """
    begin, end = subject
    tokenizer = models.tokenizer(model)
    forms = [f" {other}", other] if begin else [other, f" {other}"]
    tried = [tokenizer(form, add_special_tokens=False)["input_ids"] for form in forms]
    fitting = [each for each in tried if len(each) == end - begin]
    if not fitting:
        raise FactError(
            f"the replacement {other!r} has {len(tried[0])} tokens and the subject {end - begin}; "
            "symmetric replacement needs a subject of the same length"
        )
    return _instead(model, ids, subject, torch.tensor(fitting[:1]))


def swap(
    model: Model, ids: Tensor, subject: tuple[int, int], fact: Fact, samples: int, seed: int
) -> Noise:
    """Other bundled subjects of equal length, one a sample; fewer samples where there are fewer such names.

    Raises:
        FactError: no bundled subject has as many tokens.
    """
    tokens = subject[1] - subject[0]
    names = _names_of(model, spaced=not fact.prompt.startswith(fact.subject))
    alike = names.alike(fact, tokens)
    if not alike:
        raise FactError(
            f"no bundled subject has {tokens} tokens, as {fact.subject!r} has; name one with "
            "noise='swap:<other subject>'"
        )
    chosen = np.random.default_rng(seed).permutation(len(alike))[:samples]
    others = torch.tensor([names.ids[alike[number]] for number in chosen])
    return _instead(model, ids, subject, others)


def replace_tokens(
    model: Model, ids: Tensor, subject: tuple[int, int], samples: int, seed: int
) -> Noise:
    """Each subject token becomes a random token of the bundled subjects, drawn anew for each sample."""
    names = _names_of(model, spaced=True)
    pool = np.array([token for each in names.ids.values() for token in each])
    drawn = np.random.default_rng(seed).choice(pool, (samples, subject[1] - subject[0]))
    return _instead(model, ids, subject, torch.from_numpy(drawn))


def _instead(
    model: Model, ids: Tensor, subject: tuple[int, int], others: Int[Tensor, "sample subject_pos"]
) -> Noise:
    """The difference of embeddings that added to the prompt's own gives those of `others`."""
    begin, end = subject
    swapped = ids.repeat(others.shape[0], 1)
    swapped[:, begin:end] = others.to(swapped.device)
    own, new = (runs.token_embeddings(model, each).double() for each in (ids, swapped))
    return (new - own)[:, begin:end].cpu()
