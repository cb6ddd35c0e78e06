"""The numbers of fine-tuning a fact: one dataclass, the methods that use it, and what a model's own config adds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import cast

import torch
from torch import Tensor

from factlens import configs, models
from factlens.editors.spaces import Space, rounded
from factlens.errors import ConfigError
from factlens.linear_maps import LinearMap
from factlens.models import Model

NAME = "fine-tuning"


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """The numbers of fine-tuning; the defaults are those of the official FT for GPT-2 XL.

    Raises:
        ConfigError: a value that cannot be, with those that can.
    """

    layer: int | None = None
    """Block whose weights are tuned, from 0; None is the model's (`config_for`)."""
    steps: int = 25
    """Updates at most."""
    learning_rate: float = 5e-4
    """Of Adam."""
    stop_loss: float = 1e-2
    """No further update once the loss is below."""

    def __post_init__(self) -> None:
        for name in asdict(self):
            object.__setattr__(self, name, _CHECKS[name](name, getattr(self, name)))

    @property
    def bound(self) -> float | None:
        """The largest change of any one weight; None where there is no bound."""
        return None


_CHECKS: dict[str, configs.Check] = {
    "layer": configs.whole(NAME, 0, optional=True),
    "steps": configs.whole(NAME, 1),
    "learning_rate": configs.number(NAME, 0.0, above=True),
    "stop_loss": configs.number(NAME, 0.0),
    "max_change": configs.number(NAME, 0.0, above=True),
}

Config = TuningConfig | Mapping[str, object] | None


@dataclass(frozen=True)
class Method:
    """A way of fine-tuning: which weights, and by which numbers."""

    name: str
    """The editor's, and the key of its published numbers in `configs/*.yaml`."""
    config: type[TuningConfig]
    maps: Callable[[Model, int], Sequence[LinearMap]]
    """The linear maps of a layer that are tuned."""
    depth: tuple[int, int]
    """The paper's layer of GPT-2 XL and its 48 blocks; other models are tuned at that share of their depth."""
    relative: Mapping[str, float]
    """Numbers for a model of which none are known, as multiples of the root mean square of its weights that are tuned, which
    may be of any size."""
    space: Space
    """What is chosen on a model besides the layer, as such multiples too."""


def config_for(
    model: Model, method: Method, given: Config = None, *, chosen: bool = True
) -> TuningConfig:
    """The numbers to tune `model` with; `layer` is a layer of it.

    Those that are published for the model, or chosen on it, stand in `configs/*.yaml`; for any other they are made of the method's
    `relative` ones, at the same share of its depth. A mapping changes them where it names them. A config of the method's class names
    all of them, so only its `layer` is filled in. Those that were `chosen` on the model may be left out (`spaces`).

    Raises:
        ConfigError: a layer that the model has not, an unknown key, or another method's config.
    """
    layer, known = _own(model, method, chosen)
    if isinstance(given, method.config):
        return _checked(model, given if given.layer is not None else replace(given, layer=layer))
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(
            f"{method.name} takes a mapping or a {method.config.__name__}, not {type(given).__name__}"
        )
    named = {k: v for k, v in (given or {}).items() if (k, v) != ("layer", None)}
    own = {"layer": layer, **(known or {}), **named}
    # Converted first: YAML has `4` and `5e-4` for numbers.
    own |= {name: _CHECKS[name](name, value) for name, value in own.items() if name in _CHECKS}
    config = _checked(model, configs.from_mapping(method.config, own, f"{method.name}'s config"))
    if known is not None:
        return config
    size = _size(model, method, int(str(config.layer)))
    relative = {k: ratio * size for k, ratio in method.relative.items() if k not in named}
    return replace(config, **relative)  # type: ignore[arg-type]


def of_weights(
    model: Model, method: Method, layer: int, ratios: Mapping[str, float]
) -> dict[str, float]:
    """Numbers of a layer from multiples of the root mean square of its weights that are tuned."""
    size = _size(model, method, layer)
    return {name: rounded(ratio * size) for name, ratio in ratios.items()}


def _own(model: Model, method: Method, chosen: bool) -> tuple[int, dict[str, object] | None]:
    """The model's layer, and its numbers if there are any in its config."""
    found = models.config_of(model)
    depth, (layer, of) = models.n_layers(model), method.depth
    if found is None or (found.is_chosen("fine_tuning") and not chosen):
        return layer * depth // of, None
    if found.layers is not None and method.name in found.fine_tuning:
        known = dict(found.fine_tuning[method.name])
        if "layer" not in known:
            raise ConfigError(
                f"{method.name} of {found.name}.yaml has no layer; it needs one, as in {{layer: {layer}}}"
            )
        layer, of = int(str(known["layer"])), found.layers
        if of == depth:
            return layer, known
    return layer * depth // of, None


def _checked(model: Model, config: TuningConfig) -> TuningConfig:
    depth = models.n_layers(model)
    if config.layer is not None and config.layer >= depth:
        raise ConfigError(
            f"layer {config.layer} does not exist: {models.model_name(model)} has {depth} layers, 0 to {depth - 1}"
        )
    return config


def _size(model: Model, method: Method, layer: int) -> float:
    """The root mean square of the weights of a layer that are tuned, without their biases."""
    maps = method.maps(model, layer)
    weights = [cast(Tensor, models.weight(model, each.weight)).detach() for each in maps]
    total = sum(float(torch.linalg.vector_norm(w, dtype=torch.float64)) ** 2 for w in weights)
    return (total / sum(weight.numel() for weight in weights)) ** 0.5
