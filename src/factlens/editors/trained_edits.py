"""Edits made by a trained network (MEND, KE): it is told a rewrite's gradients, and proposes a change of each weight."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from factlens import configs, edits, models
from factlens.changes import LowRank
from factlens.editors import EachEditor, Editor, register_each, several
from factlens.editors.checkpoints import (
    DATA,
    Method,
    Trained,
    check_belongs,
    label_of,
    load,
    trained_for,
)
from factlens.editors.hypernetworks import Pairs, Row, ask, changed, edited_maps, shapes_of
from factlens.editors.questions import Question, bare_questions
from factlens.editors.realising import compare, logprob, say_what_happened
from factlens.editors.spaces import Range, Space
from factlens.edits import Edit
from factlens.engines.problems import Progress, is_out_of_memory, no_progress
from factlens.errors import ConfigError, EditorError, OutOfMemory
from factlens.facts import Rewrite
from factlens.linear_maps import LinearMap
from factlens.models import Model

TOGETHER = 16
"""Edits whose gradients are taken in one batch."""
SPACE = Space({"scale": Range(0.05, 5.0)}, layers=False)
"""What is chosen on a model: from a twentieth of the proposed change to five times it."""


_check_scale = configs.number("a trained editor", 0.0, above=True)


@dataclass(frozen=True, kw_only=True)
class FileConfig:
    """What a trained editor can be told.

    Raises:
        ConfigError: a scale that cannot be.
    """

    checkpoint: str | None = None
    """Another file than the model's own."""
    scale: float = 1.0
    """How many times the change that the network proposes is made."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", _check_scale("scale", self.scale))


Config = Trained | FileConfig | Mapping[str, object] | None


def editor_of(method: Method, data: str) -> Editor:
    """The editor that works with the method trained on `data`; many independent edits share its passes."""

    def make(
        model: Model,
        rewrites: Rewrite | Sequence[Rewrite],
        config: Config = None,
        *,
        progress: Progress = no_progress,
    ) -> Edit:
        return edit_with(model, method, data, [several(rewrites)], config, progress)[0]

    def each(
        model: Model,
        rewrites: Sequence[Rewrite],
        config: Config = None,
        *,
        progress: Progress = no_progress,
    ) -> list[Edit]:
        return edit_with(model, method, data, [[one] for one in rewrites], config, progress)

    label = label_of(method, data)
    make.__name__ = label
    make.__doc__ = (
        f"Make the model say another object for a subject, by {label}: {method.name.upper()} trained on {DATA[data]}.\n\n"
        "Several rewrites go into one edit, the sum of what each is alone. `config` may be a `Trained`, or change the model's own\n"
        "numbers: a `scale` of the change, another file as `checkpoint`. The weights are left as they were. Raises what\n"
        "`trained_edits.edit_with` raises."
    )
    own: EachEditor = each
    register_each(make, own)
    return make


@torch.inference_mode(False)  # Gradients are taken, whatever the caller has switched off.
def edit_with(
    model: Model,
    method: Method,
    data: str,
    groups: Sequence[Sequence[Rewrite]],
    given: Config = None,
    progress: Progress = no_progress,
) -> list[Edit]:
    """One edit for each group of rewrites: the sum of what the network makes of each. The weights are left as they were.

    Raises:
        ConfigError: a config that is none.
        EditError: no rewrite, or an edit that is not finite or does not give what was found.
        EditorError: no trained network for the model, or a damaged file.
        ModelUnsupported: a model that is spread over several devices.
        SubjectNotFound, PromptTooLong: of a rewrite.
        OutOfMemory: what the gradients take.
    """
    trained, scale = _trained(model, method, data, given)
    maps = edited_maps(model)
    edits.weights_of(model, [each.weight for each in maps])
    asked = [bare_questions(model, rewrites) for rewrites in groups]
    flat = [each for questions in asked for each in questions]
    made: list[dict[str, Pairs]] = []
    for start in range(0, len(flat), TOGETHER):
        changes = _that_fit(model, maps, trained, flat[start : start + TOGETHER])
        made += [{name: _scaled(pairs, scale) for name, pairs in each.items()} for each in changes]
        progress(len(made), len(flat))
    parts = iter(made)
    return [
        _edit(model, trained, scale, maps, questions, _joined([next(parts) for _ in questions]))
        for questions in asked
    ]


def file_config_for(
    model: Model, label: str, given: FileConfig | Mapping[str, object] | None, chosen: bool = True
) -> FileConfig:
    """What a trained editor, by its label, is told for `model`: the scale of its config (`configs/*.yaml`), where a mapping does not change it.

    A scale that was `chosen` on the model may be left out (`spaces`).

    Raises:
        ConfigError: a number that cannot be, or an unknown key.
    """
    if isinstance(given, FileConfig):
        return given
    config = models.config_of(model)
    own: dict[str, object] = {}
    if config is not None and (chosen or not config.is_chosen("trained_editors")):
        own |= config.trained_editors.get(label, {})
    named = {**own, **(given or {})}
    if "scale" in named:  # Converted first: YAML has `2` and `5e-1` for numbers.
        named["scale"] = _check_scale("scale", named["scale"])
    return configs.from_mapping(FileConfig, named, f"{label}'s config")


def _trained(model: Model, method: Method, data: str, given: Config) -> tuple[Trained, float]:
    """The network that was asked for, in the type that the model's gradients have, and the scale of its changes.

    A network that is given itself says all there is: its changes are made as they are.
    """
    if isinstance(given, Trained) and given.method.name == method.name:
        found, scale = given, 1.0
        check_belongs(model, found)
    elif given is None or isinstance(given, FileConfig | Mapping):
        told = file_config_for(model, label_of(method, data), given)
        scale = told.scale
        if told.checkpoint is None:
            found = trained_for(model, method, data)
        else:
            found = load(Path(told.checkpoint), method)
            check_belongs(model, found)
    else:
        raise ConfigError(
            f"{label_of(method, data)} takes a mapping with a checkpoint or a trained {method.name}, not {given!r:.60}"
        )
    wide = torch.promote_types(models.dtype_of(model), torch.float32)
    network = found.network.to(models.device_of(model), wide)
    if network.shapes != shapes_of(model, edited_maps(model)):
        raise EditorError(
            f"this {method.name} edits {', '.join(network.shapes)}, which are not the weights of "
            f"{models.model_name(model)} that it would edit; train it again"
        )
    return replace(found, network=network.eval()), scale


def _that_fit(
    model: Model, maps: Sequence[LinearMap], trained: Trained, questions: Sequence[Question]
) -> list[dict[str, Pairs]]:
    """The change of each question's own."""
    rows = [Row(tuple(each.rows[0].tolist()), tuple(each.target.tolist())) for each in questions]
    try:
        asked = ask(model, maps, rows, [each.rewrite for each in questions])
        with torch.no_grad():
            changes: dict[str, Pairs] = trained.network(asked)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"the gradients of {len(rows)} edits of {models.model_name(model)} do not fit into memory; give fewer rewrites at once, "
            "or a narrower dtype"
        ) from None
    return [
        {name: _one(pairs, number) for name, pairs in changes.items()}
        for number in range(len(questions))
    ]


def _scaled(pairs: Pairs, scale: float) -> Pairs:
    """So many times the change."""
    return replace(pairs, right=scale * pairs.right)


def _one(pairs: Pairs, number: int) -> Pairs:
    """The pairs of one edit that are there; one of zeros where none is."""
    there = pairs.there[number]
    if not bool(there.any()):
        left, right = pairs.left[number, :1] * 0, pairs.right[number, :1] * 0
    else:
        left, right = pairs.left[number][there], pairs.right[number][there]
    return Pairs(left[None], right[None], torch.ones_like(left[None, :, 0], dtype=torch.bool))


def _joined(parts: Sequence[dict[str, Pairs]]) -> dict[str, Pairs]:
    """The sum of several edits' changes."""
    return {
        name: Pairs(
            *(
                torch.cat([getattr(part[name], key) for part in parts], dim=1)
                for key in (each.name for each in fields(Pairs))
            )
        )
        for name in parts[0]
    }


def _edit(
    model: Model,
    trained: Trained,
    scale: float,
    maps: Sequence[LinearMap],
    questions: Sequence[Question],
    changes: Mapping[str, Pairs],
) -> Edit:
    """The edit with its provenance, once it is seen to do what was found."""
    about = {
        **asdict(trained.config),
        "data": trained.info.get("data"),
        "scale": scale,
        "trained": trained.info,
    }
    label = label_of(trained.method, str(trained.info.get("data")))
    info = edits.info_for(model, label, about, [each.rewrite for each in questions])
    factors = {
        name: LowRank(pairs.left[0].T.contiguous(), pairs.right[0].contiguous())
        for name, pairs in changes.items()
    }
    edit = Edit(factors, info)
    owners = torch.zeros(1, dtype=torch.long, device=models.device_of(model))
    results = []
    for each in questions:
        with changed(maps, changes, owners):
            wanted = logprob(model, each)
        seen = compare(model, edit, each, wanted)
        say_what_happened(each.rewrite, seen, "train the editor for longer, or take another")
        results.append(seen)
    return replace(edit, info={**edit.info, "results": results})
