"""What an edit adds to a weight, kept factored where it can be: rank one, low rank, or dense.

All in the row convention `key @ W_out`: `left` is in the space of the weight's inputs, `right` in that of its outputs.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from factlens.errors import EditError

# Identity, not equality: comparing two tensors gives a tensor.


@dataclass(frozen=True, eq=False)
class RankOne:
    """The change `left ⊗ right`: d_mlp + d_model numbers, as ROME makes it (Eq. 2)."""

    left: Float[Tensor, " d_mlp"]
    right: Float[Tensor, " d_model"]

    def dense(self) -> Float[Tensor, "d_mlp d_model"]:
        """The whole matrix."""
        return einsum(*_one_type(self.left, self.right), "d_mlp, d_model -> d_mlp d_model")

    def norm(self) -> float:
        """Frobenius norm."""
        return float(self.left.double().norm() * self.right.double().norm())


@dataclass(frozen=True, eq=False)
class LowRank:
    """The change `left @ right`: a sum of `rank` changes of rank one, as several edits of one weight are."""

    left: Float[Tensor, "d_mlp rank"]
    right: Float[Tensor, "rank d_model"]

    def dense(self) -> Float[Tensor, "d_mlp d_model"]:
        """The whole matrix."""
        return einsum(
            *_one_type(self.left, self.right), "d_mlp rank, rank d_model -> d_mlp d_model"
        )

    def norm(self) -> float:
        """Frobenius norm, from the factors' Gram matrices."""
        return max(0.0, inner(self, self)) ** 0.5


@dataclass(frozen=True, eq=False)
class Dense:
    """Any change, entry by entry, as fine-tuning makes it: of a matrix, of a bias, or of all heads of W_Q, W_K or W_V."""

    delta: Float[Tensor, "..."]

    def dense(self) -> Float[Tensor, "..."]:
        """The whole of it."""
        return self.delta

    def norm(self) -> float:
        """Frobenius norm."""
        return float(torch.linalg.vector_norm(self.delta, dtype=torch.float64))


Change = RankOne | LowRank | Dense
KINDS: dict[str, type[RankOne] | type[LowRank] | type[Dense]] = {
    "rank-one": RankOne,
    "low-rank": LowRank,
    "dense": Dense,
}
_AXES = {"rank-one": (1,), "low-rank": (2,), "dense": (1, 2, 3)}
"""How many axes a part may have: a bias has one, W_Q is [head_index d_model d_head]."""
_TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*(\.[A-Za-z0-9][A-Za-z0-9_]*)*")


def kind_of(change: Change) -> str:
    """ "rank-one", "low-rank" or "dense"."""
    return next(kind for kind, cls in KINDS.items() if isinstance(change, cls))


def check_parts(name: str, kind: str, parts: Mapping[str, Tensor]) -> None:
    """Refuse the parts of a change of `kind` to the weight `name` that cannot be added to one.

    Raises:
        EditError: a name that is no dotted path, a part that lacks, shapes that do not fit together, or numbers that are
            not finite.
    """
    if not _NAME.fullmatch(name):
        raise EditError(f"{name[:80]!r} is no weight's name; one looks like 'blocks.5.mlp.W_out'")
    if lacking := [field.name for field in fields(KINDS[kind]) if field.name not in parts]:
        raise EditError(f"the {kind} change of {name} lacks its part {lacking[0]!r}")
    shapes = {key: tuple(part.shape) for key, part in parts.items()}
    joined = kind != "low-rank" or shapes["left"][-1:] == shapes["right"][:1]
    if not joined or any(len(shape) not in _AXES[kind] or 0 in shape for shape in shapes.values()):
        raise EditError(f"the {kind} change of {name} has parts of shapes {shapes}")
    for key, part in parts.items():
        if part.dtype not in _TYPES:
            raise EditError(
                f"the part {key!r} of the change of {name} is {part.dtype}; a change is of {', '.join(map(str, _TYPES))}"
            )
        if not bool(part.isfinite().all()):
            raise EditError(f"the part {key!r} of the change of {name} holds NaN or infinity")


def _one_type(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Factors may come from a solve in float64 and a model in float32."""
    wide = torch.promote_types(left.dtype, right.dtype)
    return left.to(wide), right.to(wide)


def tensors_of(change: Change) -> dict[str, Tensor]:
    """The tensors that make up the change, by the names of its fields."""
    return {field.name: getattr(change, field.name) for field in fields(change)}


def shape_of(change: Change) -> tuple[int, ...]:
    """(d_mlp, d_model) of a matrix, without building it; whatever shape a dense change has."""
    if isinstance(change, Dense):
        return tuple(change.delta.shape)
    return change.left.shape[0], change.right.shape[-1]


def rank_of(change: Change) -> int:
    """The largest rank that the form allows; of a dense change the smaller side, all heads taken as one matrix."""
    if isinstance(change, Dense):
        rows = change.delta.shape[-2] if change.delta.ndim > 1 else 1
        return min(rows, change.delta.numel() // rows)
    inside = change.left.shape[1:] if isinstance(change, LowRank) else (1,)
    return min(*shape_of(change), *inside)


def moved(change: Change, device: torch.device, dtype: torch.dtype | None = None) -> Change:
    """The same change on another device, and in another type where one is given."""
    return type(change)(
        **{name: each.to(device, dtype or each.dtype) for name, each in tensors_of(change).items()}
    )


def added(one: Change, other: Change) -> Change:
    """The sum of two changes of one weight: factored if both are.

    Raises:
        EditError: their shapes differ.
    """
    if shape_of(one) != shape_of(other):
        raise EditError(
            f"changes of the shapes {shape_of(one)} and {shape_of(other)} cannot be added; they are of different weights"
        )
    other = moved(other, next(iter(tensors_of(one).values())).device)
    if isinstance(one, Dense) or isinstance(other, Dense):
        return Dense(torch.add(*_one_type(one.dense(), other.dense())))
    (left, right), (more_left, more_right) = _factors(one), _factors(other)
    lefts = _one_type(left, more_left)
    rights = _one_type(right, more_right)
    return LowRank(torch.cat(lefts, dim=1), torch.cat(rights, dim=0))


def inner(one: Change, other: Change) -> float:
    """Frobenius inner product; the matrices are built only where one of them is dense."""
    if isinstance(one, Dense) or isinstance(other, Dense):
        return float((one.dense().cpu().double() * other.dense().cpu().double()).sum())
    (left, right), (other_left, other_right) = _factors(one), _factors(other)
    # <A B, C D> = sum of (Aᵀ C) * (B Dᵀ).
    between_lefts = einsum(
        left.cpu().double(), other_left.cpu().double(), "d_mlp rank, d_mlp other -> rank other"
    )
    between_rights = einsum(
        right.cpu().double(),
        other_right.cpu().double(),
        "rank d_model, other d_model -> rank other",
    )
    return float((between_lefts * between_rights).sum())


def cosines(one: Change, other: Change) -> tuple[float, float, float]:
    """The cosines of two changes as vectors, of their left factors, and of their right ones.

    NaN where one of them is zero, and for the factors unless both changes are of rank one.
    """
    whole = _cosine(inner(one, other), one.norm(), other.norm())
    if not (isinstance(one, RankOne) and isinstance(other, RankOne)):
        return whole, float("nan"), float("nan")
    return whole, _angle(one.left, other.left), _angle(one.right, other.right)


def _angle(one: Tensor, other: Tensor) -> float:
    one, other = one.detach().cpu().double(), other.detach().cpu().double()
    return _cosine(float(one @ other), float(one.norm()), float(other.norm()))


def _cosine(product: float, *norms: float) -> float:
    return product / (norms[0] * norms[1]) if all(norms) else float("nan")


def _factors(
    change: RankOne | LowRank,
) -> tuple[Float[Tensor, "d_mlp rank"], Float[Tensor, "rank d_model"]]:
    if isinstance(change, LowRank):
        return change.left, change.right
    return rearrange(change.left, "d_mlp -> d_mlp 1"), rearrange(
        change.right, "d_model -> 1 d_model"
    )
