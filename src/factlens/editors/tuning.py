"""What fine-tuning one fact into a few weights takes, whichever they are (ROME, Section 3.4).

No weight is written. What the change ΔW of a weight does is added where its output passes, x @ ΔW, and Adam works on ΔW alone:
the weights need no putting back, and independent edits are tuned in one batch, each row with its own ΔW. Adam and the
bound work entry by entry, so every edit takes the path that it would take alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from factlens import edits, models
from factlens.changes import Dense
from factlens.derivatives import differentiable
from factlens.editors.questions import Question, bare_questions
from factlens.editors.realising import compare, logprob, say_what_happened
from factlens.editors.tuning_config import Config, Method, TuningConfig, config_for
from factlens.edits import Edit
from factlens.engines.problems import Progress, is_out_of_memory, no_progress
from factlens.errors import EditError, OutOfMemory
from factlens.facts import Rewrite
from factlens.linear_maps import LinearMap
from factlens.models import Model
from factlens.tails import Reads, only_reading

TOGETHER, MEMORY = 16, 2**30
"""Edits that are tuned in one batch: as many as these bytes hold, up to so many."""
COPIES = 6
"""Of each weight, that an edit takes: the change, its gradient, Adam's two moments, and those of its rows."""


# -- the edit --------------------------------------------------------------------------------------


@torch.inference_mode(False)  # Gradients are taken, whatever the caller has switched off.
def fine_tune(
    model: Model,
    method: Method,
    groups: Sequence[Sequence[Rewrite]],
    given: Config = None,
    progress: Progress = no_progress,
) -> list[Edit]:
    """One edit for each group of rewrites, which it makes together: its loss is their mean. The weights are left as they were.

    Raises:
        ConfigError: as `config_for`.
        ModelUnsupported: a model that is spread over several devices.
        SubjectNotFound, PromptTooLong: of a rewrite.
        EditError: no rewrite, weights that cannot be written, a loss that is not a number, or an edit that does not give
            what was found.
        OutOfMemory: what one edit takes.
    """
    models.check_one_device(model)
    plan = config_for(model, method, given)
    maps = method.maps(model, int(str(plan.layer)))
    weights = edits.weights_of(model, [name for each in maps for name in names_of(each)])
    asked = [bare_questions(model, rewrites) for rewrites in groups]
    entries = sum(weight.numel() for weight in weights.values())
    together = max(1, min(TOGETHER, MEMORY // (4 * COPIES * entries)))
    made = []
    for start in range(0, len(asked), together):
        part = asked[start : start + together]

        def tell(done: int, total: int, start: int = start, count: int = len(part)) -> None:
            progress(start * total + done * count, len(asked) * total)

        for questions, tuned in zip(part, _that_fit(model, maps, part, plan, tell), strict=True):
            made.append(_edit(model, method, plan, maps, questions, tuned))
    return made


def _that_fit(model: Model, maps: Sequence[LinearMap], *rest: Any) -> list["Tuned"]:
    try:
        return tune(model, maps, *rest)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    raise OutOfMemory(
        f"tuning {maps[0].weight} of {models.model_name(model)} does not fit into memory, which takes its gradient and Adam's moments; "
        "give fewer rewrites at once, or a narrower dtype"
    )


def _edit(
    model: Model,
    method: Method,
    plan: TuningConfig,
    maps: Sequence[LinearMap],
    questions: Sequence[Question],
    tuned: "Tuned",
) -> Edit:
    """The edit with its provenance, once it is seen to do what was found."""
    rewrites = [each.rewrite for each in questions]
    info = edits.info_for(model, method.name, asdict(plan), rewrites)
    edit = Edit({name: Dense(delta) for name, delta in tuned.changes.items()}, info)
    deltas = {name: delta[None] for name, delta in tuned.changes.items()}
    owners = torch.zeros(1, dtype=torch.long, device=models.device_of(model))
    results = []
    for each in questions:
        with added(maps, deltas, owners):
            wanted = logprob(model, each)
        seen = compare(model, edit, each, wanted)
        say_what_happened(each.rewrite, seen, "try more steps, or a larger learning_rate or bound")
        results.append(
            {
                "layer": plan.layer,
                "steps": len(tuned.losses) - 1,
                "loss_first": tuned.losses[0],
                "loss_last": tuned.losses[-1],
                "losses": {"step": list(range(len(tuned.losses))), "loss": tuned.losses},
                **seen,
            }
        )
    return replace(edit, info={**edit.info, "results": results})


# -- descent ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tuned:
    """What was found for one edit."""

    changes: Mapping[str, Float[Tensor, "..."]]
    """By the weight's name; in float32 at least."""
    losses: list[float]
    """The loss before each update and after the last, in nats per target token."""


def tune(
    model: Model,
    maps: Sequence[LinearMap],
    groups: Sequence[Sequence[Question]],
    config: TuningConfig,
    progress: Progress = no_progress,
) -> list[Tuned]:
    """Adam with early stopping on the weights of `maps`, to minimise -log P[o* | x]; one result for each group of questions.

    After every update each entry of the change is cut to the bound, if there is one. Targets are teacher-forced, and the loss is the mean
    over their tokens, then over a group's questions.

    Raises:
        EditError: a loss that is not a number.
    """
    # Differs from the official code, which reads all of a target's tokens from one position.
    deltas = _zeros(model, maps, len(groups))
    adam = torch.optim.Adam(deltas.values(), lr=config.learning_rate)
    losses: list[list[float]] = [[] for _ in groups]
    found: dict[int, dict[str, Tensor]] = {}
    active = list(range(len(groups)))
    with differentiable(model):
        for step in range(config.steps + 1):
            batch = _batch(groups, active, models.device_of(model))
            loss = _losses(model, maps, deltas, batch, len(groups))
            for number in active:
                losses[number].append(float(loss[number].detach()))
            _check_finite(groups, losses, active)
            progress(step, config.steps)
            going = [n for n in active if losses[n][-1] >= config.stop_loss]
            going = going if step < config.steps else []
            for number in set(active) - set(going):
                found[number] = {k: delta[number].detach().clone() for k, delta in deltas.items()}
            if not going:
                break
            adam.zero_grad()
            loss[going].sum().backward()
            adam.step()
            if config.bound is not None:
                for delta in deltas.values():
                    delta.data.clamp_(-config.bound, config.bound)
            active = going
    progress(config.steps, config.steps)
    return [Tuned(found[number], losses[number]) for number in range(len(groups))]


def _zeros(model: Model, maps: Sequence[LinearMap], count: int) -> dict[str, Tensor]:
    """No change yet of any weight, one for each edit."""
    found = {}
    for name in [name for each in maps for name in names_of(each)]:
        weight = cast(Tensor, models.weight(model, name))
        wide = torch.promote_types(weight.dtype, torch.float32)
        found[name] = torch.zeros(
            count, *weight.shape, dtype=wide, device=weight.device, requires_grad=True
        )
    return found


def _check_finite(
    groups: Sequence[Sequence[Question]], losses: list[list[float]], active: list[int]
) -> None:
    for number in active:
        if not torch.isfinite(torch.tensor(losses[number][-1])):
            raise EditError(
                f"the loss for {groups[number][0].rewrite.prompt!r} is not a number after {len(losses[number]) - 1} steps; use a "
                "smaller learning_rate, or float32 weights"
            )


# -- the loss --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """The bare prompts of some edits, with their targets behind them."""

    tokens: Int[Tensor, "row pos"]
    owners: Int[Tensor, " row"]
    """The edit that each row belongs to."""
    reads: Reads
    """Where target tokens are predicted."""
    target: Int[Tensor, " read"]
    weight: Float[Tensor, " read"]
    """One over the edit's number of rows and the target's of tokens: the losses are means of means."""


def _batch(
    groups: Sequence[Sequence[Question]], active: Sequence[int], device: torch.device
) -> _Batch:
    asked = [(number, each, len(groups[number])) for number in active for each in groups[number]]
    rows = [each.rows[0] for _, each, _ in asked]
    longest = max(map(len, rows))
    # Padded by the last token, so that no model takes the padding for such and masks it in its own way.
    padded = [torch.cat([row, row[-1:].expand(longest - len(row))]) for row in rows]
    reads = [
        (row, each.starts[0] + n, int(token), 1 / (count * len(each.target)))
        for row, (_, each, count) in enumerate(asked)
        for n, token in enumerate(each.target)
    ]
    at, positions, target, weight = (
        torch.tensor(column, device=device) for column in zip(*reads, strict=True)
    )
    owners = torch.tensor([number for number, *_ in asked], device=device)
    return _Batch(torch.stack(padded).to(device), owners, Reads(at, positions), target, weight)


def _losses(
    model: Model,
    maps: Sequence[LinearMap],
    deltas: Mapping[str, Tensor],
    batch: _Batch,
    count: int,
) -> Float[Tensor, " edit"]:
    """Mean negative log-probability per target token, in nats; of edits without a row in the batch it says nothing."""
    with added(maps, deltas, batch.owners), only_reading(model, batch.reads):
        logits = cast(Any, model).run_with_hooks(batch.tokens, fwd_hooks=[])[0]
    wide = torch.promote_types(logits.dtype, torch.float32)
    told = logits.to(wide).log_softmax(-1).gather(1, batch.target[:, None])[:, 0]
    of = batch.owners[batch.reads.rows]
    return told.new_zeros(count).index_add(0, of, -batch.weight.to(wide) * told)


# -- changes that are on no weight -----------------------------------------------------------------


def names_of(each: LinearMap) -> list[str]:
    """The names of a map's weights."""
    return [each.weight] if each.bias is None else [each.weight, each.bias]


@contextmanager
def added(
    maps: Sequence[LinearMap],
    deltas: Mapping[str, Float[Tensor, "edit ..."]],
    owners: Int[Tensor, " row"],
) -> Iterator[None]:
    """Let the model give what it would with `deltas` added to its weights, each row with those of its own edit.

    For the length of a `with` block; gradients reach `deltas`.
    """
    handles = []
    for each in maps:
        see, gain = _gaining(each, deltas, owners)
        handles.append(each.entering.register_forward_hook(see))
        handles.append(each.leaving.register_forward_hook(gain))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gaining(
    each: LinearMap, deltas: Mapping[str, Tensor], owners: Int[Tensor, " row"]
) -> tuple[Callable[..., None], Callable[..., Tensor]]:
    """The hooks of one map: what enters it is seen, and x @ ΔW + Δb is added to what leaves it."""
    matrix = deltas[each.weight]
    if matrix.ndim == 4:
        # All heads side by side, as they leave.
        matrix = rearrange(matrix, "edit head_index d_in d_out -> edit d_in (head_index d_out)")
    bias = None if each.bias is None else rearrange(deltas[each.bias], "edit ... -> edit 1 (...)")
    # One edit for all rows is not copied for each.
    own = 0 if len(matrix) == 1 else owners
    seen: list[Tensor] = []

    def see(module: nn.Module, args: tuple, output: Tensor) -> None:
        seen[:] = [output]

    def gain(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        # OPT hands its MLP all rows and positions in one axis.
        act = seen[0].reshape(len(owners), -1, matrix.shape[1]).to(matrix.dtype)
        moved = act @ matrix[own]
        moved = moved if bias is None else moved + bias[own]
        return (output.to(matrix.dtype) + moved.reshape(output.shape)).to(output.dtype)

    return see, gain
