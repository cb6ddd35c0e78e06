"""Train an editor's network: through the edited model's loss, with a state from which a killed run goes on bit for bit.

    MEND    0.1 x edit loss + KL        (Mitchell et al., 2022, Section 3.3)
    KE      edit loss + λ (KL - m)      (De Cao et al., 2021, Section 3.3)

The edit loss is the mean negative log-probability per token of the new object under the edit, at its prompt and a paraphrase; the KL is of
the model before the edit from the one after, per token of unrelated text. What a step works on is a pure function of the seed and the
step, and the state is tensors in one safetensors file.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from factlens import edits, models
from factlens.atlas.optimizers import Optimizers
from factlens.derivatives import differentiable
from factlens.editors.checkpoints import Method, Trained, label_of
from factlens.editors.hypernetworks import (
    Hypernetwork,
    Row,
    ask,
    batch_of,
    changed,
    edited_maps,
    logprobs_of,
    mean_by_row,
    nll_of,
    row_of,
    shapes_of,
    text_row,
)
from factlens.editors.lessons import Lesson, Lessons
from factlens.editors.training_config import TrainingConfig
from factlens.engines.problems import Progress, no_progress
from factlens.errors import EditError, OutputError, RunError
from factlens.files import written_whole
from factlens.linear_maps import LinearMap
from factlens.models import Model

STATE, CURVE = "state.safetensors", "curve.jsonl"
_MOMENT, _NETWORK, _BEST, _KEY = "moment.", "network.", "best.", "factlens"


# -- the loss --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drill:
    """Some lessons of one step, as rows."""

    lessons: tuple[Lesson, ...]
    edits: tuple[Row, ...]
    """One for each."""
    again: tuple[Row, ...]
    """A paraphrase of each that has one."""
    owners: tuple[int, ...]
    """Whose the paraphrases are."""
    texts: tuple[Row, ...]
    """An unrelated text for each."""


@dataclass(frozen=True)
class Losses:
    """Of each edit by itself."""

    edit: Tensor
    """Mean negative log-probability per token of the new object at its prompt, in nats."""
    again: Tensor
    """The same at the paraphrases, of those that have one."""
    kl: Tensor
    """KL(before || after) per token of unrelated text, in nats."""
    first: Tensor
    """Whether each of the new object's tokens ranks first at the prompt."""
    first_again: Tensor
    """The same at the paraphrases."""

    @property
    def said(self) -> Tensor:
        """The edit loss: mean over prompts and paraphrases."""
        return torch.cat([self.edit, self.again]).mean()


def drill(model: Model, chosen: Sequence[Lesson], texts: Sequence[str], random: Random) -> Drill:
    """One paraphrase and one unrelated text of each lesson, drawn."""
    again = [
        (number, random.choice(each.paraphrases), each.rewrite.target)
        for number, each in enumerate(chosen)
        if each.paraphrases
    ]
    return Drill(
        tuple(chosen),
        tuple(row_of(model, each.rewrite.prompt, each.rewrite.target) for each in chosen),
        tuple(row_of(model, prompt, target) for _, prompt, target in again),
        tuple(number for number, *_ in again),
        tuple(text_row(model, random.choice(each.unrelated or texts)) for each in chosen),
    )


def losses_of(
    model: Model, maps: Sequence[LinearMap], network: Hypernetwork, given: Drill
) -> Losses:
    """Make each edit, and see what it does; gradients reach the network's parameters."""
    count = len(given.edits)
    asked = ask(model, maps, given.edits, [each.rewrite for each in given.lessons])
    changes = network(asked)
    alone = batch_of(model, given.texts)
    owners = [*range(count), *given.owners, *range(count)]
    batch = batch_of(model, [*given.edits, *given.again, *given.texts], owners)
    with differentiable(model):
        with torch.no_grad():
            before = logprobs_of(model, alone)
        with changed(maps, changes, batch.owners):
            after = logprobs_of(model, batch)
    missed = (after.argmax(dim=-1) != batch.target).to(after.dtype)
    first = mean_by_row(batch, missed) == 0
    text = len(batch.target) - len(alone.target)
    kl = (before.exp() * (before - after[text:])).sum(dim=-1)
    parts = [count, len(given.again), count]
    edit, again, _ = nll_of(batch, after).split(parts)
    return Losses(edit, again, mean_by_row(alone, kl), *first.split(parts)[:2])


@torch.no_grad()
def measure(
    model: Model,
    maps: Sequence[LinearMap],
    network: Hypernetwork,
    drills: Sequence[Drill],
) -> dict[str, float]:
    """Means over edits, in evaluation mode; what no lesson has is left out.

    `edit` and `paraphrase` are nats per token of the new object, `efficacy` and `generalisation` the shares of prompts after which it
    is said, `kl` nats per token of unrelated text.
    """
    training = network.training
    network.eval()
    found = [losses_of(model, maps, network, each) for each in drills]
    network.train(training)
    named = {
        "edit": [each.edit for each in found],
        "paraphrase": [each.again for each in found],
        "kl": [each.kl for each in found],
        "efficacy": [each.first for each in found],
        "generalisation": [each.first_again for each in found],
    }
    every = {name: torch.cat(parts).double() for name, parts in named.items()}
    return {name: float(values.mean()) for name, values in every.items() if len(values)}


# -- the loop --------------------------------------------------------------------------------------


@dataclass
class _Run:
    """What a run consists of, and how far it has come."""

    method: Method
    config: TrainingConfig
    about: dict[str, object]
    """What must be the same to go on."""
    network: Hypernetwork
    optimizers: Optimizers
    multiplier: float = 1.0
    step: int = 0
    seconds: float = 0.0
    best: dict[str, Tensor] = field(default_factory=dict)
    best_loss: float = float("inf")
    curve: list[dict[str, float]] = field(default_factory=list)


def begin(model: Model, method: Method, config: TrainingConfig, given: Lessons) -> Hypernetwork:
    """An untrained network for the model: steps along the plain gradient, with statistics of the first lessons."""
    maps = edited_maps(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = method.network(shapes_of(model, maps), config)
    network.to(models.device_of(model), torch.promote_types(models.dtype_of(model), torch.float32))
    chosen = given.train[: max(config.batch, config.held)]
    rows = [row_of(model, each.rewrite.prompt, each.rewrite.target) for each in chosen]
    asked = ask(model, maps, rows, [each.rewrite for each in chosen])
    norms = {
        name: float(torch.linalg.vector_norm(weight.detach().double()))
        for name, weight in edits.weights_of(model, network.shapes).items()
    }
    network.calibrate(asked, norms, config.first_step)
    with torch.no_grad():
        network.train()(asked)
    return network


@torch.inference_mode(False)
def train(
    model: Model,
    method: Method,
    data: str,
    given: Lessons,
    folder: Path,
    config: TrainingConfig,
    *,
    progress: Progress = no_progress,
    on_check: Callable[[Mapping[str, float]], None] = lambda line: None,
) -> Trained:
    """Train, or go on with the training whose state stands in `folder`; gives the network that was best on held-out lessons.

    That is the one of the lowest `edit_weight` x edit loss + KL there. It is written to `folder` whenever it changes, beside the state and
    the curve, `curve.jsonl` with one measurement a line, the first of the untrained network. The model is left as it was.

    Args:
        model: a hooked model without edits.
        method: `mend.MEND` or `ke.KE`.
        data: what the lessons are of, for the file's name.
        given: the lessons.
        folder: where the state is kept.
        config: of the method's class; only `steps` may differ from an earlier part of the training.
        progress: told (steps done, in all).
        on_check: told each line of the curve.

    Raises:
        RunError: the folder holds another training, or a state that cannot be read.
        EditError: a loss that is not a number, or weights that cannot be written.
        ModelUnsupported: a model that is spread over several devices, or whose MLPs are made otherwise.
        OutputError: the folder cannot be written.
    """
    maps = edited_maps(model)
    run = _resumed(_new(model, method, data, config, given), folder)
    drills = _held(model, given, config)
    started = time.monotonic() - run.seconds
    progress(run.step, config.steps)
    losses: list[dict[str, float]] = []
    if not run.curve:  # What the untrained network does.
        _check(model, maps, run, drills, losses)
        on_check(run.curve[-1])
    while run.step < config.steps:
        losses.append(_take_step(model, maps, run, given))
        progress(run.step, config.steps)
        if run.step % config.check_every == 0 or run.step == config.steps:
            run.seconds = time.monotonic() - started
            _check(model, maps, run, drills, losses)
            losses = []
            _save(run, folder, label_of(method, data))
            on_check(run.curve[-1])
    run.network.load_state_dict(run.best)
    return Trained(method, run.network.eval(), config, _info(run))


def _new(model: Model, method: Method, data: str, config: TrainingConfig, given: Lessons) -> _Run:
    network = begin(model, method, config, given)
    steps = [network.steps]
    others = [each for name, each in network.named_parameters() if name != "steps"]
    adams = [
        (torch.optim.Adam(steps, lr=config.step_learning_rate), 1.0),
        (torch.optim.Adam(others, lr=config.learning_rate), 1.0),
    ]
    numbers = {name: value for name, value in asdict(config).items() if name != "steps"}
    about: dict[str, object] = {
        "method": method.name,
        "data": data,
        "source": given.source,
        "model": models.model_name(model),
        "fingerprint": edits.unedited_fingerprint(model),
        "dtype": str(models.dtype_of(model)).removeprefix("torch."),
        "config": numbers,
    }
    return _Run(method, config, about, network, Optimizers(adams))


def _take_step(
    model: Model, maps: Sequence[LinearMap], run: _Run, given: Lessons
) -> dict[str, float]:
    """One update on lessons drawn by the seed and the step."""
    config, random = run.config, Random(f"{run.config.seed} {run.step}")
    chosen = [random.choice(given.train) for _ in range(config.batch)]
    run.network.train()
    found = losses_of(model, maps, run.network, drill(model, chosen, given.texts, random))
    edit, kl = found.said, found.kl.mean()
    loss = config.edit_weight * edit + run.multiplier * (kl - config.margin)
    if not bool(loss.isfinite()):
        raise EditError(
            f"the loss is not a number at step {run.step}; use a smaller learning_rate or first_step, or float32 weights"
        )
    run.optimizers.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.network.parameters(), config.max_norm)
    for optimizer, _ in run.optimizers.parts:
        optimizer.step()
    ascent = config.multiplier_rate * (float(kl.detach()) - config.margin)
    run.multiplier = max(0.0, run.multiplier + ascent)
    run.step += 1
    return {"train_edit": float(edit.detach()), "train_kl": float(kl.detach())}


def _held(model: Model, given: Lessons, config: TrainingConfig) -> list[Drill]:
    """The held-out lessons with their texts, the same at every measurement."""
    random, chosen = Random("held"), given.held[: config.held]
    return [
        drill(model, chosen[start : start + config.batch], given.texts, random)
        for start in range(0, len(chosen), config.batch)
    ]


def _check(
    model: Model,
    maps: Sequence[LinearMap],
    run: _Run,
    drills: Sequence[Drill],
    losses: Sequence[Mapping[str, float]],
) -> None:
    """Measure on the held-out lessons, add a line to the curve, and keep the network if none was better."""
    held = measure(model, maps, run.network, drills)
    said = [held[name] for name in ("edit", "paraphrase") if name in held]
    # Without KE's multiplier, which changes from one measurement to the next.
    loss = run.config.edit_weight * sum(said) / len(said) + held["kl"]
    means = {
        name: sum(each[name] for each in losses) / len(losses)
        for name in (losses[0] if losses else ())
    }
    run.curve.append(
        {"step": run.step, **means, "multiplier": run.multiplier, "loss": loss, **held}
    )
    if loss < run.best_loss:
        run.best_loss = loss
        run.best = {name: each.detach().clone() for name, each in run.network.state_dict().items()}


# -- the state of a run ----------------------------------------------------------------------------


def _save(run: _Run, folder: Path, label: str) -> None:
    """Write the state, the curve and the best network, each whole or not at all; the state last, since a run goes on from it."""
    tensors = {f"{_NETWORK}{name}": each for name, each in run.network.state_dict().items()}
    tensors |= {f"{_BEST}{name}": each for name, each in run.best.items()}
    tensors |= {f"{_MOMENT}{name}": each for name, each in run.optimizers.moments()}
    note = {
        "about": run.about,
        "step": run.step,
        "seconds": run.seconds,
        "multiplier": run.multiplier,
        "best_loss": run.best_loss,
        "curve": run.curve,
    }
    content = save(
        {name: each.detach().cpu().contiguous() for name, each in tensors.items()},
        metadata={_KEY: json.dumps(note)},
    )
    _write_best(run, folder / f"{label}.safetensors")
    with written_whole(folder / CURVE) as partial:
        partial.write_text("".join(f"{json.dumps(line)}\n" for line in run.curve), "utf-8")
    with written_whole(folder / STATE) as partial:
        partial.write_bytes(content)


def _write_best(run: _Run, path: Path) -> None:
    present = {name: each.clone() for name, each in run.network.state_dict().items()}
    run.network.load_state_dict(run.best)
    try:
        Trained(run.method, run.network, run.config, _info(run)).save(path)
    finally:
        run.network.load_state_dict(present)


def _info(run: _Run) -> dict[str, object]:
    """What a trained network says of itself."""
    known = ("model", "fingerprint", "dtype", "data", "source")
    best = min(run.curve, key=lambda line: line["loss"])
    return {
        **{name: run.about[name] for name in known},
        "trained_steps": run.step,
        "seconds": round(run.seconds, 1),
        "held_out": {name: round(value, 6) for name, value in best.items()},
    }


def _resumed(run: _Run, folder: Path) -> _Run:
    """The run as its state in `folder` says; as it is where there is none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}: {error.strerror}") from None
    path = folder / STATE
    if not path.exists():
        return run
    note, tensors = _read(path)
    _check_same(note["about"], run.about, folder)
    run.network.load_state_dict(_part(tensors, _NETWORK))
    run.optimizers.load_moments(_part(tensors, _MOMENT))
    run.best = _part(tensors, _BEST)
    for name in ("step", "seconds", "multiplier", "best_loss", "curve"):
        setattr(run, name, note[name])
    return run


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(str(path), "pt") as file:
            note = json.loads((file.metadata() or {})[_KEY])
            return note, {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        line = " ".join(str(error).split())[:120]
        raise RunError(
            f"{path} is no state of a training, or is cut short ({line}); remove it to begin again"
        ) from None


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): each for n, each in tensors.items() if n.startswith(prefix)}


def _check_same(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """Refuse to go on with a training that was begun otherwise."""
    flat = [
        {**about, **dict(about["config"]), "config": None}  # Name by name, for a person to read.
        for about in (found, wanted)
    ]
    differ = [name for name in flat[1] if flat[0].get(name) != flat[1][name]]
    if differ:
        said = "; ".join(f"{n} was {flat[0].get(n)!r}, now {flat[1][n]!r}" for n in differ)
        raise RunError(
            f"{folder} was begun with another training: {said}. Use another folder (--out), or the settings it was begun with"
        )
