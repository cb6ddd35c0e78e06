"""The numbers of training an editor, whichever it is."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from factlens import configs

NAME = "train-editor"


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How an editor is trained. The loss is `edit_weight` x the edit's + a multiplier x the KL on unrelated text.

    Raises:
        ConfigError: a value that cannot be, with those that can.
    """

    steps: int = 2000
    """Updates."""
    batch: int = 8
    """Edits of one update, each by itself."""
    learning_rate: float = 1e-3
    """Of Adam, for the network."""
    step_learning_rate: float = 1e-2
    """Of Adam, for the learned step of each weight, which begins at one."""
    first_step: float = 0.01
    """How far a step of one along the plain gradient moves a weight, as a share of its norm."""
    max_norm: float = 1.0
    """Gradients of the network are cut to this norm."""
    edit_weight: float = 0.1
    """Of the mean negative log-probability per token of the new object, at the prompt and at a paraphrase."""
    margin: float = 0.0
    """The KL, in nats per token, above which its multiplier grows; it shrinks below."""
    multiplier_rate: float = 0.0
    """How fast; with zero the multiplier stays one."""
    text_tokens: int = 32
    """Length of the unrelated texts."""
    check_every: int = 100
    """Updates between two measurements on held-out records; the network that is best there is kept."""
    held: int = 64
    """How many such records."""
    seed: int = 0
    """Of the network's beginning and of the order of the records."""

    def __post_init__(self) -> None:
        for name in asdict(self):
            object.__setattr__(self, name, CHECKS[name](name, getattr(self, name)))


_POSITIVE = ("learning_rate", "step_learning_rate", "first_step", "max_norm", "edit_weight")
_COUNTS = ("steps", "batch", "check_every", "held", "rank", "lstm", "condition", "hidden")
CHECKS: Mapping[str, configs.Check] = {
    **{name: configs.number(NAME, 0.0, above=True) for name in _POSITIVE},
    **{name: configs.number(NAME, 0.0) for name in ("margin", "multiplier_rate")},
    **{name: configs.whole(NAME, 1) for name in _COUNTS},
    "text_tokens": configs.whole(NAME, 2),
    "seed": configs.whole(NAME, 0),
}
