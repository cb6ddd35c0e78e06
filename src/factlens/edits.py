"""Putting edits into a model's weights, and taking them out: nothing else in factlens writes a weight.

Inside `with applied(model, edit):` the model is the edited one; after it, what it was, to the bit.
"""

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from factlens import models
from factlens.changes import moved, shape_of
from factlens.edit_files import Edit as Edit
from factlens.edit_files import difference as difference
from factlens.edit_files import info_for as info_for
from factlens.edit_files import whose
from factlens.errors import EditError
from factlens.fingerprints import remembered_fingerprint
from factlens.models import Model


@dataclass(eq=False)
class _Layer:
    """An edit that is on a model for the length of a block, and what it covers."""

    edit: Edit
    fingerprint: str
    """The model's before it."""
    before: dict[str, Tensor] = field(default_factory=dict)
    """The weights below it."""


_stacks: "weakref.WeakKeyDictionary[Model, list[_Layer]]" = weakref.WeakKeyDictionary()
_permanent: "weakref.WeakKeyDictionary[Model, list[str]]" = weakref.WeakKeyDictionary()
"""The model's fingerprints before each of the edits that it keeps."""


@contextlib.contextmanager
def applied(model: Model, edit: Edit, *, strict: bool = True) -> Iterator[Model]:
    """Put an edit into the model's weights for the length of a `with` block; afterwards they are what they were, to the bit.

    The sum is taken in float32 and rounded to the weight's type. Blocks nest, also on one weight, and any exception or Ctrl-C
    restores too. Whatever else is written to an edited weight inside the block is lost with it.

    Args:
        model: a hooked model.
        edit: one computed on the model as it is now, or as it was before any of the edits now on it.
        strict: refuse an edit of another model (by fingerprint); False looks at shapes alone.

    Raises:
        EditError: the edit belongs to another model, or to this one processed differently, or does not fit its shapes.
    """
    layer, targets = _checked(model, edit, strict)
    stack = _stacks.setdefault(model, [])
    stack.append(layer)
    try:
        _put_on(layer, targets)
        yield model
    finally:
        # Several blocks may end in any order: take off what lies above, and put it on again.
        above = stack[stack.index(layer) + 1 :]
        for each in (*reversed(above), layer):
            _take_off(model, each)
        stack.remove(layer)
        for each in above:
            _put_on(each, weights_of(model, each.edit.changes))


def apply_permanently(model: Model, edit: Edit, *, strict: bool = True) -> None:
    """Put an edit into the model's weights for good. `applied` is what undoes itself.

    Raises:
        EditError: as `applied`, or inside a block of it, whose end would undo this edit too.
    """
    if _stacks.get(model):
        raise EditError(
            "apply_permanently inside `with applied(...)` would be undone at the block's end; leave the block first"
        )
    layer, targets = _checked(model, edit, strict)
    try:
        _put_on(layer, targets)
    except BaseException:
        _take_off(model, layer)
        raise
    _permanent.setdefault(model, []).append(layer.fingerprint)


@contextlib.contextmanager
def lifted(model: Model) -> Iterator[None]:
    """The model without the edits that `applied` has put on it, for the length of a `with` block.

    Those of `apply_permanently` stay, since nothing is kept of what was below them.
    """
    temporary = [layer for layer in _stacks.get(model, []) if layer.before]
    try:
        for layer in reversed(temporary):
            _take_off(model, layer)
        yield
    finally:
        for layer in temporary:
            if not layer.before:
                _put_on(layer, weights_of(model, layer.edit.changes))


def edits_kept(model: Model) -> int:
    """How many edits `apply_permanently` has put on the model since it was loaded."""
    return len(_permanent.get(model, []))


def unedited_fingerprint(model: Model) -> str:
    """The model's fingerprint before any of the edits now on it: what its key statistics belong to."""
    return next(iter(_earlier(model)), None) or remembered_fingerprint(model)


def _earlier(model: Model) -> list[str]:
    """The model's fingerprints before each of the edits now on it, the first first."""
    return _permanent.get(model, []) + [each.fingerprint for each in _stacks.get(model, [])]


@torch.no_grad()
def _put_on(layer: _Layer, targets: Mapping[str, Tensor]) -> None:
    for name, weight in targets.items():
        wide = torch.promote_types(weight.dtype, torch.float32)
        change = moved(layer.edit.changes[name], weight.device, wide)
        total = (weight.to(wide) + change.dense()).to(weight.dtype)
        if not bool(total.isfinite().all()):
            raise EditError(
                f"with the edit, {name} overflows {weight.dtype}; load the model in float32 or bfloat16"
            )
        layer.before[name] = weight.detach().clone()
        # In place: on models with nn.Linear this is a transposed view of the parameter.
        weight.copy_(total)


@torch.no_grad()
def _take_off(model: Model, layer: _Layer) -> None:
    weights = weights_of(model, layer.edit.changes)
    for name, before in layer.before.items():
        weights[name].copy_(before)
    layer.before.clear()


# -- whose edit it is ------------------------------------------------------------------------------


def weights_of(model: Model, names: Iterable[str]) -> dict[str, Tensor]:
    """The model's weights of these names, each in the memory of one of its parameters, so that an edit can change it.

    Raises:
        EditError: there is no such weight, or it cannot be written.
    """
    own = {each.untyped_storage().data_ptr() for each in model.parameters()}
    found = {}
    for name in names:
        weight = models.weight(model, name)
        if weight is None:
            raise EditError(
                f"{models.model_name(model)} has no weight {name}, which is to be changed"
            )
        if weight.untyped_storage().data_ptr() not in own or not weight.is_floating_point():
            raise EditError(
                f"{name} of {models.model_name(model)} ({weight.dtype}) is computed from other weights or quantised, and cannot "
                "be written; edit a floating-point weight of its own"
            )
        found[name] = weight
    return found


def _checked(model: Model, edit: Edit, strict: bool) -> tuple[_Layer, dict[str, Tensor]]:
    """The edit, ready to be put on, and the weights that it changes, after every check: nothing is written yet."""
    weights = weights_of(model, edit.changes)
    for name, weight in weights.items():
        if tuple(weight.shape) != shape_of(edit.changes[name]):
            raise EditError(
                f"{name} of {models.model_name(model)} is {tuple(weight.shape)} and the edit's change of it "
                f"{shape_of(edit.changes[name])}; {whose(edit)}"
            )
    given, present = edit.info.get("fingerprint"), remembered_fingerprint(model)
    if strict and given not in [present, *_earlier(model)]:
        raise EditError(
            f"{whose(edit)}, and this one is {models.model_name(model)} ({present[:12]}): "
            f"{_reason(model, edit)}; load the model it was made for, or apply it all the same with strict=False"
        )
    return _Layer(edit, present), weights


def _reason(model: Model, edit: Edit) -> str:
    if edit.info.get("fingerprint") is None:
        return "nothing to know it by"
    for key, here in (
        ("processing", models.processing(model)),
        ("dtype", str(models.dtype_of(model)).removeprefix("torch.")),
    ):
        there = edit.info.get(key, here)
        if there != here:
            what = "processed differently" if key == "processing" else "loaded in another type"
            return f"{what} ({there} there, {here} here)"
    return "other weights"
