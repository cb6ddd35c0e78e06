"""Texts that a prompt is put behind, so that key and value do not hang on one sentence (ROME, Eq. 3 and 4)."""

import weakref
from collections.abc import Sequence

import torch

from factlens import generation, models
from factlens.fingerprints import remembered_fingerprint
from factlens.models import Model

TOP_K = 5
LENGTHS: dict[str, tuple[int, ...]] = {
    # The official code counts the start token; the paper's appendix gives sampled tokens.
    "rome": (4,) * 10 + (9,) * 10,
    "paper": tuple(2 + n % 9 for n in range(50)),
}
"""How many tokens are sampled for each context."""

_sampled: "weakref.WeakKeyDictionary[Model, dict]" = weakref.WeakKeyDictionary()


def contexts_for(model: Model, given: str | Sequence[str], seed: int = 0) -> tuple[str, ...]:
    """Templates with one `{}` for the prompt: "rome" is the bare prompt and 20 sampled prefixes, "paper" 50 of them.

    Sampled by the model itself from its start token, top-k 5, the same for the same seed (the official code draws anew in
    each process). Templates that are given are taken as they are.
    """
    if not isinstance(given, str):
        return tuple(given)
    key = (given, seed, remembered_fingerprint(model))
    known = _sampled.setdefault(model, {})
    if key not in known:
        known.clear()  # The model was edited: its own words are others now.
        known[key] = _sample(model, given, seed)
    return known[key]


def _sample(model: Model, kind: str, seed: int) -> tuple[str, ...]:
    tokenizer = models.tokenizer(model)
    lengths = LENGTHS[kind]
    texts: dict[int, str] = {}
    for number, new in enumerate(sorted(set(lengths))):
        rows = [row for row, length in enumerate(lengths) if length == new]
        start = torch.full((len(rows), 1), _start_id(tokenizer))
        ids = generation.sample(model, start, new, top_k=TOP_K, seed=seed + 1000 * number)
        for row, own in zip(rows, ids[:, 1:].tolist(), strict=True):
            texts[row] = tokenizer.decode(own, skip_special_tokens=True)
    prefixes = [_prefix(texts[row]) for row in range(len(lengths))]
    return (*(["{}"] if kind == "rome" else []), *(f"{text}. {{}}" for text in prefixes))


def _prefix(text: str) -> str:
    return text.replace("\n\n", " ").replace("{", "").replace("}", "")


def _start_id(tokenizer: object) -> int:
    """What stands before a text: the start token, else the token that ends the text before."""
    for name in ("bos_token_id", "eos_token_id"):
        if (found := getattr(tokenizer, name, None)) is not None:
            return int(found)
    return 0
