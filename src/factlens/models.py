"""The only importer of transformer_lens: loading, what a model is, hook names, weights.

Two classes carry the hook points factlens stands on, and both are accepted everywhere: a `TransformerBridge`
(TransformerLens 4, what `load_model` returns) and a `HookedTransformer` (TransformerLens 3.9, the user's own). What
differs between them is answered here and nowhere else.
"""

import contextlib
import copy
import os
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from factlens import atlas
from factlens.configs import ModelConfig, TraceDefaults, config_for
from factlens.errors import ModelNotFound, ModelUnsupported, OutOfMemory

Model = nn.Module
"""A `TransformerBridge` or a `HookedTransformer`."""

BUNDLED = "atlas"
EMBED = "hook_embed"


# -- loading ---------------------------------------------------------------------------------------


def load_model(
    name: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    device_map: str | dict[str, str | int] | None = None,
) -> Model:
    """Load a model with its weights unprocessed, so that its probabilities are Hugging Face's.

    Args:
        name: None or "atlas" for the bundled model; a hub name ("gpt2-xl", "EleutherAI/gpt-j-6b"); or a local
            folder in Hugging Face format.
        device: where to run; the GPU if there is one, else the CPU.
        dtype: of the weights. Probabilities are computed in float32 whatever it is.
        revision: branch, tag or commit of a hub model.
        device_map: spread a model that is larger than one device, as Hugging Face does: "auto", "balanced", or a
            module -> device mapping. Instead of `device`.

    Raises:
        ModelNotFound: no such folder or hub name, a broken folder, or no network and nothing in the cache.
        ModelUnsupported: TransformerLens has no adapter for the architecture, or it lacks hook points.
        OutOfMemory: the model does not fit where it was to go.
    """
    label = BUNDLED if name is None else str(name)
    if label == BUNDLED:
        source = str(atlas.CHECKPOINT)
    elif label.startswith(("/", ".", "~")) and not os.path.isdir(os.path.expanduser(label)):
        raise ModelNotFound(
            f"there is no folder {label}; a hub name looks like gpt2-xl or EleutherAI/gpt-j-6b"
        )
    elif os.path.isdir(label := os.path.expanduser(label)):
        _check_folder(Path(label))
        source = label
    else:
        config = config_for(label)
        listed = config is not None and "/" not in label and label in config.models
        source = config.models[0] if config is not None and listed else label
    if device is not None and device_map is not None:
        raise ModelUnsupported(
            f"device={str(device)!r} puts all of the model in one place and device_map={device_map!r} spreads it; give one"
        )
    place = device_map if device_map is not None else {"": _choose_device(device)}
    model, own_tokenizer = _boot(source, label, place, dtype, revision)
    _names[model] = (
        Path(label).resolve().name if source == label and os.path.isdir(label) else label
    )
    _tokenizers[model] = own_tokenizer
    if any(parameter.is_meta for parameter in model.parameters()):
        raise OutOfMemory(
            f"device_map={device_map!r} leaves parts of {label!r} on the disk or offloaded, where they cannot be read; "
            "use more or larger devices, or a narrower dtype"
        )
    check_model(model)
    return model


_names: "weakref.WeakKeyDictionary[nn.Module, str]" = weakref.WeakKeyDictionary()
_tokenizers: "weakref.WeakKeyDictionary[nn.Module, Any]" = weakref.WeakKeyDictionary()
"""Kept beside the models, which belong to TransformerLens or to the user."""


def _choose_device(device: str | torch.device | None) -> str:
    if device is not None:
        return str(device)
    return "cuda" if torch.cuda.is_available() else "cpu"


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelNotFound(
            f"the folder {folder} holds no config.json; a Hugging Face model folder needs "
            "config.json, model.safetensors and tokenizer.json"
        )
    if not any(folder.glob("*.safetensors")):
        raise ModelNotFound(
            f"the folder {folder} holds no *.safetensors weights; factlens reads no pickled "
            "weights: save the model with save_pretrained(safe_serialization=True)"
        )


def _boot(
    source: str, label: str, place: str | dict, dtype: torch.dtype, revision: str | None
) -> tuple[Any, Any]:
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Loaded here and handed over: the bridge's own loader would accept pickled weights.
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    try:
        with _quiet(transformers):
            hf_model, found = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                use_safetensors=True,
                attn_implementation="eager",
                output_loading_info=True,
                device_map=place,
                **options,
            )
            # transformers only warns, and fills what is missing with random numbers.
            if bad := sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]])):
                raise ValueError(f"the weights lack {len(bad)} of its tensors, such as {bad[0]}")
            own_tokenizer = AutoTokenizer.from_pretrained(source, **options)
            return _bridge(
                hf_model, AutoTokenizer.from_pretrained(source, **options)
            ), own_tokenizer
    except Exception as error:
        raise _explain(error, label, source) from error


def wrap_model(hf_model: Any, hf_tokenizer: Any, name: str) -> Model:
    """A Hugging Face model that is already in memory, as `load_model` would have given it.

    The bridge takes the module over: it is not to be used by itself afterwards. Attention is switched to the eager
    implementation, the only one with hook points.
    """
    import transformers

    with _quiet(transformers):
        model = _bridge(hf_model, copy.deepcopy(hf_tokenizer))
    _names[model], _tokenizers[model] = name, hf_tokenizer
    return model


def _bridge(hf_model: Any, hf_tokenizer: Any) -> Any:
    """The bridge over `hf_model`. It makes the tokenizer it is given prepend a BOS, so it gets one of its own."""
    from transformer_lens.model_bridge import TransformerBridge

    parameter = next(hf_model.parameters())
    return TransformerBridge.boot_transformers(
        hf_model.config.name_or_path or hf_model.config.model_type,
        hf_model=hf_model.eval(),
        tokenizer=hf_tokenizer,
        device=str(parameter.device),
        dtype=parameter.dtype,
    )


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence the loaders' progress bars and notes for the length of a load, and put them back.

    Those of the hub too, which otherwise prints a line for each of its retries when there is no network.
    """
    from huggingface_hub.utils import logging as hub

    hub_level = hub.get_verbosity()
    level, bars = (
        transformers.logging.get_verbosity(),
        transformers.logging.is_progress_bar_enabled(),
    )
    hub.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hub.set_verbosity(hub_level)
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


def _explain(error: Exception, label: str, source: str) -> Exception:
    """The one line that a user can act on, for whatever a loader threw."""
    from huggingface_hub.constants import HF_HUB_CACHE

    first = str(error).strip().split("\n")[0][:200] or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in first:
        return OutOfMemory(
            f"the model {label!r} does not fit into memory; use dtype bfloat16, or another device"
        )
    if "Unsupported architecture" in str(error) or "not supported" in str(error):
        return ModelUnsupported(f"TransformerLens has no adapter for the model {label!r}: {first}")
    if "safetensors" in first and not os.path.isdir(source):
        return ModelNotFound(
            f"the model {label!r} has no safetensors weights on the hub, and factlens reads no pickled ones; "
            "convert it, then load it from a folder"
        )
    if os.path.isdir(source):
        return ModelNotFound(f"the model folder {source} cannot be loaded: {first}")
    return ModelNotFound(
        f"the model {label!r} is neither a folder nor fetchable from the hub, and is not in the "
        f"cache {HF_HUB_CACHE} ({first}); check the name and the network, or use the bundled 'atlas'"
    )


# -- what a model is -------------------------------------------------------------------------------


def is_bridge(model: Model) -> bool:
    """Whether `model` is a `TransformerBridge` rather than a `HookedTransformer`."""
    return hasattr(model, "original_model")


def check_one_device(model: Model) -> None:
    """Refuse to compute an edit of a model that is spread over several devices.

    Raises:
        ModelUnsupported: naming them.
    """
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        raise ModelUnsupported(
            f"{model_name(model)} is spread over {', '.join(devices)}; an edit is computed on one device: load it there, "
            "in a narrower dtype if need be"
        )


def check_model(model: object) -> None:
    """Refuse what has not the hook points that tracing needs.

    Raises:
        ModelUnsupported: naming what is missing.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "run_with_hooks"):
        raise ModelUnsupported(
            f"{type(model).__name__} is no hooked model; load one with factlens.load_model(name), or "
            "give a TransformerBridge or HookedTransformer of TransformerLens"
        )
    if getattr(cfg(model), "attention_dir", "causal") != "causal":
        raise ModelUnsupported(
            f"{architecture(model)} reads in both directions; tracing needs a model that predicts the next token"
        )
    for name in (EMBED, *(site(0, s) for s in ("resid_pre", "resid_post", "attn_out", "mlp_out"))):
        if not has_site(model, name):
            raise ModelUnsupported(f"this model has no hook point {name}, which tracing needs")
    if tokenizer(model) is None:
        raise ModelUnsupported("this model has no tokenizer; set model.tokenizer, then trace")


def model_name(model: Model) -> str:
    """The name the model was loaded by, else what TransformerLens calls it."""
    return _names.get(model) or str(getattr(cfg(model), "model_name", None) or "unnamed")


def cfg(model: Model) -> Any:
    """The TransformerLens configuration: `n_layers`, `d_model`, `n_ctx` and the rest."""
    return model.cfg


BOS_MODEL_TYPES = ("llama", "gemma", "mistral", "mixtral", "opt", "phi3", "cohere")
"""Beginnings of the `model_type`s whose Hugging Face tokenizers put a BOS in front."""


def tokenizer(model: Model) -> Any:
    """The tokenizer as Hugging Face has it, with the BOS that it adds and no other.

    TransformerLens makes its own copy prepend a BOS to every text; of a user's model the original is loaded again
    from the same place, or the copy is taken back to what its architecture does.
    """
    if model not in _tokenizers:
        given = getattr(model, "tokenizer", None)
        if given is None:
            return None
        _tokenizers[model] = _without_added_bos(given, architecture(model))
    return _tokenizers[model]


def _without_added_bos(given: Any, model_type: str) -> Any:
    bos = given.bos_token_id
    if bos is None or list(given("a")["input_ids"])[:1] != [bos]:
        return given
    from transformers import AutoTokenizer

    with contextlib.suppress(
        Exception
    ):  # Whatever a loader throws: not there any more, or renamed.
        return AutoTokenizer.from_pretrained(
            given.name_or_path, local_files_only=True, trust_remote_code=False
        )
    if model_type.lower().startswith(BOS_MODEL_TYPES):
        return given
    bare = copy.deepcopy(given)
    bare.add_bos_token = False
    return bare


def config_of(model: Model) -> ModelConfig | None:
    """The config that serves the model, by its name or its architecture; None if there is none."""
    return config_for(model_name(model), architecture(model))


def trace_defaults(model: Model) -> TraceDefaults:
    """What tracing uses unless told otherwise: the config's numbers, by the model's name or its architecture.

    A window as wide as the model would restore everything, so there it is cut to half the layers.
    """
    config = config_of(model)
    defaults = config.trace if config is not None else TraceDefaults()
    if defaults.window < n_layers(model):
        return defaults
    return replace(defaults, window=max(1, n_layers(model) // 2))


def n_layers(model: Model) -> int:
    """Number of blocks."""
    return int(cfg(model).n_layers)


def device_of(model: Model) -> torch.device:
    """Where the embeddings live, hence where tokens go."""
    return next(model.parameters()).device


def dtype_of(model: Model) -> torch.dtype:
    """The type the model computes in."""
    return next(model.parameters()).dtype


def architecture(model: Model) -> str:
    """Hugging Face's `model_type`, such as "gpt2" or "gptj"; of a HookedTransformer the like of it."""
    if is_bridge(model):
        return str(cast(Any, model).original_model.config.model_type)
    # HookedTransformer keeps the class: GPTNeoXForCausalLM is gptneox here, which configs match with gpt_neox.
    stem = architecture_class(model)
    return stem.removesuffix("ForCausalLM").removesuffix("LMHeadModel").lower()


def architecture_class(model: Model) -> str:
    """The Hugging Face class, such as "GPT2LMHeadModel", which both kinds of model remember."""
    named = getattr(cfg(model), "original_architecture", None) or getattr(
        cfg(model), "architecture", None
    )
    return str(named or "unknown")


def processing(model: Model) -> str:
    """How TransformerLens changed the weights: "none", or what was folded and centred.

    A `HookedTransformer` does not say how it was made, so it is read off: a folded LayerNorm is a `...Pre` norm,
    and centred weights have rows of mean zero.
    """
    if is_bridge(model):
        return "compatibility-mode" if getattr(model, "compatibility_mode", False) else "none"
    steps = []
    if str(getattr(cfg(model), "normalization_type", "")).endswith("Pre"):
        steps.append("layer norm folded")
    embedding = cast(Any, model).W_E
    tolerance = 100 * torch.finfo(embedding.dtype).eps
    if bool(embedding.float().mean(dim=-1).abs().max() < tolerance * embedding.abs().max()):
        steps.append("weights centred")
    return ", ".join(steps) or "none"


# -- hook names ------------------------------------------------------------------------------------


def site(layer: int, name: str) -> str:
    """`site(17, "mlp_out")` is `blocks.17.hook_mlp_out`."""
    return f"blocks.{layer}.hook_{name}"


def has_site(model: Model, name: str) -> bool:
    """Whether the model has the hook point `name` (aliases count)."""
    return name in cast(Any, model).hook_dict


def is_parallel(model: Model) -> bool:
    """Whether attention and MLP both read the block's input (GPT-J, GPT-NeoX)."""
    return not has_site(model, site(0, "resid_mid"))


def mlp_input_site(model: Model, layer: int) -> str | None:
    """Where only the MLP's input passes, not the stream beside it; None if the model has no such hook point."""
    if is_bridge(model) and getattr(cast(Any, model).blocks[layer].mlp, "name", "") is None:
        return None  # OPT's block has no MLP module of its own, and reshapes what its parts return.
    for name in (f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.ln2.hook_normalized"):
        if has_site(model, name):
            return name
    return None


def key_site(layer: int) -> str:
    """Where the MLP's keys pass, [row pos d_mlp]: the input of `W_out` (ROME, Section 3.1)."""
    return f"blocks.{layer}.mlp.hook_post"


def output_module(model: Model, layer: int) -> nn.Module:
    """The module that gives `key @ W_out + b_out`, before any norm that follows it (Gemma 2 has one)."""
    mlp = cast(Any, model).blocks[layer].mlp
    return mlp.out if is_bridge(model) else mlp


def W_out_name(layer: int) -> str:
    """`W_out_name(17)` is `blocks.17.mlp.W_out`, the name by which an edit knows the matrix."""
    return f"blocks.{layer}.mlp.W_out"


def weight(model: Model, name: str) -> Tensor | None:
    """The weight that TransformerLens calls `name`, or None where the architecture has none (a missing bias)."""
    found: Any = model
    for part in name.split("."):
        try:
            found = found[int(part)] if part.isdigit() else getattr(found, part)
        except (
            AttributeError,
            NotImplementedError,
            RuntimeError,
            ValueError,
            TypeError,
            IndexError,
        ):
            return None
    return found if isinstance(found, Tensor) else None


def W_out(model: Model, layer: int) -> Float[Tensor, "d_mlp d_model"]:
    """The MLP's output matrix, in the row convention `key @ W_out`; a view on models with `nn.Linear`."""
    return cast(Any, model).blocks[layer].mlp.W_out
