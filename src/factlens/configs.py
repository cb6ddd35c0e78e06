"""Configurations: YAML files turned into frozen dataclasses.

A model's facts (its noise level, the layer that the paper edits) stand in `configs/<model>.yaml`; the defaults of a
method stand in the dataclass beside the method. A name is mapped to a file by the file's `models:` list, else by its
architecture.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import yaml

from factlens.errors import ConfigError

T = TypeVar("T")

FINE_TUNED = ("ft", "ft-l", "attn-edit")
TRAINED = ("mend", "mend-cf", "mend-zsre", "ke", "ke-cf", "ke-zsre")
"""The editors that `fine_tuning` and `trained_editors` have numbers of."""
CHOSEN = "chosen by factlens"
"""How a `..._source` begins whose numbers a command chose on the model itself; any other says who published them."""


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
    rome: Mapping[str, object] = field(default_factory=dict)
    """ROME's numbers where they differ from the method's defaults; `editors.rome_config` checks them."""
    rome_source: str = ""
    """Where `rome` comes from."""
    fine_tuning: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """The numbers of FT, FT+L and AttnEdit, each under its editor's name; `editors.tuning_config` checks them."""
    fine_tuning_source: str = ""
    """Where `fine_tuning` comes from."""
    knowledge_neurons: Mapping[str, object] = field(default_factory=dict)
    """KN's numbers where they differ from the method's defaults; `editors.knowledge_neurons` checks them."""
    knowledge_neurons_source: str = ""
    """Where `knowledge_neurons` comes from."""
    trained_editors: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """How the changes of MEND and KE are scaled, each under its editor's name; `editors.trained_edits` checks it."""
    trained_editors_source: str = ""
    """Where `trained_editors` comes from."""
    layers: int | None = None
    """Blocks of the model that the layers in `rome` and `fine_tuning` are for; a model of another depth is edited at the same share of its own."""
    note: str = ""

    def is_named(self, name: str) -> bool:
        """Whether it serves a model of this name."""
        short, served = name.rsplit("/", 1)[-1].lower(), {self.name, *self.models}
        return name in served or short in {each.rsplit("/", 1)[-1].lower() for each in served}

    def is_built(self, architecture: str | None) -> bool:
        """Whether it serves models of this architecture whose name fits no config."""
        plain = [each.replace("_", "") for each in self.architectures]
        return bool(architecture) and str(architecture).replace("_", "") in plain

    def is_chosen(self, section: str) -> bool:
        """Whether the numbers of a section were chosen on the model by factlens, and not published."""
        return str(getattr(self, f"{section}_source")).startswith(CHOSEN)


def from_mapping(cls: type[T], given: Mapping[str, object], where: str = "") -> T:
    """Build the dataclass `cls`, refusing keys that it does not have.

    Raises:
        ConfigError: an unknown key (the known ones are listed), or a missing one.
    """
    known = {each.name for each in fields(cls)}  # type: ignore[arg-type]
    if unknown := set(given) - known:
        raise ConfigError(
            f"{where or cls.__name__} has no key {', '.join(sorted(unknown))}; "
            f"it has {', '.join(sorted(known))}"
        )
    try:
        return cls(**given)
    except TypeError as error:
        raise ConfigError(f"{where or cls.__name__}: {error}") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file of keys and values.

    Raises:
        ConfigError: not readable, not YAML, or something else than keys and values.
    """
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except yaml.YAMLError as error:
        line = str(error).replace("\n", " ")
        raise ConfigError(f"{path} is not YAML: {line}") from None
    if not isinstance(given, dict):
        raise ConfigError(f"{path} must hold keys and values, as configs/atlas.yaml does")
    return given


def read_config(path: Path) -> ModelConfig:
    """Read one model's YAML file.

    Raises:
        ConfigError: not readable, not YAML, or with unknown keys.
    """
    given = read_mapping(path)
    trace = from_mapping(TraceDefaults, given.pop("trace", None) or {}, f"'trace' of {path.name}")
    for key in ("models", "architectures"):
        given[key] = tuple(given.get(key) or ())
    for section, example in (("rome", "layer: 17"), ("knowledge_neurons", "threshold: 0.2")):
        if not isinstance(given.setdefault(section, {}), dict):
            raise ConfigError(
                f"'{section}' of {path.name} must hold keys and values, as in {{{example}}}"
            )
    for section, names in (("fine_tuning", FINE_TUNED), ("trained_editors", TRAINED)):
        _check_by_editor(given.setdefault(section, {}), names, f"'{section}' of {path.name}")
    return from_mapping(ModelConfig, {"name": path.stem, **given, "trace": trace}, path.name)


def _check_by_editor(given: object, names: Sequence[str], where: str) -> None:
    """Refuse a section that does not hold keys and values under names of editors."""
    if not isinstance(given, dict) or not all(isinstance(each, dict) for each in given.values()):
        raise ConfigError(
            f"{where} must hold keys and values of each editor, as in {{{names[0]}: {{...}}}}"
        )
    if unknown := [name for name in given if name not in names]:
        raise ConfigError(f"{where} has no editor {unknown[0]!r}; it has {', '.join(names)}")


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
    known = known_configs().values()
    found = [each for each in known if each.is_named(name)]
    found += [each for each in known if each.is_built(architecture)]
    return found[0] if found else None


# -- checks of values ------------------------------------------------------------------------------

Check = Callable[[str, object], Any]
"""Of a key and what was given for it: the value to use, or a `ConfigError`."""


def refused(method: str, name: str, value: object, allowed: str) -> ConfigError:
    """The one line for a value that cannot be."""
    return ConfigError(f"{method}'s {name} is {value!r}; it must be {allowed}")


def word(method: str, words: Sequence[str]) -> Check:
    """One of `words`."""

    def check(name: str, value: object) -> str:
        if not isinstance(value, str) or value not in words:
            raise refused(method, name, value, " or ".join(map(repr, words)))
        return value

    return check


def number(method: str, least: float, *, above: bool = False) -> Check:
    """A finite number from `least`, or only above it."""

    def check(name: str, value: object) -> float:
        found = as_number(value)
        if found is None or found < least or (above and found == least):
            bound = f"above {least:g}" if above else f"of at least {least:g}"
            raise refused(method, name, value, f"a number {bound}")
        return found

    return check


def whole(method: str, least: int, *, optional: bool = False) -> Check:
    """A whole number from `least`; None too where it is `optional`."""

    def check(name: str, value: object) -> int | None:
        if value is None and optional:
            return None
        found = as_number(value)
        if found is None or found != int(found) or found < least:
            raise refused(method, name, value, f"a whole number of at least {least}")
        return int(found)

    return check


def as_number(value: object) -> float | None:
    """A finite number, else None; also one written as `5e-1`, which YAML's rules leave a string."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None
