"""The optimizers of a training, taken as one: AdamW, or Muon for the blocks' matrices beside it.

Muon (Jordan et al., 2024) makes every update of a matrix nearly orthogonal, so that rare directions
move as far as common ones. Facts that are seldom seen are such directions: after 2.6 million
tokens the baseline knew 69 % of its statements, and with AdamW alone 21 % (docs/atlas.md).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from factlens.atlas.recipes import Recipe, learning_rate
from factlens.errors import ConfigError


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
    """The optimizers of a recipe; the learning rate is set at each step.

    Raises:
        ConfigError: the recipe asks for Muon, and this torch has none.
    """
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
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError(
            f"optimizer='muon' needs torch 2.9 or newer, and this is {torch.__version__}; take 'adamw'"
        )
    muon = torch.optim.Muon(matrices, lr=0.0, weight_decay=decay)
    return Optimizers([(adamw(recipe, others, small), 1.0), (muon, recipe.muon_learning_rate)])


def adamw(
    recipe: Recipe, parameters: Iterator[nn.Parameter] | Sequence[Tensor], decay: float
) -> torch.optim.AdamW:
    """AdamW in the recipe's numbers."""
    return torch.optim.AdamW(parameters, lr=0.0, betas=recipe.betas, weight_decay=decay)
