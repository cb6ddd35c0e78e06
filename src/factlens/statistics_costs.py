"""What gathering statistics costs: beforehand for a user, and measured for the benchmark."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import pandas as pd
import torch
from torch import Tensor

from factlens import models
from factlens import tokens as tokenization
from factlens.corpora import Corpus
from factlens.key_passes import (
    Rows,
    add_keys,
    batch_tokens,
    batches,
    check_layers,
    complete,
    empty_totals,
    memory_needed,
)
from factlens.key_statistics import context_of, extent_of
from factlens.models import Model

_SAMPLE = 200
"""Documents that are tokenised to tell how long they are."""


@dataclass(frozen=True)
class Estimate:
    """What a pass would take. A remote corpus is not fetched for this: what depends on its documents is None."""

    tokens: int | None
    documents: int | None
    tokens_per_second: float
    memory: int
    """Bytes of the totals and of what passes into them, beside the model."""
    disk: int
    """Bytes of the files."""

    @property
    def seconds(self) -> float | None:
        """At the measured speed."""
        return None if self.tokens is None else self.tokens / self.tokens_per_second


def estimate(
    model: Model,
    layers: Sequence[int],
    corpus: Corpus,
    *,
    tokens: int | str,
    shard: tuple[int, int] | None = None,
) -> Estimate:
    """What `gather` would take, from a short measurement: some documents' lengths, and one batch that is run.

    Raises:
        MomentError: an unknown layer or amount.
        OutOfMemory: the totals do not fit.
    """
    layers = check_layers(model, layers)
    extent, parts = extent_of(model, layers, tokens), shard[1] if shard else 1
    need, passing = memory_needed(model, layers)
    rows = _random_rows(model, batch_tokens(model)) if corpus.remote else _sample(model, corpus)
    speed = _speed(model, layers, rows)
    counted, documents = extent.tokens, extent.documents
    if not corpus.remote and rows:
        length = sum(map(len, rows)) / len(rows)
        counted = counted if counted is not None else round(length * int(documents or 0))
        documents = documents if documents is not None else round(counted / length)
        if len(rows) < _SAMPLE:  # That was all of it.
            documents = min(documents, len(rows))
            counted = min(counted, sum(map(len, rows)))
    return Estimate(
        tokens=None if counted is None else counted // parts,
        documents=None if documents is None else documents // parts,
        tokens_per_second=speed,
        memory=sum(need.values()) + passing,
        disk=sum(need.values()) // 2,
    )


def measure_throughput(model: Model, layers: Sequence[int], tokens: int) -> pd.DataFrame:
    """Tokens per second of one pass for all `layers` against one pass for each, over the same random token ids.

    Returns two rows with the columns `way` ("one pass", "one pass per layer"), `layers` (how many), `tokens`,
    `seconds`, `tokens_per_second` (each token counted once), `difference` (largest entry of the two ways' totals
    apart, relative to the largest entry).
    """
    layers = check_layers(model, layers)
    rows = _random_rows(model, tokens)
    _summed(model, layers, rows[:1])  # What is only done once.
    together, seconds = _timed(model, [layers], rows)
    apart, seconds_apart = _timed(model, [[layer] for layer in layers], rows)
    difference = max(
        float((together[each] - apart[each]).abs().max() / apart[each].abs().max())
        for each in layers
    )
    counted = sum(map(len, rows))
    ways = (("one pass", seconds), ("one pass per layer", seconds_apart))
    return pd.DataFrame(
        {
            "way": [way for way, _ in ways],
            "layers": len(layers),
            "tokens": counted,
            "seconds": [taken for _, taken in ways],
            "tokens_per_second": [counted / taken for _, taken in ways],
            "difference": difference,
        }
    )


def _timed(
    model: Model, groups: Sequence[Sequence[int]], rows: Rows
) -> tuple[dict[int, Tensor], float]:
    begun = time.perf_counter()
    found: dict[int, Tensor] = {}
    for group in groups:
        found |= _summed(model, group, rows)
    return found, time.perf_counter() - begun


def _summed(model: Model, layers: Sequence[int], rows: Rows) -> dict[int, Tensor]:
    totals = empty_totals(model, layers)
    for batch in batches(rows, batch_tokens(model)):
        add_keys(model, totals, batch)
    # Read back, so that a GPU has finished when the clock is read.
    return {layer: complete(total).cpu() for layer, total in totals.items()}


def _speed(model: Model, layers: Sequence[int], rows: Rows) -> float:
    batch = next(batches(rows, batch_tokens(model)), None) or [[0]]
    _summed(model, layers, batch[:1])
    begun = time.perf_counter()
    _summed(model, layers, batch)
    return sum(map(len, batch)) / (time.perf_counter() - begun)


def _sample(model: Model, corpus: Corpus) -> list[list[int]]:
    tokenizer = models.tokenizer(model)
    texts = islice(corpus.documents(0), _SAMPLE)
    rows = [tokenization.token_ids(tokenizer, text)[: context_of(model)] for text in texts]
    return [row for row in rows if row]


def _random_rows(model: Model, tokens: int) -> list[list[int]]:
    """About `tokens` token ids in rows of up to 128."""
    length = min(context_of(model), 128, tokens)
    generator = torch.Generator().manual_seed(0)
    shape = (max(1, tokens // length), length)
    size = int(models.cfg(model).d_vocab)
    return torch.randint(size, shape, generator=generator).tolist()
