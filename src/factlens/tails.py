"""What one MLP output reaches: the layers from its own on, over the positions from its token on.

Choosing a value (ROME, Section 3.1) runs the model some twenty times, and only one vector differs between the runs. So
the rows are run once (`cut_tails`), keeping for each what enters the blocks above at its lookup token and after it, and
the keys and values of the tokens before it; each further run (`run_tails`) begins there. Exact, by causality, and
with a graph, so that gradients reach the vector.

Rows differ in length and in where they look up. They are aligned at the lookup token: what follows is padded at the
right, where causality makes padding harmless, and the prefix at the left, where a mask hides it.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from factlens import models, runs
from factlens.models import Model
from factlens.prefixes import HuggingFacePrefix, KeyValues, LensPrefix
from factlens.types import Act, Hooks, Tokens


@dataclass(frozen=True)
class Reads:
    """Which logits are wanted: pairs of a row and a position, counted from the row's first token."""

    rows: Int[Tensor, " read"]
    positions: Int[Tensor, " read"]


@dataclass(frozen=True)
class Tails:
    """Rows cut at their lookup tokens, ready to be run again with another MLP output there."""

    layer: int
    start: int
    """The block where runs begin: `layer + 1`, or `layer` itself where a norm stands between `W_out` and the stream."""
    lookups: Int[Tensor, " row"]
    tokens: Int[Tensor, "row suffix"]
    stream: Float[Tensor, "row suffix d_model"]
    """What enters block `start`."""
    mask: Bool[Tensor, "row span"]
    """Which positions of the prefix and the suffix are there."""
    prefix: KeyValues
    in_tuples: bool
    """Whether the model's blocks return tuples."""
    keys: Float[Tensor, "row d_mlp"]
    """The MLP's key at the lookup token of each row."""
    outputs: Float[Tensor, "row d_model"]
    """The MLP's output there, bias included."""
    clean: Float[Tensor, "read d_vocab"]
    """Logits of the untouched model at the positions asked for."""


def cut_tails(
    model: Model,
    layer: int,
    rows: Sequence[Int[Tensor, " _"]],
    lookups: Sequence[int],
    reads: Reads,
) -> Tails:
    """Run `rows` once, whole, and keep what later runs from `layer` on need."""
    tokens = nn.utils.rnn.pad_sequence(list(rows), batch_first=True).to(models.device_of(model))
    device = tokens.device
    lengths = torch.tensor([len(row) for row in rows], device=device)
    at = torch.tensor(lookups, device=device)
    start = layer + 1 if adds_to_stream(model, layer) else layer
    recorded = KeyValues(record=len(rows))
    with torch.no_grad(), _caught(model, layer, start) as (acts, hooks):
        hooks = hooks + _last_mlp(model, layer, reads)
        clean = _logits(model, tokens, recorded, reads, hooks)
    suffix = at[:, None] + torch.arange(int((lengths - at).max()), device=device)
    before = torch.arange(-int(at.max()), 0, device=device) + at[:, None]
    row = torch.arange(len(rows), device=device)
    places = suffix.clamp(max=tokens.shape[1] - 1)
    return Tails(
        layer=layer,
        start=start,
        lookups=at,
        tokens=tokens[row[:, None], places],
        stream=acts["stream"][row[:, None], places],
        mask=torch.cat([before >= 0, suffix < lengths[:, None]], dim=1),
        prefix=_prefix(model, recorded, before.clamp(min=0), start),
        in_tuples=isinstance(acts["block"], tuple),
        keys=acts["key"][row, at].float(),
        outputs=acts["output"].reshape(*tokens.shape, -1)[row, at].float(),
        clean=clean,
    )


def run_tails(
    model: Model,
    tails: Tails,
    shifts: Float[Tensor, "chosen d_model"],
    chosen: Int[Tensor, " chosen"],
    reads: Reads,
) -> Float[Tensor, "read d_vocab"]:
    """Logits at `reads` when the MLP's output at the lookup token of the rows `chosen` is moved by `shifts`.

    `reads.rows` count among the chosen rows. Gradients reach `shifts`.
    """
    stream = tails.stream[chosen]
    lookups = tails.lookups[chosen]
    moved: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if tails.start > tails.layer:
        own = (stream[:, :1].float() + shifts[:, None]).to(stream.dtype)
        stream = torch.cat([own, stream[:, 1:]], dim=1)
    else:
        moved = shifted_output(model, tails.layer, shifts)
    places = lookups[:, None] + torch.arange(stream.shape[1], device=stream.device)
    last = int(models.cfg(model).n_ctx) - 1
    entry = _Entry(tails.start, stream, tails.mask[chosen], places.clamp(max=last))
    keys = tails.prefix.reuse(tails.prefix.start, lambda layer, rows: chosen)
    reads = Reads(reads.rows, reads.positions - lookups[reads.rows])
    hooks = _last_mlp(model, tails.layer, reads)
    with moved, _from_block(model, entry, tails.in_tuples):
        return _logits(model, tails.tokens[chosen], keys, reads, hooks, entry)


def run_whole(
    model: Model,
    layer: int,
    rows: Sequence[Int[Tensor, " _"]],
    lookups: Int[Tensor, " row"],
    shifts: Float[Tensor, "row d_model"],
) -> Float[Tensor, "row pos d_vocab"]:
    """The same the long way, as the official code does it: all layers, all positions, all logits."""
    tokens = nn.utils.rnn.pad_sequence(list(rows), batch_first=True).to(models.device_of(model))
    options = {"attention_mask": torch.ones_like(tokens)} if models.is_bridge(model) else {}
    with shifted_output(model, layer, shifts, lookups):
        return cast(Any, model).run_with_hooks(tokens, fwd_hooks=[], **options)


# -- how an output joins the stream ----------------------------------------------------------------


def adds_to_stream(model: Model, layer: int) -> bool:
    """Whether `W_out`'s output joins the stream as it is. Gemma 2 has a norm between; other models scale it.

    Measured, not looked up: the output is moved at one token, and the block's output must move by as much.
    """
    tokens = torch.tensor([[1, 2]], device=models.device_of(model))
    site, runner = models.site(layer, "resid_post"), cast(Any, model)
    seen: list[Tensor] = []

    def see(act: Tensor, hook: object = None) -> Tensor:
        seen.append(act[0, 0].float().clone())
        return act

    with torch.no_grad():
        runner.run_with_hooks(tokens, fwd_hooks=[(site, see)])
        size = 1 + float(seen[0].abs().max())
        shift = size * torch.linspace(-1, 1, len(seen[0]), device=seen[0].device)
        with shifted_output(model, layer, shift[None]):
            runner.run_with_hooks(tokens, fwd_hooks=[(site, see)])
    gap = float((seen[1] - seen[0] - shift).abs().max())
    return gap < 8 * size * torch.finfo(models.dtype_of(model)).eps


@contextlib.contextmanager
def shifted_output(
    model: Model,
    layer: int,
    shifts: Float[Tensor, "row d_model"],
    positions: Int[Tensor, " row"] | None = None,
) -> Iterator[None]:
    """Move the output of `W_out` at one position of each row, the first by default, for the length of a `with` block."""
    row = torch.arange(shifts.shape[0], device=shifts.device)
    at = torch.zeros_like(row) if positions is None else positions

    def shift(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        # OPT hands its MLP all rows and positions in one axis.
        act = output.reshape(shifts.shape[0], -1, output.shape[-1])
        moved = (act[row, at].float() + shifts).to(act.dtype)
        return act.index_put((row, at), moved).reshape(output.shape)

    handle = models.output_module(model, layer).register_forward_hook(shift)
    try:
        yield
    finally:
        handle.remove()


# -- running ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """Where a run begins that is not whole."""

    start: int
    stream: Act
    mask: Bool[Tensor, "row span"]
    places: Int[Tensor, "row suffix"]


def _logits(
    model: Model,
    tokens: Tokens,
    keys: KeyValues,
    reads: Reads,
    hooks: Hooks,
    entry: _Entry | None = None,
) -> Float[Tensor, "read d_vocab"]:
    """One run, whole or from `entry` on; the unembedding sees the wanted positions only."""
    runner = cast(Any, model)
    with only_reading(model, reads):
        if models.is_bridge(model):
            options: dict[str, Any] = {"past_key_values": HuggingFacePrefix(keys)}
            if entry is None:
                options["attention_mask"] = torch.ones_like(tokens)
            else:
                options.update(position_ids=entry.places, attention_mask=entry.mask.long())
            return runner.run_with_hooks(tokens, fwd_hooks=hooks, **options)[0]
        prefix = LensPrefix(keys, models.n_layers(model))
        # Begun with a stream, since HookedTransformer asks a cache that comes with tokens for its mask.
        start, stream, mask = 0, None, None
        if entry is not None:
            start, stream, mask = entry.start, entry.stream, entry.mask.long()
        else:
            stream = runner.run_with_hooks(tokens, stop_at_layer=0)
        options = {"start_at_layer": start, "past_kv_cache": prefix, "attention_mask": mask}
        return runner.run_with_hooks(stream, fwd_hooks=hooks, **options)[0]


@contextlib.contextmanager
def only_reading(model: Model, reads: Reads) -> Iterator[None]:
    """Let the unembedding see the positions in `reads` only, for the length of a `with` block: logits are then [1 read d_vocab]."""

    def choose(module: nn.Module, args: tuple) -> tuple:
        return (args[0][reads.rows, reads.positions][None], *args[1:])

    handle = cast(Any, model).unembed.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()


def _last_mlp(model: Model, layer: int, reads: Reads) -> Hooks:
    """Hooks that let the last block's MLP see the positions in `reads` only; elsewhere it then adds nothing.

    None if its own output is the one that is moved at `layer`, or if its input has no hook point of its own.
    """
    last = models.n_layers(model) - 1
    name = models.mlp_input_site(model, last)
    if layer == last or name is None:
        return []
    wanted: list[Tensor] = []

    def choose(act: Tensor, hook: object = None) -> Tensor:
        # A mask, since a position may be read twice, and its gradients are to be added once.
        read = torch.zeros(act.shape[:2], dtype=torch.bool, device=act.device)
        read[reads.rows.to(act.device), reads.positions.to(act.device)] = True
        wanted[:] = [read]
        return act[read][None]

    def put_back(act: Tensor, hook: object = None) -> Tensor:
        (read,) = wanted
        return act.new_zeros(*read.shape, act.shape[-1]).index_put((read,), act[0])

    return [(name, choose), (models.site(last, "mlp_out"), put_back)]


@contextlib.contextmanager
def _caught(model: Model, layer: int, start: int) -> Iterator[tuple[dict[str, Any], Hooks]]:
    """Keep a run's key, MLP output and the stream that enters block `start`; the hooks are to be run with."""
    acts: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(act: Tensor, hook: object = None) -> Tensor:
            acts[name] = act.detach()
            return act

        return hook

    entering = models.site(start - 1, "resid_post") if start else models.site(0, "resid_pre")
    modules = {"output": models.output_module(model, layer), "block": cast(Any, model).blocks[0]}

    def keep_output(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            acts[name] = output

        return hook

    handles = [each.register_forward_hook(keep_output(name)) for name, each in modules.items()]
    try:
        yield acts, [(models.key_site(layer), keep("key")), (entering, keep("stream"))]
    finally:
        for handle in handles:
            handle.remove()


def _prefix(
    model: Model, recorded: KeyValues, before: Int[Tensor, "row prefix"], start: int
) -> KeyValues:
    """The recorded keys and values of each row's tokens before its lookup, aligned at their right end."""
    axis = 2 if models.is_bridge(model) else 1

    def align(act: Tensor) -> Tensor:
        index = before.to(act.device)
        index = index[:, None, :, None] if axis == 2 else index[:, :, None, None]
        shape = list(act.shape)
        shape[axis] = before.shape[1]
        return act.gather(axis, index.expand(shape))

    stored = {
        layer: (align(keys), align(values))
        for layer, (keys, values) in recorded.stored.items()
        if layer >= start
    }
    return KeyValues(start=before.shape[1], stored=stored)


@contextlib.contextmanager
def _from_block(model: Model, entry: _Entry, in_tuples: bool) -> Iterator[None]:
    """Let a bridge pass over its blocks before the entry's; its own `start_at_layer` still runs them all."""
    if not models.is_bridge(model):
        yield
        return
    blocks = list(cast(Any, model).blocks)

    def skipped(*args: Any, **kwargs: Any) -> Any:
        return (entry.stream,) if in_tuples else entry.stream

    entering: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if entry.start == 0:
        entering = runs.entering(blocks[0], entry.stream)
    try:
        for block in blocks[: entry.start]:
            vars(block)["forward"] = (
                skipped  # Setting it would reach the module that the bridge holds.
            )
        with entering:
            yield
    finally:
        for block in blocks[: entry.start]:
            vars(block).pop("forward", None)
