"""FT and FT+L: fine-tuning the output matrix of one MLP on the new fact (ROME, Section 3.4).

    FT      Adam with early stopping on W_out and b_out of one layer, to minimise -log P[o* | x]
    FT+L    the same, with every weight held within ±ε of where it was, after each step (Zhu et al., 2020)

FT says the new fact, and says it of the neighbours too; FT+L leaves the neighbours alone, and paraphrases with them (Table 2).
Published numbers are taken for the models that they are of; for others each step is a hundredth of the weights' root mean
square, and FT+L's ε a twentieth, chosen on records of the bundled model that are not tested on. Differs from the official code for targets of
several tokens, which that reads from one position: here they are teacher-forced, each from its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from factlens import linear_maps
from factlens.editors import register_each, several
from factlens.editors.spaces import Range, Space
from factlens.editors.tuning import fine_tune
from factlens.editors.tuning_config import Config, Method, TuningConfig
from factlens.edits import Edit
from factlens.engines.problems import Progress, no_progress
from factlens.facts import Rewrite
from factlens.linear_maps import LinearMap
from factlens.models import Model


@dataclass(frozen=True, kw_only=True)
class FTConfig(TuningConfig):
    """FT's numbers, by default the official ones for GPT-2 XL."""


@dataclass(frozen=True, kw_only=True)
class FTLConfig(TuningConfig):
    """FT+L's numbers, by default the official ones for GPT-2 XL."""

    max_change: float = 5e-4
    """ε, the most that any one weight may change."""

    @property
    def bound(self) -> float | None:
        """ε."""
        return self.max_change


def ft(
    model: Model,
    rewrites: Rewrite | Sequence[Rewrite],
    config: Config = None,
    *,
    progress: Progress = no_progress,
) -> Edit:
    """Make the model say another object for a subject by fine-tuning one `W_out` and its bias (FT; ROME, Section 3.4).

    Several rewrites are tuned together, their loss being the mean. The weights are left as they were.

    Args:
        model: a hooked model; under `applied(...)` the edit is computed on top.
        rewrites: what to change.
        config: an `FTConfig`, a mapping that changes the model's own numbers, or None for those (`tuning_config.config_for`).
        progress: told (steps done, steps in all).

    Raises:
        What `tuning.fine_tune` raises.
    """
    return fine_tune(model, FT, [several(rewrites)], config, progress)[0]


def ft_l(
    model: Model,
    rewrites: Rewrite | Sequence[Rewrite],
    config: Config = None,
    *,
    progress: Progress = no_progress,
) -> Edit:
    """`ft` in which no weight goes further than `max_change` (FT+L; ROME, Section 3.4; Zhu et al., 2020).

    Takes an `FTLConfig` or a mapping; the rest is as of `ft`.
    """
    return fine_tune(model, FT_L, [several(rewrites)], config, progress)[0]


def ft_each(
    model: Model,
    rewrites: Sequence[Rewrite],
    config: Config = None,
    *,
    progress: Progress = no_progress,
) -> list[Edit]:
    """One edit for each rewrite, as `ft` gives it alone."""
    return fine_tune(model, FT, [[each] for each in rewrites], config, progress)


def ft_l_each(
    model: Model,
    rewrites: Sequence[Rewrite],
    config: Config = None,
    *,
    progress: Progress = no_progress,
) -> list[Edit]:
    """One edit for each rewrite, as `ft_l` gives it alone."""
    return fine_tune(model, FT_L, [[each] for each in rewrites], config, progress)


def _output(model: Model, layer: int) -> list[LinearMap]:
    return [linear_maps.output_map(model, layer)]


STEPS = Range(0.001, 0.1)
"""Steps of Adam: a tenth to ten times what is taken where nothing is known."""

FT = Method(
    "ft", FTConfig, _output, (1, 48), {"learning_rate": 0.01}, Space({"learning_rate": STEPS})
)
FT_L = Method(
    "ft-l",
    FTLConfig,
    _output,
    (0, 48),
    {"learning_rate": 0.01, "max_change": 0.05},
    Space({"learning_rate": STEPS, "max_change": Range(0.005, 0.5)}),
)

register_each(ft, ft_each)
register_each(ft_l, ft_l_each)
