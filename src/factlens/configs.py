"""Configurations: YAML files turned into frozen dataclasses.

A model's facts (its noise level, the layer that the paper edits) stand in `configs/<model>.yaml`; the defaults of a
method stand in the dataclass beside the method. A name is mapped to a file by the file's `models:` list, else by its
architecture.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

import yaml

from factlens.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TraceDefaults:
    """What `factlens trace` uses for a model unless told otherwise."""

    window: int = 10
    """Width of the MLP and attention windows, in layers (ROME, Section 2.2)."""
    samples: int = 10
    """Noise draws per fact."""
    noise_level: float | None = None
    """Standard deviation of the embedding noise; None measures 3 sigma on the model."""
    noise_source: str | None = None
    """Where `noise_level` comes from."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One file of `configs/`."""

    name: str
    models: tuple[str, ...] = ()
    """Hub names that this file serves; the first is fetched when a short name is given."""
    architectures: tuple[str, ...] = ()
    """Hugging Face `model_type`s served when no name fits."""
    trace: TraceDefaults = TraceDefaults()
    note: str = ""


def from_mapping(cls: type[T], given: Mapping[str, object], where: str = "") -> T:
    """Build the dataclass `cls`, refusing keys that it does not have.

    Raises:
        ConfigError: an unknown key (the known ones are listed), or a missing one.
    """
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    if unknown := set(given) - known:
        raise ConfigError(
            f"{where or cls.__name__} has no key {', '.join(sorted(unknown))}; "
            f"it has {', '.join(sorted(known))}"
        )
    try:
        return cls(**given)
    except TypeError as error:
        raise ConfigError(f"{where or cls.__name__}: {error}") from None


def read_config(path: Path) -> ModelConfig:
    """Read one model's YAML file.

    Raises:
        ConfigError: not readable, not YAML, or with unknown keys.
    """
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        line = str(error).replace("\n", " ")
        raise ConfigError(f"{path} is not YAML: {line}") from None
    if not isinstance(given, dict):
        raise ConfigError(f"{path} must hold keys and values, as configs/atlas.yaml does")
    trace = from_mapping(TraceDefaults, given.pop("trace", None) or {}, f"'trace' of {path.name}")
    for key in ("models", "architectures"):
        given[key] = tuple(given.get(key) or ())
    return from_mapping(ModelConfig, {"name": path.stem, **given, "trace": trace}, path.name)


def config_folder() -> Path:
    """The folder of bundled configs: inside an installed package, or at the root of a checkout."""
    packaged = Path(str(files("factlens") / "_configs"))
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[2] / "configs"


@cache
def known_configs() -> dict[str, ModelConfig]:
    """Every bundled config by its name."""
    return {path.stem: read_config(path) for path in sorted(config_folder().glob("*.yaml"))}


def config_for(name: str, architecture: str | None = None) -> ModelConfig | None:
    """The config that serves a model, by its name, else by its architecture; None if there is none."""
    short = name.rsplit("/", 1)[-1].lower()
    for config in known_configs().values():
        served = {config.name, *config.models}
        if name in served or short in {each.rsplit("/", 1)[-1].lower() for each in served}:
            return config
    for config in known_configs().values():
        plain = [each.replace("_", "") for each in config.architectures]
        if architecture and architecture.replace("_", "") in plain:
            return config
    return None
