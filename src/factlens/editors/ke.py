"""KE, KnowledgeEditor: a network that reads the edit and says what to take of its gradient (De Cao et al., 2021).

    h = the last states of a BiLSTM over the sentence "{true object} >> {new object} || {prompt}"
    α, β, γ, δ, η = a small network of h, for each weight
    ∇' = σ(η) · (α̂ ⊙ ∇ + β̂),   α̂ = softmax(α) γᵀ,   β̂ = softmax(β) δᵀ            (their Section 3.2)
    W' = W - step · ∇'

α̂ and β̂ are of rank one, and with ∇ = Σ_t u_t ⊗ δ_t the product is Σ_t (softmax(α) ⊙ u_t) ⊗ (γ ⊙ δ_t): again pairs, one more than
the gradient has. Softmaxes are over a weight's inputs. Training bounds the KL on unrelated text by a margin: its multiplier λ >= 0 grows
while the KL is above, and shrinks below (their Section 3.3).

Differs from the paper: γ is counted from one and softmax(α) in units of its mean, so that an untrained network gives half of the plain
gradient, which the paper's has to learn; the margin is fixed, where the official code narrows it as training succeeds; λ follows the KL by
plain ascent instead of RMSprop. There is a learned step for each weight, as in the official MEND's own KE, which ROME ran.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from factlens.editors.checkpoints import Method
from factlens.editors.hypernetworks import Asked, Hypernetwork, Pairs
from factlens.editors.trained_edits import editor_of
from factlens.editors.training_config import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class KEConfig(TrainingConfig):
    """KE's numbers. The paper's network is wider, for a model of 110 million parameters: LSTM 256, condition 1024, hidden 128."""

    edit_weight: float = 1.0
    margin: float = 0.01
    multiplier_rate: float = 0.1
    lstm: int = 32
    """States of the LSTM in each direction."""
    condition: int = 64
    """Width of what is made of the sentence."""
    hidden: int = 8
    """Width of each weight's own layer."""


class Conditioner(nn.Module):
    """What is taken of one weight's gradient: α, β over its inputs, γ, δ over its outputs, and η."""

    def __init__(self, d_in: int, d_out: int, config: KEConfig) -> None:
        super().__init__()
        self.sizes = (d_in, d_in, d_out, d_out, 1)
        self.layers = nn.Sequential(
            nn.Linear(config.condition, config.hidden),
            nn.Tanh(),
            nn.Linear(config.hidden, sum(self.sizes)),
        )
        # An untrained network says the same of every sentence: half of the plain gradient.
        nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.layers[-1].bias)  # type: ignore[arg-type]

    def forward(self, said: Float[Tensor, "edit condition"], pairs: Pairs, scale: Tensor) -> Pairs:
        """∇' as pairs, the gradient times `scale`, the last of them β̂, whose entries the network gives in units of one."""
        alpha, beta, gamma, delta, eta = (
            rearrange(part, "edit entry -> edit 1 entry")
            for part in self.layers(said).split(self.sizes, dim=-1)
        )
        gate = torch.sigmoid(eta)
        kept = scale * gate * alpha.softmax(dim=-1) * alpha.shape[-1] * pairs.left
        left = torch.cat([kept, gate * beta.softmax(dim=-1)], dim=1)
        right = torch.cat([(1 + gamma) * pairs.right, delta], dim=1)
        return Pairs(left, right, nn.functional.pad(pairs.there, (0, 1), value=True))


class KENetwork(Hypernetwork):
    """The BiLSTM, and a `Conditioner` for each weight."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], config: KEConfig) -> None:
        super().__init__(shapes)
        d_model = next(d_in for name, (d_in, _) in shapes.items() if name.endswith("W_in"))
        self.lstm = nn.LSTM(d_model, config.lstm, batch_first=True, bidirectional=True)
        self.condition = nn.Linear(2 * config.lstm, config.condition)
        self.conditioners = nn.ModuleList(Conditioner(*kind, config) for kind in shapes.values())

    def forward(self, asked: Asked) -> dict[str, Pairs]:
        """The change of each weight: -step · ∇'."""
        said = self.read(asked)
        found = {}
        for number, name in enumerate(self.shapes):
            ratio = self.scales[number] / self.sizes[number]
            taken = self.conditioners[number](said, asked.gradients[name], ratio)
            step = self.steps[number] * self.sizes[number]
            found[name] = Pairs(-step * taken.left, taken.right, taken.there)
        return found

    def read(self, asked: Asked) -> Float[Tensor, "edit condition"]:
        """What is made of each sentence, from the states in which both directions end."""
        packed = nn.utils.rnn.pack_padded_sequence(
            asked.sentences, asked.lengths, batch_first=True, enforce_sorted=False
        )
        _, (states, _) = self.lstm(packed)
        ends = rearrange(states, "direction edit state -> edit (direction state)")
        return torch.tanh(self.condition(ends))


KE = Method("ke", KEConfig, KENetwork)


# -- the editors -----------------------------------------------------------------------------------

ke, ke_cf, ke_zsre = (editor_of(KE, data) for data in ("generic", "cf", "zsre"))
