"""The editors whose numbers are chosen on a model: which numbers those are, and the settings that are tried.

By which rule settings are drawn stands in `editors.spaces`, the numbers and their ranges beside each editor.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from factlens import models
from factlens.editors import (
    Editor,
    attention,
    checkpoints,
    fine_tuning,
    ke,
    mend,
    rome_config,
    trained_edits,
)
from factlens.editors import knowledge_neurons as neurons
from factlens.editors.rome import rome
from factlens.editors.spaces import LAYER, Setting, Space, draw, near, rounded
from factlens.editors.tuning_config import Method, config_for, of_weights
from factlens.errors import EditorError, PlanError
from factlens.models import Model

Numbers = dict[str, Any]
"""Every number of an editor by its name, as its config takes them."""


def _as_drawn(model: Model, setting: Setting) -> Mapping[str, float]:
    return {name: rounded(number) for name, number in setting.numbers.items()}


@dataclass(frozen=True)
class Tunable:
    """An editor whose numbers are chosen."""

    editor: Editor
    section: tuple[str, ...]
    """Where its numbers stand in a model's config."""
    space: Space
    config: Callable[[Model, Mapping[str, object]], Numbers]
    """`(model, changes) -> all numbers`: the default ones, which were not chosen on the model, with changes."""
    drawn: Callable[[Model, Setting], Mapping[str, float]] = _as_drawn
    """The numbers of a drawn setting but for its layer, for the model."""
    network: tuple[checkpoints.Method, str] | None = None
    """What must have been trained for the model, and on which data."""


def settings_of(model: Model, name: str, count: int, seed: int = 0) -> list[Numbers]:
    """The settings of an editor that are tried: the default first, then `count` - 1 that are drawn.

    The draw depends on the editor's name, the count, the seed, and how many layers the model has.

    Raises:
        PlanError: no such editor, or no setting at all.
    """
    of = tunable(name)
    if count < 1:
        raise PlanError(f"at least one setting is tried, the default, not {count}")
    found = draw(of.space, models.n_layers(model), count - 1, str(seed), name)
    return [of.config(model, {}), *(_numbers(model, of, each) for each in found)]


def settings_near(
    model: Model,
    name: str,
    numbers: Mapping[str, Any],
    count: int,
    seed: int,
    place: int,
    further: int = 1,
) -> list[Numbers]:
    """`count` settings of an editor near one that was tried, at most `further` layers away; `place` tells several draws apart."""
    of = tunable(name)
    layer = int(numbers[LAYER]) if of.space.layers else None
    unit = of.drawn(model, Setting(layer, dict.fromkeys(of.space.numbers, 1.0)))
    around = Setting(layer, {each: numbers[each] / unit[each] for each in of.space.numbers})
    mark = (str(seed), name, "near", str(place))
    found = near(of.space, models.n_layers(model), count, around, *mark, further=further)
    return [_numbers(model, of, each) for each in found]


def _numbers(model: Model, of: Tunable, setting: Setting) -> Numbers:
    layer = {} if setting.layer is None else {LAYER: setting.layer}
    return of.config(model, {**layer, **of.drawn(model, setting)})


def tunable(name: str) -> Tunable:
    """The editor of this name.

    Raises:
        PlanError: there is none.
    """
    if name not in TUNABLE:
        raise PlanError(f"no editor {name!r}; there are {', '.join(TUNABLE)}")
    return TUNABLE[name]


def untrained(model: Model, names: Sequence[str]) -> dict[str, str]:
    """Those of the editors that have no network for the model, and why."""
    found = {}
    for name in names:
        if (network := tunable(name).network) is not None:
            try:
                checkpoints.trained_for(model, *network)
            except EditorError as error:
                found[name] = str(error)
    return found


# -- the editors -----------------------------------------------------------------------------------


def _rome(model: Model, changes: Mapping[str, object]) -> Numbers:
    return rome_config.as_mapping(rome_config.rome_config_for(model, changes, chosen=False))


def _kn(model: Model, changes: Mapping[str, object]) -> Numbers:
    return asdict(neurons.kn_config_for(model, changes, chosen=False))


def _fine_tuned(editor: Editor, method: Method) -> Tunable:
    def config(model: Model, changes: Mapping[str, object]) -> Numbers:
        return asdict(config_for(model, method, changes, chosen=False))

    def drawn(model: Model, setting: Setting) -> Mapping[str, float]:
        return of_weights(model, method, int(str(setting.layer)), setting.numbers)

    return Tunable(editor, ("fine_tuning", method.name), method.space, config, drawn)


def _trained(editor: Editor, method: checkpoints.Method, data: str) -> Tunable:
    label = checkpoints.label_of(method, data)

    def config(model: Model, changes: Mapping[str, object]) -> Numbers:
        return asdict(trained_edits.file_config_for(model, label, changes, chosen=False))

    section = ("trained_editors", label)
    return Tunable(editor, section, trained_edits.SPACE, config, network=(method, data))


TUNABLE: Mapping[str, Tunable] = {
    "ft": _fine_tuned(fine_tuning.ft, fine_tuning.FT),
    "ft-l": _fine_tuned(fine_tuning.ft_l, fine_tuning.FT_L),
    "attn-edit": _fine_tuned(attention.attn_edit, attention.ATTN_EDIT),
    "kn": Tunable(neurons.kn, ("knowledge_neurons",), neurons.SPACE, _kn),
    "mend": _trained(mend.mend, mend.MEND, "generic"),
    "mend-cf": _trained(mend.mend_cf, mend.MEND, "cf"),
    "mend-zsre": _trained(mend.mend_zsre, mend.MEND, "zsre"),
    "ke": _trained(ke.ke, ke.KE, "generic"),
    "ke-cf": _trained(ke.ke_cf, ke.KE, "cf"),
    "ke-zsre": _trained(ke.ke_zsre, ke.KE, "zsre"),
    "rome": Tunable(rome, ("rome",), rome_config.SPACE, _rome),
}
"""By name, in the order of tables."""
NUMBERS = tuple(dict.fromkeys(name for each in TUNABLE.values() for name in each.space.names))
"""The names of all numbers that are chosen."""
