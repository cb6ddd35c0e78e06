"""Running a model under hooks: whole, with a cache, or over a stream whose batch grows on the way."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from factlens.models import EMBED, Model, device_of, is_bridge, n_layers, site
from factlens.prefixes import HuggingFacePrefix, KeyValues, LensPrefix
from factlens.types import Act, Hooks, Logits, Tokens


def logits_of(model: Model, tokens: Tokens, hooks: Hooks | None = None, keep: int = 0) -> Logits:
    """Run `tokens` through the whole model; logits at the last `keep` positions, or at all for 0."""
    runner, bridge = cast(Any, model), is_bridge(model)
    tokens = tokens.to(device_of(model))
    with torch.inference_mode():
        if bridge:
            options = {"logits_to_keep": keep} if keep else {}
            return runner.run_with_hooks(tokens, fwd_hooks=hooks or [], **options)
        return runner.run_with_hooks(tokens, fwd_hooks=(hooks or []) + _only_last(model, keep))


def run_with_cache(
    model: Model, tokens: Tokens, names: Sequence[str], hooks: Hooks | None = None
) -> tuple[Logits, dict[str, Tensor]]:
    """Run `tokens` under `hooks`, and keep the activations at `names` as they leave those hooks."""
    stored: dict[str, Tensor] = {}

    def storing(name: str) -> tuple[str, Any]:
        def store(act: Tensor, hook: object = None) -> Tensor:
            stored[name] = act.detach().clone()
            return act

        return name, store

    logits = logits_of(model, tokens, (hooks or []) + [storing(name) for name in names])
    return logits, stored


def embed(model: Model, tokens: Tokens, hooks: Hooks) -> Act:
    """The stream that enters block 0: embeddings under `hooks`, with positions where they are added there."""
    with torch.inference_mode():
        return cast(Any, model).run_with_hooks(
            tokens.to(device_of(model)), fwd_hooks=hooks, stop_at_layer=0
        )


def run_stream(
    model: Model,
    stream: Act,
    tokens: Int[Tensor, "1 pos"],
    hooks: Hooks,
    keys: KeyValues,
    keep: int,
) -> Float[Tensor, "forks keep d_vocab"]:
    """Run the blocks over `stream`, whose rows a hook may change in number between two blocks.

    `keys` is asked at each layer for the keys and values of earlier positions (`KeyValues`). The model itself is
    given one row of `tokens`, so that every mask and position it builds broadcasts over however many rows there are.
    """
    runner = cast(Any, model)
    with torch.inference_mode():
        if not is_bridge(model):
            hooks = hooks + _only_last(model, keep)
            prefix = LensPrefix(keys, n_layers(model))
            return runner.run_with_hooks(
                stream, fwd_hooks=hooks, start_at_layer=0, past_kv_cache=prefix
            )

        # Not a hook at resid_pre: OPT's block looks at its rows before that fires.
        with entering(runner.blocks[0], stream):
            return runner.run_with_hooks(
                tokens[:1].to(device_of(model)),
                fwd_hooks=hooks,
                past_key_values=HuggingFacePrefix(keys),
                logits_to_keep=keep,
            )


@contextlib.contextmanager
def entering(block: nn.Module, stream: Act) -> Iterator[None]:
    """Let `block` be called with `stream`, whatever it would have been called with."""

    def swap(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (stream, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": stream}

    handle = block.register_forward_pre_hook(swap, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _only_last(model: Model, keep: int) -> Hooks:
    """HookedTransformer has no `logits_to_keep`: cut the stream before the unembedding instead."""

    def cut(act: Tensor, hook: object = None) -> Tensor:
        return act[:, -keep:]

    return [(site(n_layers(model) - 1, "resid_post"), cut)] if keep else []


@contextlib.contextmanager
def fused_activations(model: Model) -> Iterator[None]:
    """Let GPT-2's GELU run as one kernel instead of eight for the length of a `with` block.

    `gelu_new` is the tanh approximation that torch has fused; written out, as Hugging Face and TransformerLens do, it
    takes as long on a CPU as a tenth of the MLP's matrix products. The values differ in the last bit.
    """

    def fused(act: Tensor) -> Tensor:
        return torch.nn.functional.gelu(act, approximate="tanh")

    written_out = [m for m in model.modules() if type(m).__name__ == "NewGELUActivation"]
    lens = [
        m for m in model.modules() if getattr(getattr(m, "act_fn", 0), "__name__", "") == "gelu_new"
    ]
    before = [module.act_fn for module in lens]
    for module in written_out:
        module.forward = fused  # type: ignore[method-assign]
    for module in lens:
        module.act_fn = fused  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in written_out:
            del module.forward
        for module, function in zip(lens, before, strict=True):
            module.act_fn = function


def token_embeddings(model: Model, tokens: Tokens) -> Act:
    """What `hook_embed` carries for `tokens`: the embeddings that corruption acts on."""
    caught: list[Tensor] = []

    def catch(act: Tensor, hook: object = None) -> Tensor:
        caught.append(act.detach().clone())
        return act

    embed(model, tokens, [(EMBED, catch)])
    return caught[0]


def rows_of(act: Tensor, rows: int) -> Tensor:
    """One run's activation, repeated for a batch of `rows`."""
    return repeat(act, "1 ... -> row ...", row=rows)
