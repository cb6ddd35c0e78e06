"""Whether an edited weight does what was computed: the check after every edit."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn

from factlens import edits, models
from factlens.changes import LowRank, RankOne
from factlens.editors.questions import Question
from factlens.edits import Edit
from factlens.errors import EditError, FactWarning
from factlens.facts import Rewrite
from factlens.models import Model
from factlens.types import Hooks

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.2}
"""Largest difference in log-probability between the edited model and the run in which its output was moved by hooks."""


def realise(
    model: Model, edit: Edit, layer: int, change: RankOne | LowRank, question: Question
) -> dict[str, float | bool]:
    """Apply `edit` for two runs of the bare prompt, and compare with a run of the untouched weights under hooks.

    The hooks move the MLP's output at every position by `key @ left @ right`, which is what the edited weight should do:
    a wrong layer, a transposed view, a norm after the MLP or a weight that is not the one in use would show.

    Returns `prob_before`, `prob_after` (of the whole target), `first_before`, `first_after` (whether each of its tokens ranks first).

    Raises:
        EditError: the two disagree.
    """
    return realise_layers(model, edit, {layer: change}, question)


def realise_layers(
    model: Model, edit: Edit, changes: Mapping[int, RankOne | LowRank], question: Question
) -> dict[str, float | bool]:
    """`realise` for an edit of several layers' `W_out`."""
    with ExitStack() as moved:
        hooks = [
            hook
            for layer, change in changes.items()
            for hook in moved.enter_context(_moved(model, layer, change))
        ]
        wanted = logprob(model, question, hooks)
    return compare(model, edit, question, wanted)


def compare(
    model: Model, edit: Edit, question: Question, wanted: Float[Tensor, "target d_vocab"]
) -> dict[str, float | bool]:
    """Apply `edit` for one run of the bare prompt, and compare with the `wanted` log-probabilities at the target's tokens.

    Returns and raises what `realise` does.
    """
    before = logprob(model, question)
    with edits.applied(model, edit, strict=False):
        found = logprob(model, question)
    gap = float((wanted - found).abs().max())
    if not gap < TOLERANCE.get(models.dtype_of(model), 1e-3):
        raise EditError(
            f"the edited model does not give what was optimised for {question.rewrite.prompt!r}: log-probabilities differ by {gap:.2g}; "
            f"{' and '.join(edit.changes)} is not what {models.model_name(model)} computes with"
        )
    return {**_said("before", before, question), **_said("after", found, question)}


def say_what_happened(rewrite: Rewrite, seen: Mapping[str, float | bool], advice: str) -> None:
    """Warn of an edit that does nothing, which must not look like one that did; `seen` is of `realise`."""
    said = None
    if seen["first_before"]:
        said = f"the model says {rewrite.target!r} for {rewrite.prompt!r} already (p = {seen['prob_before']:.3f}): there was little to edit"
    elif not seen["first_after"]:
        said = (
            f"the edit of {rewrite.prompt!r} did not take: p({rewrite.target!r}) went from {seen['prob_before']:.3f} to "
            f"{seen['prob_after']:.3f} and is not first; {advice}"
        )
    if said:
        warnings.warn(said, FactWarning, stacklevel=3)


def _said(when: str, logprob: Tensor, question: Question) -> Mapping[str, float | bool]:
    told = logprob.gather(1, question.target.to(logprob.device)[:, None]).sum()
    first = bool((logprob.argmax(dim=1).cpu() == question.target).all())
    return {f"prob_{when}": float(told.exp()), f"first_{when}": first}


def logprob(
    model: Model, question: Question, hooks: Hooks | None = None
) -> Float[Tensor, "target d_vocab"]:
    """Log-probabilities where the bare prompt's target tokens are predicted."""
    tokens = question.rows[0][None].to(models.device_of(model))
    with torch.inference_mode():
        logits = cast(Any, model).run_with_hooks(tokens, fwd_hooks=hooks or [])
    return logits[0, question.starts[0] :].float().log_softmax(-1)


@contextmanager
def _moved(model: Model, layer: int, change: RankOne | LowRank) -> Iterator[Hooks]:
    """Add `key @ change` to the output of `W_out`, at every position, without touching a weight; run with the hooks."""
    left, right = change.left.float(), change.right.float()
    if isinstance(change, RankOne):
        left, right = left[:, None], right[None]
    seen: list[Tensor] = []

    def see(act: Tensor, hook: object = None) -> Tensor:
        seen[:] = [act.float()]
        return act

    def move(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        gain = einsum(seen[0], left.to(output.device), "row pos d_mlp, d_mlp rank -> row pos rank")
        shift = einsum(
            gain, right.to(output.device), "row pos rank, rank d_model -> row pos d_model"
        )
        return (output.float() + shift.reshape(output.shape)).to(output.dtype)

    handle = models.output_module(model, layer).register_forward_hook(move)
    try:
        yield [(models.key_site(layer), see)]
    finally:
        handle.remove()
