"""Trained editors: their files, and which of them belongs to a model.

A file is safetensors. Its metadata has one key, "factlens", whose JSON holds the format, the method, its config, and which model
and data it was trained on. A network belongs to one model, by fingerprint: to another its gradients mean nothing.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from factlens import configs, edits, models
from factlens.corruption import cache_folder
from factlens.editors.hypernetworks import Hypernetwork
from factlens.editors.training_config import TrainingConfig
from factlens.errors import ConfigError, EditorError
from factlens.files import written_whole
from factlens.models import Model

FORMAT = "factlens-editor/1"
DATA = {
    "generic": "plain text",
    "cf": "CounterFact's training split",
    "zsre": "zsRE's training split",
}
"""What an editor can be trained on."""
WIDE = ("steps",)
"""Parameters that are stored in float32 like all statistics; the others in float16."""
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
