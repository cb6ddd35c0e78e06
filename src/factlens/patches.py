"""Patches: lists of (hook name, function) that add, and go straight to `run_with_hooks(fwd_hooks=...)`.

    corrupt(noise) + sever_mlp(corrupted, where) + restore(17, clean, where)

Two primitives do everything: `add_noise` corrupts, `substitute` does the rest. Restoring substitutes values from the
clean run, severing substitutes values from the corrupted run. Hooks run in list order and the last at a site wins, so
severing is written before restoring. No patch changes the activation it is given.
"""

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from factlens.types import Act, Hook, Hooks, Where

EMBEDDING = -1
"""The "layer" of the token embeddings, below block 0."""


def add_noise(noise: Float[Tensor, "row pos d_model"]) -> Hook:
    """Add `noise` to an activation, in the noise's own precision.

    The official code draws in float64 and rounds the sum, `float32(float64(x) + noise)`; adding in the wider type
    keeps that, and makes replacing one embedding by another (noise = other - own) exact.
    """

    def patch(act: Act, hook: object = None) -> Act:
        return (act.to(noise.dtype) + noise.to(act.device)).to(act.dtype)

    return patch


def substitute(source: Float[Tensor, "row pos *rest"], where: Where) -> Hook:
    """Overwrite an activation with `source` at the states marked in `where`.

    Restoring and severing are this one act; only the source differs. The clean run's values restore (ROME, Section
    2.1), the corrupted run's values sever (ROME, Figure 3).
    """

    def patch(
        act: Float[Tensor, "row pos *rest"], hook: object = None
    ) -> Float[Tensor, "row pos *rest"]:
        mask = where.reshape(*where.shape, *[1] * (act.ndim - 2)).to(act.device)
        return torch.where(mask, source.to(act.dtype), act)

    return patch


def substitute_head(
    source: Float[Tensor, "row pos head_index d_head"], where: Where, head: int
) -> Hook:
    """`substitute` for one attention head of an activation that is kept per head."""

    def patch(
        act: Float[Tensor, "row pos head_index d_head"], hook: object = None
    ) -> Float[Tensor, "row pos head_index d_head"]:
        chosen: Bool[Tensor, " head_index"] = torch.arange(act.shape[2], device=act.device) == head
        mask = rearrange(where.to(act.device), "row pos -> row pos 1 1") & rearrange(
            chosen, "head_index -> 1 1 head_index 1"
        )
        return torch.where(mask, source.to(act.dtype), act)

    return patch


def fork(make: Callable[[Tensor], Tensor]) -> Hook:
    """Let the batch grow: replace it by what `make` returns, rows in a new number.

    At a block's output each row is a whole run, so rows may be added between two blocks: a run whose state at one
    layer is restored shares everything below with the corrupted run (DESIGN: the one-pass engine).
    """

    def patch(act: Tensor, hook: object = None) -> Tensor:
        return make(act)

    return patch


def corrupt(noise: Float[Tensor, "row pos d_model"]) -> Hooks:
    """Add noise to the token embeddings, before positions are added (ROME, Section 2.1)."""
    return [("hook_embed", add_noise(noise))]


def state_site(layer: int) -> str:
    """Where the state after `layer` is: a block's output, or the token embedding for -1."""
    return "hook_embed" if layer == EMBEDDING else f"blocks.{layer}.hook_resid_post"


def restore(layer: int, clean: Mapping[str, Act], where: Where) -> Hooks:
    """Return to their clean values the residual states marked in `where`, after `layer`.

    Layer -1 restores the token embedding, the control for what the token's identity alone gives.
    """
    name = state_site(layer)
    return [(name, substitute(clean[name], where))]


def restore_window(
    kind: str, layers: Iterable[int], clean: Mapping[str, Act], where: Where
) -> Hooks:
    """Return to their clean values the MLP ("mlp") or attention ("attn") outputs of several layers."""
    names = [f"blocks.{layer}.hook_{kind}_out" for layer in layers]
    return [(name, substitute(clean[name], where)) for name in names]


def sever_mlp(corrupted: Mapping[str, Act], where: Where) -> Hooks:
    """Freeze the MLP outputs of every layer at their corrupted values (ROME, Figure 3a)."""
    return _sever("mlp", corrupted, where)


def sever_attn(corrupted: Mapping[str, Act], where: Where) -> Hooks:
    """Freeze the attention outputs of every layer at their corrupted values (ROME, Figure 3b)."""
    return _sever("attn", corrupted, where)


def _sever(kind: str, corrupted: Mapping[str, Act], where: Where) -> Hooks:
    pattern = re.compile(rf"blocks\.\d+\.hook_{kind}_out")
    return [
        (name, substitute(act, where)) for name, act in corrupted.items() if pattern.fullmatch(name)
    ]
