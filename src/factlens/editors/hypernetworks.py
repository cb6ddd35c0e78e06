"""What MEND and KE share: a loss's gradient as pairs of vectors, and networks that map these to pairs of a change.

    ∇_W L = Σ_t u_t ⊗ δ_t     u_t: what enters W at token t;  δ_t = ∂L / ∂(x_t @ W), what leaves it there
    W' = W - step · Σ_t ũ_t ⊗ δ̃_t     (ũ_t, δ̃_t): what the network makes of (u_t, δ_t)

Neither sum is ever built, and no weight is written: a change is added where the weight's output passes, so that a loss
of the edited model reaches the network's parameters, and independent edits share a batch, each row with its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from factlens import linear_maps, models
from factlens.derivatives import differentiable
from factlens.errors import ModelUnsupported, PromptTooLong
from factlens.facts import Rewrite
from factlens.linear_maps import LinearMap
from factlens.models import Model
from factlens.tails import Reads, only_reading
from factlens.tokens import answer_ids, token_ids

BLOCKS = 3
"""The last blocks, whose MLPs are edited: 45 to 47 of GPT-2 XL, as in the official MEND and KE for it."""
SENTENCE = "{true} >> {new} || {prompt}"
"""An edit in one sentence, as the official code of ROME and of MEND gives it to KE."""


def edited_maps(model: Model) -> tuple[LinearMap, ...]:
    """The maps of both sides of the last three blocks' MLPs, of which the matrices are edited and not the biases.

    Raises:
        ModelUnsupported: a model that is spread over several devices, or whose MLPs are made otherwise.
    """
    models.check_one_device(model)
    depth = models.n_layers(model)
    layers = range(max(0, depth - BLOCKS), depth)
    found = [
        each
        for layer in layers
        for each in (*linear_maps.input_maps(model, layer), linear_maps.output_map(model, layer))
    ]
    for each in found:
        if models.weight(model, each.weight) is None:
            raise ModelUnsupported(
                f"{models.model_name(model)} has no weight {each.weight}, which is to be edited"
            )
    return tuple(found)


def shapes_of(model: Model, maps: Sequence[LinearMap]) -> dict[str, tuple[int, int]]:
    """(d_in, d_out) of each matrix, by its name."""
    sides = {each.weight: cast(Tensor, models.weight(model, each.weight)).shape for each in maps}
    return {name: (int(d_in), int(d_out)) for name, (d_in, d_out) in sides.items()}


# -- texts as tokens -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A text of which the last tokens are predicted, each from those before it."""

    ids: tuple[int, ...]
    """Without the very last, which is only predicted."""
    target: tuple[int, ...]

    @property
    def start(self) -> int:
        """The position that predicts the target's first token."""
        return len(self.ids) - len(self.target)


def row_of(model: Model, prompt: str, target: str) -> Row:
    """A prompt with what is to follow it, which alone is predicted.

    Raises:
        PromptTooLong: together they have more tokens than the model has positions.
    """
    answer = answer_ids(models.tokenizer(model), prompt, target)
    ids = (*token_ids(models.tokenizer(model), prompt), *answer[:-1])
    return Row(_that_fits(model, ids, prompt), tuple(answer))


def text_row(model: Model, text: str) -> Row:
    """A text all of whose tokens but the first are predicted.

    Raises:
        PromptTooLong: a text of fewer than two tokens, or of more than the model has positions.
    """
    ids = token_ids(models.tokenizer(model), text)
    if len(ids) < 2:
        raise PromptTooLong(
            f"the text {text!r} has fewer than two tokens; nothing in it is predicted"
        )
    return Row(_that_fits(model, tuple(ids[:-1]), text), tuple(ids[1:]))


def _that_fits(model: Model, ids: tuple[int, ...], text: str) -> tuple[int, ...]:
    context = int(models.cfg(model).n_ctx)
    if len(ids) > context:
        raise PromptTooLong(
            f"{text[:40]!r}… has {len(ids)} tokens and the model {context} positions; shorten it"
        )
    return ids


@dataclass(frozen=True)
class Batch:
    """Rows in one tensor, padded at the right, where causality makes padding harmless."""

    tokens: Int[Tensor, "row pos"]
    reads: Reads
    """Where a target's tokens are predicted."""
    target: Int[Tensor, " read"]
    owners: Int[Tensor, " row"]
    """The edit that each row belongs to."""
    weight: Float[Tensor, " read"]
    """One over the row's target tokens: of the reads of one row the weighted sum is the mean."""


def batch_of(model: Model, rows: Sequence[Row], owners: Sequence[int] | None = None) -> Batch:
    """The rows as a batch; without `owners` each is of an edit of its own."""
    device = models.device_of(model)
    longest = max(len(row.ids) for row in rows)
    # Padded by the last token, so that no model takes the padding for such and masks it in its own way.
    padded = [[*row.ids, *[row.ids[-1]] * (longest - len(row.ids))] for row in rows]
    reads = [
        (number, row.start + n, token, 1 / len(row.target))
        for number, row in enumerate(rows)
        for n, token in enumerate(row.target)
    ]
    at, positions, target, weight = (
        torch.tensor(column, device=device) for column in zip(*reads, strict=True)
    )
    own = torch.tensor(list(range(len(rows)) if owners is None else owners), device=device)
    return Batch(torch.tensor(padded, device=device), Reads(at, positions), target, own, weight)


def logprobs_of(model: Model, batch: Batch) -> Float[Tensor, "read d_vocab"]:
    """Log-probabilities of all tokens at the batch's reads, in float32 at least."""
    with only_reading(model, batch.reads):
        logits = cast(Any, model).run_with_hooks(batch.tokens, fwd_hooks=[])[0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def nll_of(batch: Batch, logprobs: Float[Tensor, "read d_vocab"]) -> Float[Tensor, " row"]:
    """Each row's mean negative log-probability per target token, in nats."""
    told = logprobs.gather(1, batch.target[:, None])[:, 0]
    return mean_by_row(batch, -told)


def mean_by_row(batch: Batch, values: Float[Tensor, " read"]) -> Float[Tensor, " row"]:
    """The mean over each row's reads."""
    weighted = batch.weight.to(values.dtype) * values
    return values.new_zeros(len(batch.tokens)).index_add(0, batch.reads.rows, weighted)


# -- gradients as pairs ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """A sum of outer products for each of several edits of one weight: of a gradient, or of a change."""

    left: Float[Tensor, "edit token d_in"]
    right: Float[Tensor, "edit token d_out"]
    there: Bool[Tensor, "edit token"]
    """Which of them are there: not padding, and not tokens that the loss does not depend on."""

    def dense(self) -> Float[Tensor, "edit d_in d_out"]:
        """The sums."""
        return einsum(
            self.left * self.there[..., None],
            self.right,
            "edit token d_in, edit token d_out -> edit d_in d_out",
        )

    def norms(self) -> Float[Tensor, " edit"]:
        """Frobenius norms of the sums, from the vectors' inner products."""
        left = self.left * self.there[..., None]
        lefts = einsum(left, left, "edit token d_in, edit other d_in -> edit token other")
        rights = einsum(
            self.right, self.right, "edit token d_out, edit other d_out -> edit token other"
        )
        return (lefts * rights).sum(dim=(1, 2)).clamp(min=0).sqrt()


@dataclass(frozen=True)
class Asked:
    """What a network is given of some edits: their gradients, and each in a sentence."""

    gradients: Mapping[str, Pairs]
    """By the weight's name: of the negative log-probability per token of the new object."""
    sentences: Float[Tensor, "edit word d_model"]
    """The model's own token embeddings, over their root mean square; what stands after a sentence's end is padding."""
    lengths: Int[Tensor, " edit"]
    """Tokens of each sentence."""


def ask(
    model: Model, maps: Sequence[LinearMap], rows: Sequence[Row], rewrites: Sequence[Rewrite]
) -> Asked:
    """Take the gradient of each edit by itself, all in one backward pass.

    Args:
        model: a hooked model, whose weights the gradients are taken at.
        maps: the linear maps whose matrices are edited.
        rows: of each edit, its prompt with the new object.
        rewrites: the same edits, for their sentences.
    """
    embedded, lengths = _sentences(model, rewrites)
    return Asked(gradients_of(model, maps, batch_of(model, rows)), embedded, lengths)


def gradients_of(model: Model, maps: Sequence[LinearMap], batch: Batch) -> dict[str, Pairs]:
    """The gradient of each row's own loss by each matrix, as pairs."""
    with differentiable(model), _probed(maps, len(batch.tokens)) as (entered, probes):
        nll_of(batch, logprobs_of(model, batch)).sum().backward()
    found = {}
    for name, probe in probes.items():
        left, right = entered[name], cast(Tensor, probe.grad)
        there = (left != 0).any(dim=-1) & (right != 0).any(dim=-1)
        found[name] = Pairs(left, right, there)
    return found


@contextmanager
def _probed(
    maps: Sequence[LinearMap], rows: int
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Keep what enters each map, and add a zero to what leaves it, by which gradients are taken."""
    entered: dict[str, Tensor] = {}
    probes: dict[str, Tensor] = {}
    hooks = [
        (
            each,
            partial(_keep, entered, each.weight, rows),
            partial(_probe, probes, each.weight, rows),
        )
        for each in maps
    ]
    with _hooked(hooks):
        yield entered, probes


def _keep(
    kept: dict[str, Tensor], name: str, rows: int, module: nn.Module, args: tuple, output: Tensor
) -> None:
    kept[name] = _by_row(output.detach(), rows).clone()


def _probe(
    probes: dict[str, Tensor], name: str, rows: int, module: nn.Module, args: tuple, output: Tensor
) -> Tensor:
    probes[name] = torch.zeros_like(_by_row(output.detach(), rows)).requires_grad_()
    return output + probes[name].reshape(output.shape).to(output.dtype)


def _by_row(act: Tensor, rows: int) -> Float[Tensor, "row pos d"]:
    """In float32 at least; OPT hands its MLP all rows and positions in one axis."""
    wide = torch.promote_types(act.dtype, torch.float32)
    return act.reshape(rows, -1, act.shape[-1]).to(wide)


def _sentences(
    model: Model, rewrites: Sequence[Rewrite]
) -> tuple[Float[Tensor, "edit word d_model"], Int[Tensor, " edit"]]:
    tokenizer, table = models.tokenizer(model), cast(Tensor, models.weight(model, "embed.W_E"))
    texts = [
        SENTENCE.format(true=each.true or "", new=each.target, prompt=each.prompt)
        for each in rewrites
    ]
    ids = [torch.tensor(token_ids(tokenizer, text)) for text in texts]
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True).to(table.device)
    wide = table.detach().to(torch.promote_types(table.dtype, torch.float32))
    return wide[padded] / wide.square().mean().sqrt(), torch.tensor([len(each) for each in ids])


# -- changes ---------------------------------------------------------------------------------------


class Hypernetwork(nn.Module):
    """What MEND's and KE's networks have in common: called with `Asked` they give a change of each weight as `Pairs`.

    Each weight has one learned step. `scales` say what a step of one is along a gradient, and `sizes` how long it is; they are no
    parameters but set by `calibrate`, since gradients and weights may be of any size.
    """

    scales: Tensor
    sizes: Tensor

    def __init__(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        self.shapes = dict(shapes)
        self.steps = nn.Parameter(torch.ones(len(shapes)))
        self.register_buffer("scales", torch.ones(len(shapes)))
        self.register_buffer("sizes", torch.ones(len(shapes)))

    @torch.no_grad()
    def calibrate(self, asked: Asked, norms: Mapping[str, float], first_step: float) -> None:
        """Let a step of one along the plain gradient move each weight by `first_step` of its norm, in the mean over `asked`."""
        for number, name in enumerate(self.shapes):
            self.sizes[number] = first_step * norms[name]
            self.scales[number] = self.sizes[number] / asked.gradients[name].norms().mean()


@contextmanager
def changed(
    maps: Sequence[LinearMap], changes: Mapping[str, Pairs], owners: Int[Tensor, " row"]
) -> Iterator[None]:
    """Let the model give what it would with `changes` added to its weights, each row with those of its own edit.

    For the length of a `with` block; gradients reach `changes`.
    """
    with _hooked([(each, *_gaining(changes[each.weight], owners)) for each in maps]):
        yield


def _gaining(change: Pairs, owners: Int[Tensor, " row"]) -> tuple[Any, Any]:
    """The hooks of one map: what enters it is seen, and x @ ΔW is added to what leaves it, without building ΔW."""
    left = rearrange(change.left * change.there[..., None], "edit token d_in -> edit d_in token")
    seen: list[Tensor] = []
    return partial(_see, seen), partial(_gain, seen, left[owners], change.right[owners])


def _see(seen: list[Tensor], module: nn.Module, args: tuple, output: Tensor) -> None:
    seen[:] = [output]


def _gain(
    seen: Sequence[Tensor],
    left: Float[Tensor, "row d_in token"],
    right: Float[Tensor, "row token d_out"],
    module: nn.Module,
    args: tuple,
    output: Tensor,
) -> Tensor:
    moved = _by_row(seen[0], len(left)).to(left.dtype) @ left @ right
    return (output.to(left.dtype) + moved.reshape(output.shape)).to(output.dtype)


@contextmanager
def _hooked(hooks: Sequence[tuple[LinearMap, Any, Any]]) -> Iterator[None]:
    """For each map one hook on what enters it and one on what leaves it."""
    handles = []
    try:
        for each, entering, leaving in hooks:
            handles.append(each.entering.register_forward_hook(entering))
            handles.append(each.leaving.register_forward_hook(leaving))
        yield
    finally:
        for handle in handles:
            handle.remove()
