"""The second moment of MLP keys, C = E[k kᵀ], and solving with it (ROME, Section 3.1 and Eq. 2).

A moment is kept as a sum and a count, so that shards add. It is uncentred and has no regularisation, as in the paper's
code; where a neuron never fired, or fewer tokens were seen than there are neurons, C has no inverse, and solving takes
the smallest ridge that gives it one and says so.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from factlens.errors import FactWarning, MomentError, SingularMoment

RIDGES = tuple(10.0**power for power in range(-8, 0))
"""Tried in this order, as multiples of the mean of C's diagonal."""
_POWER_STEPS = 60


@dataclass(frozen=True)
class KeyMoment:
    """Uncentred second moment of MLP keys as a sum and a count, so that shards add."""

    total: Float[Tensor, "d_mlp d_mlp"]
    """The sum of k kᵀ over `count` tokens."""
    count: int
    about: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Where it comes from: `model, fingerprint, layer, corpus, digest, asked, documents, context, shards, dtype,
    versions`. Empty for a moment made by hand."""

    def __add__(self, other: "KeyMoment") -> "KeyMoment":
        """The moment of both sets of tokens.

        Raises:
            MomentError: of MLPs of different width, of another model or layer, or of documents counted already.
        """
        if self.total.shape != other.total.shape:
            raise MomentError(
                f"moments of {len(self.total)} and of {len(other.total)} neurons do not add; they are of different layers "
                "or models"
            )
        total = self.total.double() + other.total.double().to(self.total.device)
        return KeyMoment(total, self.count + other.count, _together(self.about, other.about))

    def mean(self) -> Float[Tensor, "d_mlp d_mlp"]:
        """C = E[k kᵀ] in float64.

        Raises:
            MomentError: no token was counted.
        """
        if self.count < 1:
            raise MomentError(f"a moment over {self.count} tokens has no mean; gather some first")
        return _wide(self.total) / self.count


@dataclass(frozen=True)
class Factor:
    """The Cholesky factor of C, or of C with a ridge."""

    lower: Float[Tensor, "d_mlp d_mlp"]
    """In float64: C + ridge = lower @ lowerᵀ."""
    ridge: float
    """What was added to the diagonal, as a multiple of its mean; 0.0 where C needed none."""


def factor(moment: KeyMoment | Float[Tensor, "d_mlp d_mlp"]) -> Factor:
    """Factorise C in float64, with the smallest ridge of `RIDGES` if it is not positive definite as it is.

    A ridge is announced by a `FactWarning` with its size and the reason. Differs from the paper's code, which
    inverts in float32 and says nothing of a matrix that has no inverse.

    Raises:
        SingularMoment: no neuron ever fired, or C is no second moment: no ridge helps.
        MomentError: entries that are not finite.
    """
    mean = moment.mean() if isinstance(moment, KeyMoment) else _wide(moment)
    diagonal = mean.diagonal()
    scale = float(diagonal.mean())
    if not bool(torch.isfinite(mean).all()):
        raise MomentError("the moment has entries that are not finite; gather it again in float32")
    if not scale > 0:
        raise SingularMoment(
            f"none of the {len(mean)} neurons ever fired, so C is zero and has no inverse; edit another layer"
        )
    for ridge in (0.0, *RIDGES):
        lower = _cholesky(mean, ridge * scale)
        if lower is None:
            continue
        if ridge:
            warnings.warn(
                f"C is not positive definite ({_why(mean, moment)}); {ridge:.0e} of its mean diagonal was added to the "
                "diagonal",
                FactWarning,
                stacklevel=2,
            )
        return Factor(lower, ridge)
    raise SingularMoment(
        f"the moment of {len(mean)} neurons is not positive definite even with a ridge of {RIDGES[-1]:g} of its mean "
        "diagonal, so it is no second moment; gather it again"
    )


def solve(factored: Factor, key: Float[Tensor, "*keys d_mlp"]) -> Float[Tensor, "*keys d_mlp"]:
    """C⁻¹ k in float64, for one key or several."""
    wide = key.to(factored.lower)
    columns = wide.reshape(-1, wide.shape[-1]).T
    return torch.cholesky_solve(columns, factored.lower).T.reshape(wide.shape)


def condition_number(moment: Float[Tensor, "d_mlp d_mlp"], factored: Factor) -> float:
    """About the ratio of the largest to the smallest eigenvalue of C with its ridge, by power iteration.

    It comes out a few per cent low at worst; eigenvalues proper would take minutes on a wide MLP.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(moment), dtype=torch.float64, generator=generator)
    large = small = start.to(factored.lower.device)
    top = bottom = torch.ones(())
    for _ in range(_POWER_STEPS):
        large = factored.lower @ (factored.lower.T @ (large / large.norm()))
        small = torch.cholesky_solve((small / small.norm())[:, None], factored.lower)[:, 0]
        top, bottom = large.norm(), small.norm()
    return float(top * bottom)


def numerical_rank(moment: Float[Tensor, "d_mlp d_mlp"], factored: Factor) -> int:
    """How many independent directions the keys have: all of them where C needed no ridge."""
    if not factored.ridge:
        return len(moment)
    values = torch.linalg.eigvalsh(_wide(moment))
    return int((values > len(moment) * torch.finfo(values.dtype).eps * values[-1]).sum())


def silent_neurons(moment: Float[Tensor, "d_mlp d_mlp"]) -> int:
    """How many neurons never fired: zeros on the diagonal."""
    return int((moment.diagonal() == 0).sum())


def _cholesky(mean: Tensor, ridge: float) -> Tensor | None:
    """The factor, or None where a pivot is lost in rounding: a tiny positive one is luck, and its inverse is noise."""
    raised = mean.clone()
    raised.diagonal().add_(ridge)
    lower, failed = torch.linalg.cholesky_ex(raised)
    floor = len(mean) * torch.finfo(mean.dtype).eps * raised.diagonal()
    if int(failed) or not bool((lower.diagonal() ** 2 > floor).all()):
        return None
    return lower


def _why(mean: Tensor, moment: KeyMoment | Tensor) -> str:
    reasons = []
    if silent := silent_neurons(mean):
        reasons.append(f"{silent} of {len(mean)} neurons never fired")
    if isinstance(moment, KeyMoment) and moment.count < len(mean):
        reasons.append(f"{moment.count} tokens for {len(mean)} neurons, gather more")
    return ", ".join(reasons) or "its keys are linearly dependent"


def _wide(matrix: Tensor) -> Tensor:
    """In float64, which Apple's GPUs do not have."""
    return (matrix.cpu() if matrix.device.type == "mps" else matrix).detach().double()


_SAME = ("fingerprint", "layer", "context")


def _together(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a sum.

    Raises:
        MomentError: the two do not belong together, or count the same documents twice.
    """
    if not one or not other:
        return dict(one or other)
    for name in _SAME:
        if one.get(name) != other.get(name):
            raise MomentError(
                f"moments of {name} {one.get(name)!r} and of {name} {other.get(name)!r} do not add"
            )
    shards = {tuple(each) for each in one.get("shards", ())}
    more = {tuple(each) for each in other.get("shards", ())}
    if (one.get("corpus"), one.get("digest")) != (other.get("corpus"), other.get("digest")):
        for each in (shards, more):
            if each and len(each) != next(iter(each))[1]:
                raise MomentError(
                    f"single shards ({_shards_said(each)}) of different corpora do not add; add each corpus up first"
                )
        corpus = f"{one.get('corpus')} + {other.get('corpus')}"
        shards = more = set()
    else:
        corpus = str(one.get("corpus"))
        if (
            len({count for _, count in shards | more}) != 1
            or not shards
            or not more
            or shards & more
        ):
            raise MomentError(
                f"both moments count documents of {corpus!r} "
                f"({_shards_said(shards)}, {_shards_said(more)}); only different shards of one division add"
            )
    return {
        **one,
        "corpus": corpus,
        "documents": int(one.get("documents") or 0) + int(other.get("documents") or 0),
        "shards": sorted(map(list, shards | more)),
    }


def _shards_said(shards: set[tuple[Any, ...]]) -> str:
    return " ".join(f"{part}/{count}" for part, count in sorted(shards)) or "all of them"
