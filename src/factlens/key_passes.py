"""Keys of whole batches, summed into k kᵀ: one pass for every layer asked for, and no further than the last of them.

Keys are float32 at least, whatever the model's type; products and sums are float64. Float32 products are right to
3e-8 of C, but C⁻¹ magnifies: on atlas, where C's condition number reaches 6e9, they move C⁻¹ k by up to 3e-3. On a
CPU the symmetric product, which makes one triangle only, takes no longer in float64 than the whole one in float32.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

import psutil
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from scipy.linalg.blas import dsyrk
from torch import Tensor

from factlens import models
from factlens.errors import ModelUnsupported, MomentError, OutOfMemory
from factlens.models import Model
from factlens.runs import fused_activations, logits_of
from factlens.types import Hook, Tokens

Rows = Sequence[Sequence[int]]
"""Token ids of documents, each cut to the context."""
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens of a batch, padding included."""


class _Enough(Exception):
    """The last key needed has been seen."""


def d_mlp(model: Model, layer: int) -> int:
    """How many neurons the MLP of `layer` has. Not the configuration's number, which the bridge has wrong for OPT."""
    return int(models.W_out(model, layer).shape[0])


def check_layers(model: Model, layers: Sequence[int]) -> list[int]:
    """The layers in order, each once.

    Raises:
        MomentError: none, or one that the model has not.
        ModelUnsupported: a layer without keys of its own (a mixture of experts).
    """
    depth = models.n_layers(model)
    wanted = sorted(set(layers))
    if bad := [layer for layer in wanted if not 0 <= layer < depth]:
        raise MomentError(
            f"layer {bad[0]} does not exist: the model has {depth}, counted from 0 to {depth - 1}"
        )
    if not wanted:
        raise MomentError("no layers given; name at least one")
    for layer in wanted:
        if not models.has_site(model, models.key_site(layer)):
            raise ModelUnsupported(
                f"this model has no hook point {models.key_site(layer)}, where keys are read"
            )
    return wanted


def empty_totals(model: Model, layers: Sequence[int]) -> dict[int, Tensor]:
    """A total of zeros for each layer, [d_mlp d_mlp] in float64: beside the layer if all fit there, else on the CPU.

    Raises:
        OutOfMemory: they fit nowhere.
    """
    need, extra = memory_needed(model, layers)
    devices = {layer: models.W_out(model, layer).device for layer in layers}
    if any(each.type == "mps" for each in devices.values()) or not _fits(devices, need, extra):
        devices = dict.fromkeys(layers, torch.device("cpu"))
    if not _fits(devices, need, extra):
        free = psutil.virtual_memory().available
        raise OutOfMemory(
            f"the sums of {len(layers)} layers need {(sum(need.values()) + extra) / 1e9:.1f} GB and {free / 1e9:.1f} GB is "
            f"free; about {_how_many(need, free - extra)} fit at a time, choose them with --layer"
        )
    return {
        layer: torch.zeros(*2 * [d_mlp(model, layer)], dtype=torch.float64, device=devices[layer])
        for layer in layers
    }


def memory_needed(model: Model, layers: Sequence[int]) -> tuple[dict[int, int], int]:
    """Bytes of each layer's total, and those of the last steps: one more matrix and one batch of keys."""
    widths = {layer: d_mlp(model, layer) for layer in layers}
    widest = max(widths.values())
    passing = 8 * widest * (2 * widest + 2 * batch_tokens(model))
    return {layer: 8 * width**2 for layer, width in widths.items()}, passing


def batch_tokens(model: Model) -> int:
    """How many tokens a batch has unless told otherwise."""
    return BATCH_TOKENS.get(models.device_of(model).type, BATCH_TOKENS["cpu"])


def batches(rows: Rows, limit: int) -> Iterator[Rows]:
    """Rows of similar length together, the longest first, `limit` tokens at most with their padding."""
    ordered = sorted(rows, key=len, reverse=True)
    while ordered:
        count = max(1, limit // len(ordered[0]))
        yield ordered[:count]
        ordered = ordered[count:]


def add_keys(model: Model, totals: Mapping[int, Tensor], rows: Rows) -> None:
    """Run one batch and add k kᵀ of each of its tokens to the totals of every layer.

    Rows are padded on the right, which a causal model does not notice, and padding is left out of the sums.
    """
    tokens, real = padded(rows)
    last = max(totals)

    def adding(layer: int) -> Hook:
        def add(act: Tensor, hook: object = None) -> Tensor:
            keys = rearrange(act, "... d_mlp -> (...) d_mlp")  # OPT's have no rows.
            keys = keys[rearrange(real, "row pos -> (row pos)").to(act.device)]
            add_products(totals[layer], keys)
            if layer == last:
                raise _Enough
            return act

        return add

    hooks = [(models.key_site(layer), adding(layer)) for layer in totals]
    # Stopped by an exception, not by stop_at_layer: that would run the last layer's output matrix too.
    with fused_activations(model), suppress(_Enough):
        logits_of(model, tokens, hooks)


def add_products(total: Float[Tensor, "d_mlp d_mlp"], keys: Float[Tensor, "token d_mlp"]) -> None:
    """Add k kᵀ of every key to the upper triangle of `total`, in place; what is below it means nothing."""
    wide = keys.to(total)
    if total.device.type != "cpu":
        total.addmm_(wide.T, wide)
        return
    # Fortran's lower triangle is the upper one here: scipy is given views, and writes through them.
    dsyrk(1.0, wide.numpy().T, beta=1.0, c=total.numpy().T, lower=1, overwrite_c=1)


def complete(total: Float[Tensor, "d_mlp d_mlp"]) -> Float[Tensor, "d_mlp d_mlp"]:
    """Fill in what is below the diagonal, in place: one layer at a time, so that memory does not double."""
    return total.copy_(total.triu() + total.triu(1).T)


def padded(rows: Rows) -> tuple[Tokens, Bool[Tensor, "row pos"]]:
    """Rows as one tensor, and where it holds tokens.

    Each is filled up with its own last token: transformers warns when it sees a tokenizer's padding token without a
    mask.
    """
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[row[-1]] * (length - len(row))] for row in rows])
    ends = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(length)[None] < ends[:, None]


def _fits(devices: Mapping[int, torch.device], need: Mapping[int, int], extra: int) -> bool:
    wanted: dict[torch.device, int] = {}
    for layer, device in devices.items():
        wanted[device] = wanted.get(device, extra) + need[layer]
    return all(total <= _free(device) for device, total in wanted.items())


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(psutil.virtual_memory().available)


def _how_many(need: Mapping[int, int], free: int) -> int:
    return max(0, free // max(need.values()))
