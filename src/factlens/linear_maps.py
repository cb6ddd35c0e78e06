"""The linear maps of a block whose weights editors change: what these are called, and where their inputs and outputs pass."""

from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from factlens import models
from factlens.errors import ModelUnsupported
from factlens.models import Model


@dataclass(frozen=True)
class LinearMap:
    """A linear map of a block, `x @ weight + bias`: what its weights are called, and where x and the result pass."""

    weight: str
    """[d_in d_out], or [head_index d_in d_out] of all heads of attention."""
    bias: str | None
    """None where the architecture has none."""
    entering: nn.Module
    """The module whose output is x."""
    leaving: nn.Module
    """The module whose output is the result, before anything else is done to it."""


def output_map(model: Model, layer: int) -> LinearMap:
    """The MLP's W_out and b_out: from the keys to the values."""
    entering = cast(Any, model).hook_dict[models.key_site(layer)]
    bias = _there(model, f"blocks.{layer}.mlp.b_out")
    return LinearMap(models.W_out_name(layer), bias, entering, models.output_module(model, layer))


def input_maps(model: Model, layer: int) -> tuple[LinearMap, ...]:
    """What the MLP's input passes: W_in with its bias, and W_gate where the MLP is gated.

    Raises:
        ModelUnsupported: an MLP whose maps have no modules of their own.
    """
    block = cast(Any, model).blocks[layer]
    letters = (
        ("in", "gate")
        if models.weight(model, f"blocks.{layer}.mlp.W_gate") is not None
        else ("in",)
    )
    found = []
    for letter in letters:
        if models.is_bridge(model):
            leaving = getattr(block.mlp, letter, None)
            entering = getattr(leaving, "hook_in", None)
        else:
            entering = getattr(block, "ln2", None)
            linear = letter == "in" and "gate" in letters
            leaving = getattr(block.mlp, "hook_pre_linear" if linear else "hook_pre", None)
        if entering is None or leaving is None:
            raise ModelUnsupported(
                f"the MLPs of {models.model_name(model)} have no module W_{letter} of their own, which is to be edited"
            )
        name = f"blocks.{layer}.mlp.W_{letter}"
        bias = _there(model, f"blocks.{layer}.mlp.b_{letter}")
        found.append(LinearMap(name, bias, entering, leaving))
    return tuple(found)


def attention_maps(model: Model, layer: int) -> tuple[LinearMap, ...]:
    """W_Q, W_K and W_V of all heads, with their biases: GPT-2's `c_attn`."""
    block, sites = cast(Any, model).blocks[layer], cast(Any, model).hook_dict
    entering = sites[f"blocks.{layer}.attn.hook_in"] if models.is_bridge(model) else block.ln1
    return tuple(
        LinearMap(
            f"blocks.{layer}.attn.W_{letter}",
            _there(model, f"blocks.{layer}.attn.b_{letter}"),
            entering,
            sites[f"blocks.{layer}.attn.hook_{letter.lower()}"],
        )
        for letter in "QKV"
    )


def _there(model: Model, name: str) -> str | None:
    """`name`, or None where the architecture has no such bias; there HookedTransformer has one of zeros."""
    bias = models.weight(model, name)
    return None if bias is None or not (models.is_bridge(model) or bool(bias.any())) else name
