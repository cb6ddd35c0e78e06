"""ROME's numbers: one dataclass, the files it is read from, and what a model's own config adds."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import yaml

from factlens import configs, models
from factlens.configs import from_mapping
from factlens.editors.spaces import Range, Space
from factlens.errors import ConfigError
from factlens.models import Model

METHOD = "ROME"
FACT_TOKENS = ("subject-last", "subject-first", "subject-middle", "first-after", "last")
KL_PLACES = ("subject-last", "prompt-end")
VALUE_KEYS = ("mean", "prompt", "spellings")
CONTEXTS = ("rome", "paper")
MOMENTS = ("statistics", "identity")
MOMENT_TOKENS = ("auto", "paper")

DEPTH = (17, 48)
"""GPT-2 XL's layer and number of blocks: where a model without a published layer is edited, scaled by its depth. Rounded down it
gives the published layers of GPT-2 medium (8 of 24) and large (12 of 36) too."""
SPACE = Space({"max_norm_ratio": Range(0.5, 4.0)})
"""What is chosen on a model, besides the layer: the clamp, from a half to the largest published one."""


@dataclass(frozen=True, kw_only=True)
class ROMEConfig:
    """Every number of ROME (Section 3.1), with the official code's defaults where paper and code differ (REFERENCE, table).

    Raises:
        ConfigError: a value that cannot be, with those that can.
    """

    layer: int | None = None
    """Block whose `mlp.W_out` is edited, from 0; None is the model's (`rome_config_for`)."""
    fact_token: str = "subject-last"
    """Where the fact is looked up: the subject's last or first token, the middle one (Figure 5; of three tokens or more), the one after
    it, or the prompt's last."""
    steps: int = 20
    """Evaluations of the loss; at most one less updates of the value."""
    learning_rate: float = 0.5
    """Of Adam."""
    weight_decay: float = 0.5
    """Factor of ‖δ‖ / ‖v0‖², v0 the MLP's output at the lookup token of the bare prompt."""
    kl_weight: float = 0.0625
    """Factor of KL(edited || original) at "{subject} is a" (the essence term of Eq. 4), in nats."""
    max_norm_ratio: float = 4.0
    """Largest ‖δ‖ as a multiple of ‖v0‖: the official `clamp_norm_factor`."""
    stop_loss: float = 0.05
    """The optimisation ends when its loss is below."""
    kl_at: str = "subject-last"
    """Where in "{subject} is a" the KL is taken: at the subject's last token (the code), or at the "prompt-end" (the paper)."""
    value_key: str = "mean"
    """The key that the update answers exactly: the "mean" over contexts as in Eq. 2, or the bare "prompt"'s as in the official code.
    "spellings" adds to Eq. 2 an equation for each token by which the subject ends: many a name is other tokens at the beginning of a
    sentence than within it, and a mean over both is neither. Still of rank one."""
    contexts: str | tuple[str, ...] = "rome"
    """The bare prompt and sampled prefixes: "rome" is the code's 21 (10 of 5 and 10 of 10 tokens, the start token counted, top-k 5),
    "paper" 50 of 2 to 10 tokens; or templates, each with one `{}` for the prompt."""
    seed: int = 0
    """Of the sampled contexts."""
    moment: str = "statistics"
    """C of Eq. 2: the key "statistics" of the layer, or the "identity" as a control."""
    moment_tokens: int | str | None = None
    """Keys that C is made from: a number, "auto" (10 x d_mlp), or "paper" (100 000 documents); None takes what there is."""
    loss_layer: int | None = None
    """Of official files. Only the model's last layer can be served, where the loss is taken anyway."""

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))


# -- checks ----------------------------------------------------------------------------------------


def _check_contexts(name: str, value: object) -> object:
    if isinstance(value, str) and value in CONTEXTS:
        return value
    allowed = "'rome', 'paper', or templates with one {} each"
    if isinstance(value, str) or not isinstance(value, list | tuple) or not value:
        raise configs.refused(METHOD, name, value, allowed)
    for template in value:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise configs.refused(METHOD, name, template, allowed)
    return tuple(value)


def _check_tokens(name: str, value: object) -> object:
    if value is None or (isinstance(value, str) and value in MOMENT_TOKENS):
        return value
    if (found := configs.as_number(value)) is None or found < 1 or found != int(found):
        raise configs.refused(
            METHOD, name, value, "a whole number of tokens, 'auto', 'paper' or nothing"
        )
    return int(found)


_CHECKS: dict[str, Callable[[str, object], object]] = {
    "layer": configs.whole(METHOD, 0, optional=True),
    "fact_token": configs.word(METHOD, FACT_TOKENS),
    "steps": configs.whole(METHOD, 1),
    "learning_rate": configs.number(METHOD, 0.0, above=True),
    "weight_decay": configs.number(METHOD, 0.0),
    "kl_weight": configs.number(METHOD, 0.0),
    "max_norm_ratio": configs.number(METHOD, 0.0, above=True),
    "stop_loss": configs.number(METHOD, 0.0),
    "kl_at": configs.word(METHOD, KL_PLACES),
    "value_key": configs.word(METHOD, VALUE_KEYS),
    "contexts": _check_contexts,
    "seed": configs.whole(METHOD, 0),
    "moment": configs.word(METHOD, MOMENTS),
    "moment_tokens": _check_tokens,
    "loss_layer": configs.whole(METHOD, 0, optional=True),
}


# -- files and models ------------------------------------------------------------------------------


def read_rome_config(path: str | Path) -> ROMEConfig:
    """Read our own YAML, an official JSON file (`hparams/ROME/gpt2-xl.json`) or one of EasyEdit's YAML files.

    The official code divides by the bare prompt's key, so its files are read with `value_key="prompt"`.

    Raises:
        ConfigError: a file that is missing, not UTF-8, not YAML or JSON, no mapping, or with keys or values that are not known.
    """
    return _built(_read(Path(path)), Path(path).name)


def rome_config_for(
    model: Model,
    given: ROMEConfig | Mapping[str, object] | str | Path | None = None,
    *,
    chosen: bool = True,
) -> ROMEConfig:
    """The numbers to edit `model` with; `layer` is a layer of it.

    A mapping or a file changes the model's own numbers (`configs/*.yaml`) where it names them. A `ROMEConfig` names all of them,
    so only its `layer` is filled in. Of the model's own numbers those that were `chosen` on it may be left out (`spaces`).

    Raises:
        ConfigError: a layer that the model has not, or what `read_rome_config` refuses.
    """
    own = _own(model, chosen)
    if isinstance(given, ROMEConfig):
        config = given if given.layer is not None else replace(given, layer=int(str(own["layer"])))
    else:
        where = str(given) if isinstance(given, str | Path) else "the ROME config"
        changes = _read(Path(given)) if isinstance(given, str | Path) else dict(given or {})
        config = _built({**own, **_named(changes)}, where)
    depth = models.n_layers(model)
    if config.layer is not None and config.layer >= depth:
        raise ConfigError(
            f"layer {config.layer} does not exist: {models.model_name(model)} has {depth} layers, 0 to {depth - 1}"
        )
    if config.loss_layer not in (None, depth - 1):
        raise ConfigError(
            f"the loss is taken at the last layer, which is {depth - 1} of {models.model_name(model)}, not at "
            f"{config.loss_layer}; leave loss_layer (v_loss_layer) out"
        )
    return replace(config, loss_layer=None)


def as_mapping(config: ROMEConfig) -> dict[str, object]:
    """The config as JSON can hold it: what an edit's file says of how it was made."""
    given = asdict(config)
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in given.items()
    }


def _built(given: Mapping[str, object], where: str) -> ROMEConfig:
    """The config of what was read, its values checked and converted first: YAML has `4` and `5e-1` for numbers."""
    kept = {name: _CHECKS[name](name, value) for name, value in given.items() if name in _CHECKS}
    return from_mapping(ROMEConfig, {**given, **kept}, where)


def _named(changes: Mapping[str, object]) -> dict[str, object]:
    """Without a layer of None, which asks for the model's."""
    return {name: value for name, value in changes.items() if (name, value) != ("layer", None)}


def _own(model: Model, chosen: bool) -> dict[str, object]:
    """The model's numbers from its config, with a layer: the config's, or that share of the model's depth."""
    config = models.config_of(model)
    own: dict[str, object] = dict(config.rome) if config is not None else {}
    if config is not None and config.is_chosen("rome") and not chosen:
        own = {name: value for name, value in own.items() if name not in SPACE.names}
    if "layer" not in own or config is None or config.layers is None:
        layer, of = DEPTH
        own.setdefault("layer", layer * models.n_layers(model) // of)
        return own
    depth = models.n_layers(model)
    if depth != config.layers:
        own["layer"] = int(str(own["layer"])) * depth // config.layers
    return own


def _read(path: Path) -> dict[str, object]:
    """What a file says, in our keys."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        given = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"cannot read the ROME config {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        known = ", ".join(field.name for field in fields(ROMEConfig))
        raise ConfigError(f"{path} must hold keys and values; ROME has {known}")
    return _from_official(given, path.name) if _OFFICIAL.keys() - _SHARED & given.keys() else given


# -- the official names ----------------------------------------------------------------------------

_OFFICIAL = {
    "layers": "layer",
    "fact_token": "fact_token",
    "v_num_grad_steps": "steps",
    "v_lr": "learning_rate",
    "v_loss_layer": "loss_layer",
    "v_weight_decay": "weight_decay",
    "clamp_norm_factor": "max_norm_ratio",
    "kl_factor": "kl_weight",
    "mom2_adjustment": "moment",
}
_SHARED = {"fact_token"}
"""A key of ours too, which makes no file an official one."""
_FACT_TOKENS = {
    "subject_last": "subject-last",
    "subject_first": "subject-first",
    "subject_first_after_last": "first-after",
    "last": "last",
}
_SERVED: dict[str, object] = {
    "context_template_length_params": [[5, 10], [10, 10]],
    "mom2_dataset": "wikipedia",
    "mom2_n_samples": 100_000,
    "mom2_dtype": "float32",
    "enable_prompt_keys": False,
    "enable_random_prefix_keys": True,
    "use_chat_template": False,
}
"""Keys with the one value that they have in every published file; of another a result would not be what it says."""
_OUTPUTS = (
    "mlp.c_proj",
    "mlp.fc_out",
    "mlp.dense_4h_to_h",
    "mlp.down_proj",
    "fc2",
    "feed_forward.w2",
)
_UNUSED = {
    *("layer_module_tmp", "mlp_module_tmp", "attn_module_tmp", "ln_f_module", "lm_head_module"),
    *("alg_name", "model_name", "stats_dir", "device", "model_parallel", "fp16", "batch_size"),
    *("max_length", "enable_thinking"),
}
"""Names of modules, which the hook points replace, and where and how EasyEdit runs."""


def _from_official(given: Mapping[str, object], where: str) -> dict[str, object]:
    """The official code's and EasyEdit's keys in ours; EasyEdit's newer ones mean the mean key unless they say otherwise."""
    known = {*_OFFICIAL, *_SERVED, *_UNUSED, "rewrite_module_tmp", "original_implementation"}
    if unknown := set(given) - known:
        raise ConfigError(
            f"{where} has no key {', '.join(sorted(unknown))}; an official ROME file has {', '.join(sorted(known))}"
        )
    for key, served in _SERVED.items():
        if given.get(key, served) != served:
            raise ConfigError(f"{where}: {key} is {given[key]!r}; only {served!r} can be served")
    module = str(given.get("rewrite_module_tmp", _OUTPUTS[0]))
    if not module.endswith(_OUTPUTS) or str(given.get("alg_name", "ROME")).upper() != "ROME":
        raise ConfigError(
            f"{where} edits {module} by {given.get('alg_name', 'ROME')}; ROME edits W_out"
        )
    ours = {mine: given[theirs] for theirs, mine in _OFFICIAL.items() if theirs in given}
    mixed = "alg_name" not in given or given.get("original_implementation", False)
    ours |= {
        "value_key": "prompt" if mixed else "mean",
        "contexts": "rome",
        "moment_tokens": "paper",
    }
    if "layer" in ours:
        ours["layer"] = _only_layer(ours["layer"], where)
    if (token := ours.get("fact_token")) is not None:
        ours["fact_token"] = _FACT_TOKENS.get(str(token), token)
    if "moment" in ours:
        ours["moment"] = MOMENTS[0] if ours["moment"] else MOMENTS[1]
    return ours


def _only_layer(layers: object, where: str) -> object:
    if not isinstance(layers, list) or len(layers) != 1:
        raise ConfigError(f"{where}: layers is {layers!r}; ROME edits one, as in [17]")
    return layers[0]
