"""MEND: a small network that turns the gradient of one edit into a better change (Mitchell et al., 2022).

    z = (u, δ), each entry less its mean over its standard deviation
    h = z + σ(s₁ ⊙ (U₁V₁z + b₁) + o₁)
    g = h + σ(s₂ ⊙ (U₂V₂h + b₂) + o₂)            (their Section 3.2)
    W' = W - α · Σ_t ũ_t ⊗ δ̃_t,   (ũ, δ̃) being what g adds to z, in the gradient's own units, added to (u, δ)

U, V and b are shared by all weights of one shape; s, o and the step α are each weight's own. U, b and o begin at zero and s at
one, so that an untrained network gives the plain gradient.

Differs from the official code, which keeps g's output normalised: there the first edits are a step along a gradient whose every
entry is rescaled, here along the gradient. Means and deviations are gathered in training and fixed in evaluation; the official
evaluation leaves training mode on, and so begins to gather them anew at the first edit.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from factlens.editors.checkpoints import Method
from factlens.editors.hypernetworks import Asked, Hypernetwork, Pairs
from factlens.editors.trained_edits import editor_of
from factlens.editors.training_config import TrainingConfig

FLOOR = 1e-2
"""Least standard deviation of an entry, as a share of the mean one: an entry that never moved is not to be blown up later."""


@dataclass(frozen=True, kw_only=True)
class MENDConfig(TrainingConfig):
    """MEND's numbers. The official ones are for networks thousands of dimensions wide and a hundred thousand updates: rank 1920, Adam at 1e-6."""

    rank: int = 16
    """Of U and V."""


# -- the network -----------------------------------------------------------------------------------


class Normaliser(nn.Module):
    """Running mean and standard deviation of each entry of a vector: gathered in training mode, fixed in evaluation."""

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("squares", torch.zeros(width))

    def forward(self, vectors: Float[Tensor, "*axes width"]) -> Float[Tensor, "*axes width"]:
        """Each entry less its mean, over its deviation."""
        return (vectors - self.mean) / self.spread

    @property
    def spread(self) -> Float[Tensor, " width"]:
        """Standard deviations, none much smaller than the others; ones before anything was gathered."""
        if self.count < 2:
            return torch.ones_like(self.mean)
        found = (self.squares / (self.count - 1)).sqrt()
        return found.clamp(min=FLOOR * float(found.mean()))

    @torch.no_grad()
    def gather(self, vectors: Float[Tensor, "token width"]) -> None:
        """Take more vectors into account; in which portions they come makes no difference."""
        if not len(vectors):
            return
        more, mean = float(len(vectors)), vectors.mean(dim=0)
        total, apart = self.count + more, mean - self.mean
        self.squares += ((vectors - mean) ** 2).sum(dim=0) + apart**2 * self.count * more / total
        self.mean += apart * more / total
        self.count += more


class Layer(nn.Module):
    """x + σ(s ⊙ (UVx + b) + o), of low rank, with s and o for each weight."""

    def __init__(self, width: int, rank: int, weights: int) -> None:
        super().__init__()
        self.U = nn.Parameter(torch.zeros(rank, width))
        self.V = nn.Parameter(nn.init.xavier_uniform_(torch.empty(width, rank)))
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(weights, width))
        self.shift = nn.Parameter(torch.zeros(weights, width))

    def forward(
        self, x: Float[Tensor, "edit token width"], weight: int
    ) -> Float[Tensor, "edit token width"]:
        """What is added to x for the weight of this number."""
        pre = self.scale[weight] * (x @ self.V @ self.U + self.bias) + self.shift[weight]
        # Not relu: its gradient at zero is zero, and zero is where everything begins.
        return pre.clamp(min=0)


class Transform(nn.Module):
    """The network g of all weights of one shape."""

    def __init__(self, d_in: int, d_out: int, rank: int, weights: int) -> None:
        super().__init__()
        self.inputs, self.deltas = Normaliser(d_in), Normaliser(d_out)
        self.first = Layer(d_in + d_out, rank, weights)
        self.second = Layer(d_in + d_out, rank, weights)

    def forward(self, pairs: Pairs, weight: int) -> Pairs:
        """The edited pairs (ũ, δ̃)."""
        z = torch.cat([self.inputs(pairs.left), self.deltas(pairs.right)], dim=-1)
        gain = self.first(z, weight)
        gain = gain + self.second(z + gain, weight)
        left, right = gain.split([pairs.left.shape[-1], pairs.right.shape[-1]], dim=-1)
        left, right = left * self.inputs.spread, right * self.deltas.spread
        return Pairs(pairs.left + left, pairs.right + right, pairs.there)

    def gather(self, pairs: Pairs) -> None:
        """Take the pairs that are there into the running statistics."""
        self.inputs.gather(pairs.left[pairs.there])
        self.deltas.gather(pairs.right[pairs.there])


class MENDNetwork(Hypernetwork):
    """A `Transform` for each shape of weights, and a step for each weight."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], config: MENDConfig) -> None:
        super().__init__(shapes)
        kinds = list(shapes.values())
        self.transforms = nn.ModuleDict(
            {_name(*kind): Transform(*kind, config.rank, kinds.count(kind)) for kind in kinds}
        )

    def forward(self, asked: Asked) -> dict[str, Pairs]:
        """The change of each weight: -α Σ_t ũ_t ⊗ δ̃_t."""
        if self.training:
            for name, pairs in asked.gradients.items():
                self._of(name)[0].gather(pairs)
        found = {}
        for name, step in zip(self.shapes, self.steps * self.scales, strict=True):
            transform, place = self._of(name)
            edited = transform(asked.gradients[name], place)
            found[name] = Pairs(-step * edited.left, edited.right, edited.there)
        return found

    def _of(self, name: str) -> tuple[Transform, int]:
        """The weight's transform, and its number among those that share it."""
        shape = self.shapes[name]
        same = [other for other, kind in self.shapes.items() if kind == shape]
        return self.transforms[_name(*shape)], same.index(name)  # type: ignore[return-value]


def _name(d_in: int, d_out: int) -> str:
    return f"{d_in}x{d_out}"


MEND = Method("mend", MENDConfig, MENDNetwork)


# -- the editors -----------------------------------------------------------------------------------

mend, mend_cf, mend_zsre = (editor_of(MEND, data) for data in ("generic", "cf", "zsre"))
