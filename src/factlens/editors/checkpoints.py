"""Trained editors: their files, which of them belongs to a model, and edits made with one.

A file is safetensors. Its metadata has one key, "factlens", whose JSON holds the format, the method, its config, and which model
and data it was trained on. A network belongs to one model, by fingerprint: to another its gradients mean nothing.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from factlens import configs, edits, models
from factlens.changes import LowRank
from factlens.corruption import cache_folder
from factlens.editors import EachEditor, Editor, register_each, several
from factlens.editors.hypernetworks import (
    Hypernetwork,
    Pairs,
    Row,
    ask,
    changed,
    edited_maps,
    shapes_of,
)
from factlens.editors.questions import Question, bare_questions
from factlens.editors.realising import compare, logprob, say_what_happened
from factlens.editors.spaces import Range, Space
from factlens.editors.training_config import TrainingConfig
from factlens.edits import Edit
from factlens.engines.problems import Progress, is_out_of_memory, no_progress
from factlens.errors import ConfigError, EditorError, OutOfMemory
from factlens.facts import Rewrite
from factlens.files import written_whole
from factlens.linear_maps import LinearMap
from factlens.models import Model

FORMAT = "factlens-editor/1"
DATA = {
    "generic": "plain text",
    "cf": "CounterFact's training split",
    "zsre": "zsRE's training split",
}
"""What an editor can be trained on."""
TOGETHER = 16
"""Edits whose gradients are taken in one batch."""
WIDE = ("steps",)
"""Parameters that are stored in float32 like all statistics; the others in float16."""
SPACE = Space({"scale": Range(0.05, 5.0)}, layers=False)
"""What is chosen on a model: from a twentieth of the proposed change to five times it."""
_KEY = "factlens"


@dataclass(frozen=True)
class Method:
    """A kind of network that makes edits."""

    name: str
    config: type[TrainingConfig]
    network: Callable[..., Hypernetwork]
    """`(shapes of the weights by name, config) -> network`, untrained."""


@dataclass(frozen=True, eq=False)
class Trained:
    """A network, and where it comes from."""

    method: Method
    network: Hypernetwork
    config: TrainingConfig
    info: Mapping[str, object] = field(default_factory=dict)
    """`model`, `fingerprint`, `dtype`, `data`, and what training says of itself."""

    def save(self, path: str | Path) -> Path:
        """Write it to one file, whole or not at all; `load` reads it back, rounded to half precision.

        Raises:
            OutputError: the place cannot be written.
        """
        about = {
            "format": FORMAT,
            "method": self.method.name,
            "weights": {name: list(shape) for name, shape in self.network.shapes.items()},
            "config": asdict(self.config),
            "info": dict(self.info),
        }
        content = save(stored(self.network), metadata={_KEY: json.dumps(about)})
        with written_whole(path) as partial:
            partial.write_bytes(content)
        return Path(path)


def stored(network: Hypernetwork) -> dict[str, Tensor]:
    """The network's tensors as files have them: parameters in float16, steps and statistics in float32."""
    halves = {name for name, _ in network.named_parameters()} - set(WIDE)
    return {
        name: tensor.detach()
        .to("cpu", torch.float16 if name in halves else torch.float32)
        .contiguous()
        for name, tensor in network.state_dict().items()
    }


# -- files -----------------------------------------------------------------------------------------


def load(path: str | Path, method: Method) -> Trained:
    """Read what `Trained.save` wrote, in evaluation mode. Nothing in the file is executed.

    Raises:
        EditorError: not there, no safetensors, cut short, of another format or method, or with NaN.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            about = _about(file.metadata(), path, method)
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise EditorError(f"there is no trained editor at {path}") from None
    except OSError as error:
        raise EditorError(
            f"cannot read the trained editor {path}: {error.strerror or error}"
        ) from None
    except SafetensorError as error:
        line = " ".join(str(error).split())[:120]
        raise EditorError(f"{path} is no safetensors file, or is cut short ({line})") from None
    try:
        config = configs.from_mapping(method.config, about["config"])
        shapes = {name: (int(a), int(b)) for name, (a, b) in about["weights"].items()}
        network = method.network(shapes, config)
        network.load_state_dict(tensors)
    except (ConfigError, KeyError, TypeError, ValueError, RuntimeError) as error:
        line = " ".join(str(error).split())[:160]
        raise EditorError(f"{path} is damaged: {line}") from None
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise EditorError(f"{path} is damaged: it holds NaN or infinity")
    return Trained(method, network.eval(), config, about["info"])


def _about(metadata: Mapping[str, str] | None, path: str | Path, method: Method) -> dict[str, Any]:
    text = (metadata or {}).get(_KEY)
    try:
        about = json.loads(text or "")
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise EditorError(f"{path} is no trained editor of this factlens ({FORMAT!r})")
    if about.get("method") != method.name:
        raise EditorError(f"{path} is a trained {about.get('method')}, not a {method.name}")
    if not isinstance(about.get("info"), dict):
        raise EditorError(f"{path} is damaged: its metadata lacks the info")
    return about


# -- which belongs to a model ----------------------------------------------------------------------


def label_of(method: Method, data: str) -> str:
    """ "mend", "mend-cf", "mend-zsre": the editor's name, and its file's."""
    return method.name if data == "generic" else f"{method.name}-{data}"


def own_folder(model: Model, method: Method, data: str) -> Path:
    """Where an editor of the model is trained unless told otherwise, and looked for."""
    mark = edits.unedited_fingerprint(model)[:16]
    return cache_folder() / "editors" / mark / label_of(method, data)


def packaged(method: Method, data: str) -> Path:
    """Where one for the bundled model ships."""
    place = files("factlens.editors") / "trained" / f"{label_of(method, data)}.safetensors"
    return Path(str(place))


def trained_for(model: Model, method: Method, data: str) -> Trained:
    """The model's trained editor: one trained here, else the one that ships.

    Raises:
        EditorError: there is none for this model, and the message says which command makes one; or it is damaged.
    """
    own, shipped = (
        own_folder(model, method, data) / f"{label_of(method, data)}.safetensors",
        packaged(method, data),
    )
    for path in (own, shipped):
        if path.is_file():
            found = load(path, method)
            # What ships is of the bundled model, and says nothing of others.
            if path == own or found.info.get("model") == models.model_name(model):
                check_belongs(model, found, data)
                return found
    raise EditorError(
        f"there is no trained {label_of(method, data)}; {_remedy(model, method, data)}"
    )


def check_belongs(model: Model, trained: Trained, data: str | None = None) -> None:
    """Refuse a network that was trained for another model.

    Raises:
        EditorError: naming both, and the command that trains one.
    """
    own, given = edits.unedited_fingerprint(model), str(trained.info.get("fingerprint"))
    if own == given:
        return
    data = data or str(trained.info.get("data"))
    dtype = str(models.dtype_of(model)).removeprefix("torch.")
    raise EditorError(
        f"this {label_of(trained.method, data)} was trained for {trained.info.get('model')} in "
        f"{trained.info.get('dtype')} ({given[:12]}), and this is {models.model_name(model)} in {dtype} ({own[:12]}), "
        f"whose weights differ; {_remedy(model, trained.method, data)}"
    )


def _remedy(model: Model, method: Method, data: str) -> str:
    name = models.model_name(model)
    return f"`factlens train-editor {method.name} --model {name} --data {data}` trains one"


# -- edits -----------------------------------------------------------------------------------------


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
        "`checkpoints.edit_with` raises."
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
