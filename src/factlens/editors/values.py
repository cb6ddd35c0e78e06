"""Step 2 of ROME: the MLP output that makes the model say the new object (Section 3.1, Eq. 4).

Several rewrites are optimised in one batch: each has its own vector, and Adam works entry by entry, so every one takes
the path it would take alone.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from factlens import models, tails
from factlens.derivatives import differentiable
from factlens.editors.questions import Question
from factlens.editors.rome_config import ROMEConfig
from factlens.engines.problems import Progress, is_out_of_memory, no_progress
from factlens.errors import EditError, FactWarning, PlanError
from factlens.facts import Rewrite
from factlens.models import Model
from factlens.tails import Reads, Tails

TERMS = ("loss", "nll", "kl", "decay")
ENGINES = ("auto", "tails", "whole")
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.1}
"""Largest difference in log-probability between the shortened run and the whole one, before anything is changed."""


@dataclass(frozen=True)
class Value:
    """What was found for one rewrite: key, output before the edit, and the shift that brings the new object."""

    layer: int
    key: Float[Tensor, " d_mlp"]
    """k*, the mean over the contexts (Eq. 3)."""
    bare_key: Float[Tensor, " d_mlp"]
    """The bare prompt's own key."""
    spellings: Float[Tensor, "spelling d_mlp"]
    """A mean key for each token by which the subject ends, in the contexts or in "{subject} is a"."""
    output: Float[Tensor, " d_model"]
    """The MLP's output at the lookup token, mean over the contexts, bias included."""
    bare_output: Float[Tensor, " d_model"]
    """v0, the bare prompt's: its norm bounds the shift."""
    shift: Float[Tensor, " d_model"]
    """δ = v* - `output`."""
    losses: pd.DataFrame
    """One row for each evaluation: `step, loss, nll, kl, decay, norm`. nll is in nats per target token, kl in nats times
    its weight, norm is ‖δ‖."""
    steps: Float[Tensor, "step d_model"]
    """δ at each evaluation."""
    question: Question
    engine: str

    @property
    def rewrite(self) -> Rewrite:
        """What is changed."""
        return self.question.rewrite

    @property
    def vector(self) -> Float[Tensor, " d_model"]:
        """v* of Eq. 2: the output that the edited MLP gives at `key`."""
        return self.output + self.shift


Run = Callable[
    [Float[Tensor, "chosen d_model"], Int[Tensor, " chosen"], Reads], Float[Tensor, "read d_vocab"]
]
"""(shift of each chosen row, the chosen rows, what to read) -> logits."""


def optimise(
    model: Model,
    questions: Sequence[Question],
    config: ROMEConfig,
    *,
    engine: str = "auto",
    progress: Progress = no_progress,
) -> list[Value]:
    """The value of each question, all in one batch (Eq. 4).

    `engine="tails"` runs only what the value reaches, "whole" all layers with all logits; "auto" takes the first where its
    run of the unchanged model agrees with the whole one. `progress` is told (steps done, steps in all).

    Raises:
        EditError: a loss that is not a number.
        PlanError: another engine.
    """
    if engine not in ENGINES:
        raise PlanError(f"no engine {engine!r}; there are {', '.join(ENGINES)}")
    rows = [row for question in questions for row in question.rows]
    lookups = [at for question in questions for at in question.lookups]
    first = _asked(questions, range(len(questions)), models.device_of(model))
    with differentiable(model):
        reads = Reads(first.chosen[first.reads.rows], first.reads.positions)
        cut = tails.cut_tails(model, int(str(config.layer)), rows, lookups, reads)
        shortened, whole = runs_of(model, cut, rows)
        used = "whole" if engine == "whole" else "tails"
        if engine == "auto" and not agrees(model, cut, first.chosen, first.reads, shortened):
            used = "whole"
            warnings.warn(
                f"{models.architecture(model)} is run whole in every step, since the shortened run does not give the same",
                FactWarning,
                stacklevel=2,
            )
        run = shortened if used == "tails" else whole
        found = _descend(questions, cut, first, config, run, progress)
    return [
        _value(question, cut, offset, path, used)
        for question, offset, path in zip(questions, _offsets(questions), found, strict=True)
    ]


# -- how rows are run again ------------------------------------------------------------------------


def runs_of(model: Model, cut: Tails, rows: Sequence[Int[Tensor, " _"]]) -> tuple[Run, Run]:
    """How `rows` are run with their outputs at the lookup tokens moved: only what those reach, and the long way."""

    def shortened(shifts: Tensor, chosen: Tensor, reads: Reads) -> Tensor:
        return tails.run_tails(model, cut, shifts, chosen, reads)

    def whole(shifts: Tensor, chosen: Tensor, reads: Reads) -> Tensor:
        picked = [rows[n] for n in chosen.tolist()]
        logits = tails.run_whole(model, cut.layer, picked, cut.lookups[chosen], shifts)
        return logits[reads.rows, reads.positions]

    return shortened, whole


def agrees(
    model: Model, cut: Tails, chosen: Int[Tensor, " chosen"], reads: Reads, run: Run
) -> bool:
    """Whether `run`, with nothing moved, gives what the whole run gave."""
    still = cut.outputs.new_zeros(len(chosen), cut.outputs.shape[1])
    try:
        with torch.no_grad():
            again = run(still, chosen, reads)
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        if is_out_of_memory(error):
            raise  # The long way takes more.
        return False  # An architecture that takes no prefix or no mask of this form: the long way is open.
    gap = again.float().log_softmax(-1) - cut.clean.float().log_softmax(-1)
    return float(gap.abs().max()) < AGREEMENT.get(models.dtype_of(model), 1e-3)


# -- what is read ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    """The rows of some questions, and the logits that their losses need: first of the targets, then of the essence."""

    chosen: Int[Tensor, " chosen"]
    """Rows of the batch."""
    owners: Int[Tensor, " chosen"]
    """The question of each chosen row."""
    reads: Reads
    target: Int[Tensor, " target_read"]
    weight: Float[Tensor, " target_read"]
    """One over the number of contexts and target tokens: the losses are means of means."""
    of: Int[Tensor, " read"]
    """The question of each read."""


def _offsets(questions: Sequence[Question]) -> list[int]:
    """The first row of each question in the batch."""
    offsets, at = [], 0
    for question in questions:
        offsets.append(at)
        at += len(question.rows)
    return offsets


def _asked(questions: Sequence[Question], active: Sequence[int], device: torch.device) -> _Asked:
    offsets = _offsets(questions)
    chosen: list[tuple[int, int]] = []
    targets: list[tuple[int, int, int, float, int]] = []
    essence: list[tuple[int, int, int]] = []
    for number in active:
        question = questions[number]
        share = 1 / (len(question.contexts) * len(question.target))
        for row in question.contexts:
            place, start = len(chosen), question.starts[row]
            chosen.append((offsets[number] + row, number))
            targets += [
                (place, start + n, int(token), share, number)
                for n, token in enumerate(question.target)
            ]
        essence.append((len(chosen), question.starts[-1], number))
        chosen.append((offsets[number] + len(question.rows) - 1, number))
    rows, owners = zip(*chosen, strict=True)
    places, positions, tokens, weights, of = zip(*targets, strict=True)
    at, kl_positions, kl_of = zip(*essence, strict=True)

    def index(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, device=device)

    reads = Reads(index((*places, *at)), index((*positions, *kl_positions)))
    weight = torch.tensor(weights, device=device)
    return _Asked(index(rows), index(owners), reads, index(tokens), weight, index((*of, *kl_of)))


# -- descent ---------------------------------------------------------------------------------------


@dataclass
class _Path:
    """How one question's δ went."""

    shifts: list[Tensor]
    terms: list[list[float]]


def _descend(
    questions: Sequence[Question],
    cut: Tails,
    asked: _Asked,
    config: ROMEConfig,
    run: Run,
    progress: Progress,
) -> list[_Path]:
    """Adam on all δ at once. A question whose loss is small enough leaves the batch with the δ it then has."""
    offsets = torch.tensor(_offsets(questions), device=cut.outputs.device)
    size = cut.outputs[offsets].norm(dim=1)
    shifts = torch.zeros_like(cut.outputs[offsets]).requires_grad_()
    adam = torch.optim.Adam([shifts], lr=config.learning_rate)
    paths = [_Path([], []) for _ in questions]
    essence = cut.clean[len(asked.target) :].float().log_softmax(-1)
    active = list(range(len(questions)))
    for step in range(config.steps):
        logits = run(shifts[asked.owners], asked.chosen, asked.reads)
        terms = _losses(logits, asked, essence[active], shifts, size, config)
        held = shifts.detach().clone()
        for number in active:
            paths[number].shifts.append(held[number])
            paths[number].terms.append([float(term[number].detach()) for term in terms])
        _check_finite(questions, paths, active)
        progress(step + 1, config.steps)
        going = [n for n in active if paths[n].terms[-1][0] >= config.stop_loss]
        if not going or step == config.steps - 1:
            break
        adam.zero_grad()
        terms[0][going].sum().backward()
        adam.step()
        with torch.no_grad():
            room = config.max_norm_ratio * size / shifts.norm(dim=1)
            shifts *= room.clamp(max=1)[:, None]
        if going != active:
            active = going
            asked = _asked(questions, active, cut.outputs.device)
    progress(config.steps, config.steps)
    return paths


def _losses(
    logits: Float[Tensor, "read d_vocab"],
    asked: _Asked,
    essence: Float[Tensor, "kl_read d_vocab"],
    shifts: Float[Tensor, "question d_model"],
    size: Float[Tensor, " question"],
    config: ROMEConfig,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The terms of `TERMS` for every question; those of questions that are not asked say nothing."""
    count, reads = shifts.shape[0], len(asked.target)
    logprob = logits.float().log_softmax(-1)
    told = logprob[:reads].gather(1, asked.target[:, None])[:, 0]
    empty = logprob.new_zeros(count)
    nll = empty.index_add(0, asked.of[:reads], -asked.weight * told)
    # KL(edited || original), as the code has it.
    now = logprob[reads:]
    drift = (now.exp() * (now - essence)).sum(dim=1)
    kl = config.kl_weight * empty.index_add(0, asked.of[reads:], drift)
    decay = config.weight_decay * shifts.norm(dim=1) / size**2
    return nll + kl + decay, nll, kl, decay


def _check_finite(questions: Sequence[Question], paths: Sequence[_Path], active: list[int]) -> None:
    for number in active:
        if not all(map(torch.isfinite, torch.tensor(paths[number].terms[-1]))):
            raise EditError(
                f"the loss for {questions[number].rewrite.prompt!r} is not a number at step {len(paths[number].terms) - 1}; use "
                "a smaller learning_rate, or float32 weights"
            )


def _value(question: Question, cut: Tails, offset: int, path: _Path, used: str) -> Value:
    own = [offset + row for row in question.contexts]
    losses = pd.DataFrame(path.terms, columns=list(TERMS))
    norms = [float(shift.norm()) for shift in path.shifts]
    return Value(
        layer=cut.layer,
        key=cut.keys[own].mean(dim=0),
        bare_key=cut.keys[offset],
        spellings=torch.stack(
            [cut.keys[[offset + row for row in rows]].mean(dim=0) for rows in question.spellings]
        ),
        output=cut.outputs[own].mean(dim=0),
        bare_output=cut.outputs[offset],
        shift=path.shifts[-1],
        losses=losses.assign(norm=norms).rename_axis("step").reset_index(),
        steps=torch.stack(path.shifts),
        question=question,
        engine=used,
    )
