"""AttnEdit: constrained fine-tuning of one layer's attention on the new fact (ROME, Appendix I).

The late site of causal tracing is attention at the prompt's last token. Whether a fact can be changed there is asked by FT+L
on W_Q, W_K and W_V of all heads of a late layer, with their biases: GPT-2's `c_attn`. The paper's GPT-2 XL learns to give
the rewrite's prompt back and seldom its paraphrases, from which it takes that attention does not hold the fact itself.

Of the biases b_K is free: what all keys gain alike the softmax does not see, so without rotary positions its gradient is
rounding, which Adam makes steps of. It is tuned as in the official code, and does nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from factlens import linear_maps
from factlens.editors import register_each, several
from factlens.editors.fine_tuning import STEPS, FTLConfig
from factlens.editors.spaces import Range, Space
from factlens.editors.tuning import fine_tune
from factlens.editors.tuning_config import Config, Method
from factlens.edits import Edit
from factlens.engines.problems import Progress, no_progress
from factlens.facts import Rewrite
from factlens.models import Model


@dataclass(frozen=True, kw_only=True)
class AttnEditConfig(FTLConfig):
    """AttnEdit's numbers, by default the paper's for GPT-2 XL, where the layer is 33 of 48."""

    learning_rate: float = 1e-3
    max_change: float = 1e-3


def attn_edit(
    model: Model,
    rewrites: Rewrite | Sequence[Rewrite],
    config: Config = None,
    *,
    progress: Progress = no_progress,
) -> Edit:
    """Make the model say another object for a subject by fine-tuning W_Q, W_K and W_V of one layer (ROME, Appendix I).

    Several rewrites are tuned together, their loss being the mean. The weights are left as they were.

    Args:
        model: a hooked model; under `applied(...)` the edit is computed on top.
        rewrites: what to change.
        config: an `AttnEditConfig`, a mapping that changes the model's own numbers, or None for those (`tuning_config.config_for`).
        progress: told (steps done, steps in all).

    Raises:
        What `tuning.fine_tune` raises.
    """
    return fine_tune(model, ATTN_EDIT, [several(rewrites)], config, progress)[0]


def attn_edit_each(
    model: Model,
    rewrites: Sequence[Rewrite],
    config: Config = None,
    *,
    progress: Progress = no_progress,
) -> list[Edit]:
    """One edit for each rewrite, as `attn_edit` gives it alone."""
    return fine_tune(model, ATTN_EDIT, [[each] for each in rewrites], config, progress)


ATTN_EDIT = Method(
    "attn-edit",
    AttnEditConfig,
    linear_maps.attention_maps,
    (33, 48),
    {"learning_rate": 0.01, "max_change": 0.1},
    Space({"learning_rate": STEPS, "max_change": Range(0.01, 1.0)}),
)

register_each(attn_edit, attn_edit_each)
