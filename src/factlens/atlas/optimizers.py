"""The optimizers of a training, taken as one: AdamW, or Muon for the blocks' matrices beside it.

Muon (Jordan et al., 2024) makes every update of a matrix nearly orthogonal, so that rare directions
move as far as common ones. Facts that are seldom seen are such directions: after 2.6 million
tokens the baseline knew 69 % of its statements, and with AdamW alone 21 % (docs/atlas.md).
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from factlens.atlas.recipes import Recipe, learning_rate

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.775, 2.0315)
"""Of the iteration x -> ax + bx³ + cx⁵ on singular values, which brings small ones near 1 in a few steps."""
STEPS = 5
SMALLEST = 1e-7
"""A matrix of a smaller norm is not divided by it."""


class Muon(torch.optim.Optimizer):
    """Muon in the precision of the weights, matrices of one shape side by side.

    `torch.optim.Muon` orthogonalises in bfloat16, one matrix after another. Processors without bfloat16 emulate it, at several
    times the cost of the rest of a step.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float) -> None:
        """Take the matrices; the numbers are those of `torch.optim.Muon`."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every matrix along its orthogonalised momentum."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, dict[Tensor, Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:  # of a block that does not run yet there is none
                    momentum = self._momentum(weight, weight.grad)
                    by_shape.setdefault(weight.shape, {})[weight] = momentum
            for shape, weights in by_shape.items():
                moved = orthogonal(torch.stack([*weights.values()]))
                rate = group["lr"] * math.sqrt(max(1, shape[0] / shape[1]))
                for weight, towards in zip(weights, moved, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(towards, alpha=-rate)

    def _momentum(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """Nesterov's momentum of a matrix, once its gradient is taken in."""
        kept: Tensor = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
        kept.lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(kept, MOMENTUM)


def orthogonal(matrices: Float[Tensor, "matrix row column"]) -> Float[Tensor, "matrix row column"]:
    """About the nearest matrices of which all singular values are 1, by five steps of a quintic Newton-Schulz iteration.

    Each step multiplies by a polynomial of the Gram matrix alone. So the steps are taken on that, [row, row] with the fewer rows, and only their
    product touches the matrix: about half of the operations for one that is four times as wide as high. For a square one they would be more.
    """
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    scaled = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=SMALLEST)
    linear, cubic, quintic = COEFFICIENTS
    gram = scaled @ scaled.mT
    total = None
    for step in range(STEPS):
        factor = torch.baddbmm(gram, gram, gram, beta=cubic, alpha=quintic)
        factor.diagonal(dim1=1, dim2=2).add_(linear)
        total = factor if total is None else factor @ total
        if step + 1 < STEPS:
            gram = factor @ gram @ factor
    found = total @ scaled
    return found if wide is matrices else found.mT


class Optimizers:
    """Several optimizers that step together. Their tensors have one name each, so that a run can be saved."""

    def __init__(self, parts: Sequence[tuple[torch.optim.Optimizer, float]]) -> None:
        """Take the optimizers, each with its learning rate as a multiple of the recipe's."""
        self.parts = tuple(parts)

    def step(self, recipe: Recipe, step: int) -> None:
        """Move the weights along their gradients, with the learning rate of `step`."""
        rate = learning_rate(recipe, step)
        for optimizer, factor in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for optimizer, _ in self.parts:
            optimizer.zero_grad(set_to_none=True)

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """What the optimizers remember, by `part.parameter.moment`."""
        for part, (optimizer, _) in enumerate(self.parts):
            for index, kept in optimizer.state_dict()["state"].items():
                for name, value in kept.items():
                    yield f"{part}.{index}.{name}", value

    def load_moments(self, moments: dict[str, Tensor]) -> None:
        """Put back what `moments` gave."""
        for part, (optimizer, _) in enumerate(self.parts):
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in moments.items():
                of, index, name = key.split(".")
                if int(of) == part:
                    state.setdefault(int(index), {})[name] = value
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})


def new_optimizers(recipe: Recipe, model: nn.Module) -> Optimizers:
    """The optimizers of a recipe; the learning rate is set at each step."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, weight in model.named_parameters():
        (matrices if weight.ndim == 2 and ".h." in name else others).append(weight)
    decay = recipe.weight_decay
    small = decay if recipe.decayed == "all" else 0.0
    if recipe.optimizer == "adamw":
        if recipe.decayed == "all":
            return Optimizers([(adamw(recipe, model.parameters(), decay), 1.0)])
        parts = [(adamw(recipe, others, small), 1.0), (adamw(recipe, matrices, decay), 1.0)]
        return Optimizers(parts)
    muon = Muon(matrices, lr=0.0, weight_decay=decay)
    return Optimizers([(adamw(recipe, others, small), 1.0), (muon, recipe.muon_learning_rate)])


def adamw(
    recipe: Recipe, parameters: Iterator[nn.Parameter] | Sequence[Tensor], decay: float
) -> torch.optim.AdamW:
    """AdamW in the recipe's numbers."""
    return torch.optim.AdamW(parameters, lr=0.0, betas=recipe.betas, weight_decay=decay)
