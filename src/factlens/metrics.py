"""Scores of an edit from log-probabilities (ROME, Section 3.3; the official CounterFact metrics), and how they are measured.

Every target is teacher-forced after its prompt and scored by its mean negative log-probability per token, in nats; for zsRE
(Section 3.2) by the share of its tokens that rank first.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from factlens import models, runs
from factlens.errors import FactError, PromptTooLong
from factlens.models import Model
from factlens.tokens import answer_ids, token_ids

PARTS_OF_S = ("ES", "PS", "NS")
"""Whose harmonic mean S is."""
MODES = ("independent", "sequential", "batch")
"""Each edit alone; one after another, all of them kept; all rewrites as one edit."""
SCORING = "mean-token-nll/teacher-forced"
PROTOCOL = f"{SCORING}/independent/1"
"""Scoring, decoding, mode and version: the paper's CounterFact, each edit alone. Numbers of two protocols do not compare."""
BATCH = 64
"""Rows that share a forward pass."""
UNLIKE, FEW = 1.5, 8
"""On a CPU a row longer than so many times the shortest of a pass goes into another, if so many are together already: what pads the
shorter ones is computed too. On a GPU a pass costs more to start than to pad."""


# -- scores ----------------------------------------------------------------------------------------


def mean_nll(logprobs: Float[Tensor, " token"]) -> float:
    """Mean negative log-probability per token of one target, in nats."""
    return -float(logprobs.double().mean())


def token_accuracy(hits: Bool[Tensor, " token"]) -> float:
    """Share of a target's tokens that rank first, each after the true ones before it; NaN without tokens.

    The paper words zsRE's accuracy for the whole object, I[o* = argmax P]; its code, and so its numbers, count single tokens.
    """
    return float(hits.double().mean())


def success(wanted: Float[Tensor, " prompt"], other: Float[Tensor, " prompt"]) -> float:
    """Share of prompts at which the wanted target is the likelier one, from both targets' nll; NaN without prompts.

    ES and PS with the new target as `wanted`, NS with the true one. A tie is no success.
    """
    return float((other > wanted).double().mean())


def magnitude(wanted: Float[Tensor, " prompt"], other: Float[Tensor, " prompt"]) -> float:
    """Mean of exp(-nll wanted) - exp(-nll other): EM and PM, and NM with the true target as `wanted`."""
    return float((torch.exp(-wanted.double()) - torch.exp(-other.double())).mean())


def kl_per_token(
    before: Float[Tensor, "token d_vocab"], after: Float[Tensor, "token d_vocab"]
) -> float:
    """KL(before || after) in nats, mean over tokens, from log-probabilities; NaN without tokens."""
    wide = before.double()
    return float((wide.exp() * (wide - after.double())).sum(dim=-1).mean())


def harmonic_mean(values: Iterable[float]) -> float:
    """S, of the means ES, PS and NS; 0 where one of them is."""
    listed = list(values)
    if any(value == 0 for value in listed):
        return 0.0
    return len(listed) / sum(1 / value for value in listed)


def half_width(values: Iterable[float]) -> float:
    """Half of the 95 % interval of a mean over records, 1.96 sd / sqrt(n); NaN are left out, and fewer than two say nothing."""
    table = np.array([value for value in values if not np.isnan(value)], dtype=float)
    return float(1.96 * table.std(ddof=1) / np.sqrt(len(table))) if len(table) > 1 else float("nan")


def harmonic_half_width(parts: Float[np.ndarray, "record part"]) -> float:
    """Half of the 95 % interval of `harmonic_mean` of the parts' means, such as S's; records with a NaN are left out.

    By the delta method: S moves by S² / (k m²) for each unit by which the mean m of one of its k parts does, so S varies over
    records as the sum of the parts so weighted. 0 where S is 0: a share whose mean is 0 is 0 in every record.
    """
    table = parts[~np.isnan(parts).any(axis=1)]
    means = table.mean(axis=0) if len(table) else np.full(parts.shape[1], np.nan)
    whole = harmonic_mean(means)
    if whole == 0:
        return 0.0
    return half_width(table @ ((whole / means) ** 2 / len(means)))


# -- measuring -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """Pairs of prompt and target, as a model finds them."""

    nll: Float[Tensor, " pair"]
    """Mean negative log-probability per token, in nats."""
    ranked_first: Bool[Tensor, " pair"]
    """Whether greedy continuation spells the target: each of its tokens ranks first in its turn."""
    hits: tuple[Bool[Tensor, " _"], ...]
    """For each pair, which tokens of its target rank first, each after the true ones before it."""


def next_logprobs(model: Model, texts: Sequence[str]) -> list[Float[Tensor, "token d_vocab"]]:
    """The log-probabilities of what follows each token of each text, in float32; of long texts as much as fits the context."""
    context = int(models.cfg(model).n_ctx)
    rows = [token_ids(models.tokenizer(model), text)[:context] for text in texts]
    found = runs.logits_of(model, _padded(rows)) if rows else ()
    return [
        each[: len(row)].float().cpu().log_softmax(dim=-1)
        for row, each in zip(rows, found, strict=True)
    ]


@dataclass(frozen=True)
class _Row:
    """One row of a forward pass: a prompt with all but the last token of a target."""

    ids: tuple[int, ...]
    targets: tuple[int, ...]
    pair: int


def score(model: Model, pairs: Sequence[tuple[str, str]]) -> Scored:
    """Score each (prompt, target), the target with the space that separates words.

    Rows of like length share a pass, padded at the right, where causality makes padding harmless. Pairs that need the same row
    share it: of a prompt with two one-token targets there is one. Softmax is in float32 whatever the model's type.

    Raises:
        FactError: a prompt, or a target, has no tokens.
        PromptTooLong: a prompt and its target do not fit the context.
    """
    rows = sorted(
        (_row(model, pair, number) for number, pair in enumerate(pairs)),
        key=lambda row: (len(row.ids), row.ids),
    )
    nll = torch.empty(len(rows))
    hits: dict[int, Bool[Tensor, " token"]] = {}
    for chunk in _alike(rows, UNLIKE if models.device_of(model).type == "cpu" else math.inf):
        for row, logits in zip(chunk, _logits(model, chunk), strict=True):
            answer = torch.tensor(row.targets)
            logprobs = logits.log_softmax(dim=-1).gather(1, answer[:, None])[:, 0]
            nll[row.pair] = mean_nll(logprobs)
            hits[row.pair] = logits.argmax(dim=-1) == answer
    listed = tuple(hits[pair] for pair in range(len(rows)))
    first = torch.tensor([bool(each.all()) for each in listed], dtype=torch.bool)
    return Scored(nll, first, listed)


def _row(model: Model, pair: tuple[str, str], number: int) -> _Row:
    prompt, target = pair
    tokenizer, context = models.tokenizer(model), int(models.cfg(model).n_ctx)
    begun, answer = token_ids(tokenizer, prompt), answer_ids(tokenizer, prompt, target)
    if not begun:
        raise FactError(f"the prompt {prompt!r} has no tokens; give the beginning of a text")
    ids = [*begun, *answer[:-1]]
    if len(ids) > context:
        raise PromptTooLong(
            f"the prompt with its target {target!r} has {len(ids)} tokens and the model {context} positions; "
            f"shorten it (it begins {prompt[:40]!r})"
        )
    return _Row(tuple(ids), tuple(answer), number)


def _alike(rows: Iterable[_Row], unlike: float) -> Iterator[list[_Row]]:
    """Rows, the shortest first, cut into passes."""
    chunk: list[_Row] = []
    for row in rows:
        apart = len(chunk) >= FEW and len(row.ids) > unlike * len(chunk[0].ids)
        if apart or len(chunk) == BATCH:
            yield chunk
            chunk = []
        chunk.append(row)
    if chunk:
        yield chunk


def _logits(model: Model, rows: Sequence[_Row]) -> list[Float[Tensor, "token d_vocab"]]:
    """The float32 logits from which each row's target tokens are predicted."""
    places = {ids: place for place, ids in enumerate(dict.fromkeys(row.ids for row in rows))}
    padded = _padded(list(places))
    begin = min(len(row.ids) - len(row.targets) for row in rows)
    logits = runs.logits_of(model, padded, keep=padded.shape[1] - begin)
    return [
        logits[places[row.ids], len(row.ids) - len(row.targets) - begin : len(row.ids) - begin]
        .float()
        .cpu()
        for row in rows
    ]


def _padded(rows: Sequence[Sequence[int]]) -> Int[Tensor, "row pos"]:
    """Rows of unequal length as one tensor, filled up at the right, where causality makes it harmless."""
    length = max(map(len, rows))
    # By the last token, so that no model takes the padding for such and masks it in its own way.
    return torch.tensor([[*row, *[row[-1]] * (length - len(row))] for row in rows])
