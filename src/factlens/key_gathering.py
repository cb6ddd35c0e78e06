"""One pass over a corpus for the keys of several layers, the same result whatever interrupts it.

Documents are tokenised as Hugging Face does, cut to the context, and run in batches of similar length. Unfinished work
is kept now and then, and gone on with.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from factlens import models
from factlens import tokens as tokenization
from factlens.corpora import Corpus
from factlens.engines.problems import Progress, is_out_of_memory
from factlens.errors import FactWarning, MomentError, OutOfMemory, OutputError
from factlens.key_passes import Rows, add_keys, batches, complete, empty_totals
from factlens.models import Model
from factlens.moment_store import Reached, name_of, read_partial, write_partial
from factlens.moments import KeyMoment

BLOCK = 8
"""Batches whose documents are sorted by length together."""
SHARE = 0.05
"""Largest share of the time that goes into writing unfinished passes."""


@dataclass(frozen=True)
class Extent:
    """How much of a corpus is read: whole documents up to this many tokens, or this many documents."""

    tokens: int | None = None
    documents: int | None = None

    def reached(self, reached: Reached) -> bool:
        """Whether no further document is wanted."""
        if self.tokens is not None:
            return reached.read_tokens >= self.tokens
        return reached.read >= int(self.documents or 0)

    def __str__(self) -> str:
        return f"{self.tokens}-tokens" if self.tokens is not None else f"{self.documents}-documents"


@dataclass(frozen=True)
class Pass:
    """What is gathered, from what; everything that its result depends on."""

    model: Model
    layers: Sequence[int]
    corpus: Corpus
    extent: Extent
    shard: tuple[int, int] | None
    context: int

    fingerprint: str

    @property
    def name(self) -> str:
        """What it is gathered over, as part of a file's name."""
        return name_of(self.corpus, str(self.extent), self.shard)

    def about(self) -> dict[str, Any]:
        """What a moment says of itself, but for its layer and how many documents there were."""
        return {
            "model": models.model_name(self.model),
            "fingerprint": self.fingerprint,
            "corpus": self.corpus.name,
            "digest": self.corpus.digest,
            "asked": str(self.extent),
            "context": self.context,
            "shards": [list(self.shard)] if self.shard else [],
            "dtype": str(models.dtype_of(self.model)).removeprefix("torch."),
        }


def gather_pass(
    wanted: Pass, partial: Path | None, progress: Progress, limit: int, save_every: float
) -> dict[int, KeyMoment]:
    """Gather the moments of a pass, going on from the file `partial` if one is there.

    Args:
        wanted: what to gather.
        partial: where unfinished work is kept; None keeps none.
        progress: told (tokens or documents read, how many in all).
        limit: tokens of a batch, padding included.
        save_every: seconds at least between two writings of `partial`.

    Raises:
        MomentError: a corpus without text, or keys that are not finite.
        OutOfMemory: the totals, or a batch, do not fit.
    """
    about = wanted.about()
    totals = empty_totals(wanted.model, wanted.layers)
    reached = Reached()
    if partial is not None:
        reached = read_partial(partial, totals, about)
    keep = _keeper(partial, totals, about, save_every)
    told = _told(wanted.extent, progress)
    told(reached)
    for rows, then in _blocks(wanted, reached, BLOCK * limit):
        _run_block(wanted.model, totals, rows, limit)
        reached = then
        keep(reached)
        told(reached)
    _check_result(wanted, totals, reached)
    about |= {"documents": reached.documents, "versions": _versions()}
    return {
        layer: KeyMoment(complete(total), reached.tokens, {**about, "layer": layer})
        for layer, total in totals.items()
    }


def _blocks(wanted: Pass, start: Reached, size: int) -> Iterator[tuple[list[list[int]], Reached]]:
    """Documents as token ids, about `size` tokens at a time, and how far that comes.

    Every shard counts the tokens of all documents, so that all of them end at the same one.
    """
    tokenizer = models.tokenizer(wanted.model)
    _hush(tokenizer)
    part, parts = wanted.shard or (1, 1)
    read, read_tokens, documents, tokens = (
        start.read,
        start.read_tokens,
        start.documents,
        start.tokens,
    )
    rows: list[list[int]] = []
    held = 0
    for text in wanted.corpus.documents(start.read):
        if wanted.extent.reached(Reached(read, read_tokens)):
            break
        mine = read % parts == part - 1
        counted = mine or wanted.extent.tokens is not None
        ids = tokenization.token_ids(tokenizer, text)[: wanted.context] if counted else []
        read, read_tokens = read + 1, read_tokens + len(ids)
        if mine:
            documents, tokens, held = documents + 1, tokens + len(ids), held + len(ids)
            rows += [ids] if ids else []
        if held >= size:
            yield rows, Reached(read, read_tokens, documents, tokens)
            rows, held = [], 0
    yield rows, Reached(read, read_tokens, documents, tokens)


def _run_block(model: Model, totals: dict[int, Tensor], rows: Rows, limit: int) -> None:
    try:
        for batch in batches(rows, limit):
            add_keys(model, totals, batch)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"a batch of {limit} tokens does not fit beside the totals on {models.device_of(model)}; use a smaller --batch"
        ) from error


def _keeper(
    partial: Path | None, totals: dict[int, Tensor], about: dict[str, Any], save_every: float
) -> Callable[[Reached], None]:
    """Writes an unfinished pass now and then: never more than `SHARE` of the time."""
    last, cost = time.monotonic(), 0.0

    def keep(reached: Reached) -> None:
        nonlocal last, cost, partial
        begun = time.monotonic()
        if partial is None or begun - last < max(save_every, cost / SHARE):
            return
        try:
            write_partial(partial, totals, reached, about)
        except OutputError as error:
            warnings.warn(
                f"{error}; an interrupted pass will begin again", FactWarning, stacklevel=2
            )
            partial = None
        last = time.monotonic()
        cost = last - begun

    return keep


def _told(extent: Extent, progress: Progress) -> Callable[[Reached], None]:
    def tell(reached: Reached) -> None:
        if extent.tokens is not None:
            progress(min(reached.read_tokens, extent.tokens), extent.tokens)
        else:
            progress(reached.read, int(extent.documents or 0))

    return tell


def _check_result(wanted: Pass, totals: dict[int, Tensor], reached: Reached) -> None:
    if not reached.tokens:
        raise MomentError(f"{wanted.corpus.name} has no text for {wanted.name}; give another")
    for layer, total in totals.items():
        if not bool(torch.isfinite(total).all()):
            raise MomentError(
                f"the keys of layer {layer} are not finite in {models.dtype_of(wanted.model)}; load the model in float32 or "
                "bfloat16"
            )
    if not wanted.extent.reached(reached):
        warnings.warn(
            f"{wanted.corpus.name} ends after {reached.read} documents and {reached.read_tokens} tokens, before the "
            f"{str(wanted.extent).replace('-', ' ')} asked for",
            FactWarning,
            stacklevel=2,
        )


def _hush(tokenizer: Any) -> None:
    """Keep transformers from warning of documents longer than the context: they are cut here."""
    said = getattr(tokenizer, "deprecation_warnings", None)
    if isinstance(said, dict):
        said["sequence-length-is-longer-than-the-specified-maximum"] = True


def _versions() -> dict[str, str]:
    found = {}
    for name in ("factlens", "transformer-lens", "transformers", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found
