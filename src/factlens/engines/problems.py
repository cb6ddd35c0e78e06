"""What every engine is given and gives back."""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from factlens.types import Logits, Noise, Tokens

METRICS = ("prob", "logprob", "logit_diff", "kl")
"""The measured quantities, in the order of the `metric` axis: the answer's probability, its log, its logit minus the
foil's (NaN without a foil), and KL(clean || this run) over the vocabulary in nats (NaN without a reference)."""
EFFECTS = ("indirect", "direct")
"""Indirect: a part is restored in the corrupted run. Direct: it is held at its corrupted value in the clean run, so
that what is left of the total effect flows past it (ROME, footnote 5)."""
SIGNS = {"kl": -1.0}
"""Metrics that fall as a run comes back to the clean one; their effects are counted the other way round."""


@dataclass(frozen=True)
class Readout:
    """How much the model says the answer: from the logits at the last `keep` positions.

    `answer` has one token (the paper) or several, teacher-forced: the product of their probabilities. Softmax is in
    float32 whatever the model's type.
    """

    answer: Int[Tensor, " keep"]
    foil: int | None = None
    reference: Float[Tensor, "keep d_vocab"] | None = None
    """Log-probabilities of the clean run."""

    @property
    def keep(self) -> int:
        """At how many last positions the logits are read."""
        return int(self.answer.shape[0])

    def __call__(self, logits: Logits) -> Float[Tensor, "row metric"]:
        """`METRICS` of each row; `logits` may hold more positions than are read."""
        logits = logits[:, -self.keep :]
        answer = self.answer.to(logits.device)
        picked = logits.gather(2, answer[None, :, None].expand(logits.shape[0], -1, 1))[..., 0]
        # Not log_softmax: that would write a second tensor as large as the logits.
        total = torch.logsumexp(logits.float(), dim=-1)
        logprob = (picked.float() - total).sum(dim=-1)
        if self.foil is None:
            margin = torch.full_like(logprob, torch.nan)
        else:
            margin = (picked[:, 0] - logits[:, 0, self.foil]).float()
        divergence = torch.full_like(logprob, torch.nan)
        if self.reference is not None:
            clean = self.reference.to(logits.device)
            gap = clean - (logits.float() - total[..., None])
            divergence = (clean.exp() * gap).sum(dim=(1, 2))
        return torch.stack([logprob.exp(), logprob, margin, divergence], dim=-1).cpu()


@dataclass(frozen=True)
class Problem:
    """One prompt to be traced."""

    tokens: Tokens
    """One row; it ends with all but the last token of a multi-token answer."""
    subject: tuple[int, int]
    noise: Noise
    cells: pd.DataFrame
    """The plan; results come in its order."""
    readout: Readout
    direct: bool = False
    """Hold a part at its corrupted value in the clean run, instead of restoring it in the corrupted one."""

    @property
    def shape(self) -> tuple[int, int, int, bool]:
        """Problems of one shape can share their passes: tokens, noise samples, positions read, and what is held."""
        return self.tokens.shape[1], self.noise.shape[0], self.readout.keep, self.direct


@dataclass(frozen=True)
class Answers:
    """What an engine measured, in units of `METRICS`."""

    clean: Float[Tensor, " metric"]
    corrupted: Float[Tensor, "sample metric"]
    restored: Float[Tensor, "cell sample metric"]
    prefix_reuse: bool = False


Progress = Callable[[int, int], None]
"""Told (cells done, cells in all)."""


def no_progress(done: int, total: int) -> None:
    """Tell nobody."""


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA has a class for it; the CPU's allocator only a message."""
    kinds = torch.OutOfMemoryError | MemoryError
    messages = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, kinds) or any(message in str(error) for message in messages)
