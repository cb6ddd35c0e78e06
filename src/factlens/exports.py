"""Writing a model, edited or not, as a Hugging Face folder that plain `transformers` loads."""

import contextlib
import copy
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from factlens import models, runs
from factlens.edits import Edit, applied, weights_of
from factlens.errors import ModelUnsupported, OutputError
from factlens.fingerprints import fingerprint
from factlens.models import Model

NOTE = "factlens.json"
"""The file of an exported folder that says which model and edit it came from."""
PROBE = 16
"""Tokens, spread over the vocabulary, on which a HookedTransformer and its base must agree."""
TOLERANCE = 1e-3
"""Of the largest logit; in float32 the two agree within 1e-6."""
_WRAPPED = "._original_component"


def export(
    model: Model,
    folder: str | Path,
    edit: Edit | None = None,
    *,
    base: str | Path | None = None,
    overwrite: bool = False,
    strict: bool = True,
) -> Path:
    """Write the model with the edit in it: safetensors, config, generation config, tokenizer, and `factlens.json`.

    The folder appears whole or not at all, and the model is left as it was. `AutoModelForCausalLM.from_pretrained(folder)` gives
    the logits that the model gives under `applied(model, edit)`, and `load_model(folder)` has the fingerprint that the note holds.

    Args:
        model: a hooked model with unprocessed weights.
        folder: a new or an empty folder.
        edit: None writes the model as it is.
        base: of a HookedTransformer, the hub name or folder that it was made from; all but its `W_out` and the weights that the
            edit changes is read there.
        overwrite: replace an earlier model folder.
        strict: as of `applied`.

    Raises:
        OutputError: the folder is not empty, or the disk is full or cannot be written.
        ModelUnsupported: the weights were processed, or are not those that Hugging Face's class has, or the edit changes one that
            is held apart from those.
        EditError: the edit does not belong to the model.
    """
    folder = Path(folder)
    _check_folder(folder, overwrite)
    _check_unprocessed(model)
    about = {"fingerprint": "", "edit": None if edit is None else dict(edit.info)}
    with applied(model, edit, strict=strict) if edit is not None else contextlib.nullcontext():
        changed = () if edit is None else tuple(edit.changes)
        source = model if models.is_bridge(model) else _with_weights_of(model, base, changed)
        about["fingerprint"] = fingerprint(source)
        tensors, plain = _plain_state(source)
        _check_held(source, changed, tensors)
        with _written_folder(folder) as partial:
            _write(source, plain, tensors, about, partial)
            _check_written(source, tensors, partial)
    return folder


# -- what can be exported --------------------------------------------------------------------------


def _check_unprocessed(model: Model) -> None:
    if (how := models.processing(model)) != "none":
        raise ModelUnsupported(
            f"the weights of {models.model_name(model)} were processed ({how}) and are no longer Hugging Face's; load it with "
            "factlens.load_model or HookedTransformer.from_pretrained_no_processing, edit that, and export it"
        )


def _check_held(model: Model, changed: Iterable[str], tensors: dict[str, Tensor]) -> None:
    """Refuse an edit of a weight that is none of those that are written: GPT-NeoX's W_Q is a copy of a part of one."""
    written = {each.untyped_storage().data_ptr() for each in tensors.values()}
    for name, weight in weights_of(model, changed).items():
        if weight.untyped_storage().data_ptr() not in written:
            raise ModelUnsupported(
                f"{name} of {models.model_name(model)} is held apart from Hugging Face's weight, so the edit of it cannot be exported; "
                "save the edit, and apply it after loading"
            )


def _with_weights_of(model: Model, base: str | Path | None, changed: Iterable[str]) -> Model:
    """The bridge of `base` with every `W_out` and the weights `changed` of the HookedTransformer `model`; they must otherwise agree."""
    if base is None:
        raise ModelUnsupported(
            "a HookedTransformer has Hugging Face's weights in another form; name the model it was made from: base='gpt2-xl'"
        )
    found = models.load_model(base, device="cpu", dtype=models.dtype_of(model))
    refusal = ModelUnsupported(
        f"{base} is not what this model was made from: they differ in more than W_out; give the model's own base"
    )
    if _different(found, model, changed):
        raise refusal
    with torch.no_grad():
        for layer in range(models.n_layers(model)):
            models.W_out(found, layer).copy_(models.W_out(model, layer))
        for name, weight in weights_of(found, changed).items():
            weight.copy_(weights_of(model, [name])[name])
    # What has another form in the two (repeated key heads, say) shows in what they compute.
    tokens = torch.linspace(0, models.cfg(found).d_vocab - 1, PROBE).long()[None]
    one, other = (runs.logits_of(each, tokens).float().cpu() for each in (found, model))
    if not torch.allclose(one, other, atol=TOLERANCE * float(other.abs().max()), rtol=0.0):
        raise refusal
    return found


def _different(one: Model, other: Model, changed: Iterable[str]) -> bool:
    """Whether two models differ in their size or in a weight, besides `W_out` and those `changed`, that both hold in the same form."""
    if models.n_layers(one) != models.n_layers(other):
        return True
    names = ["embed.W_E", "pos_embed.W_pos", "unembed.W_U"]
    for layer in range(models.n_layers(one)):
        if models.W_out(one, layer).shape != models.W_out(other, layer).shape:
            return True
        names += [
            f"blocks.{layer}.{name}" for name in ("ln1.w", "attn.W_Q", "attn.W_O", "mlp.W_in")
        ]
    for name in (each for each in names if each not in changed):
        a, b = models.weight(one, name), models.weight(other, name)
        if a is not None and b is not None and not torch.equal(a.cpu(), b.cpu()):
            return True
    return False


def _plain_state(bridge: Model) -> tuple[dict[str, Tensor], Any]:
    """The weights under Hugging Face's own names, without copies of tied ones, and an empty model of its class."""
    hf_model = cast(Any, bridge).original_model
    config = copy.deepcopy(hf_model.config)
    config.architectures = [type(hf_model).__name__]
    config.dtype = models.dtype_of(bridge)
    with torch.device("meta"):
        plain = type(hf_model)(config)
    plain.generation_config = copy.deepcopy(hf_model.generation_config)
    held = {name.replace(_WRAPPED, ""): each for name, each in hf_model.state_dict().items()}
    wanted = plain.state_dict()
    if bad := [n for n, each in wanted.items() if n not in held or held[n].shape != each.shape]:
        raise ModelUnsupported(
            f"{models.model_name(bridge)} lacks {len(bad)} weights of a {type(hf_model).__name__}, such as {bad[0]}; it cannot be exported"
        )
    tied = getattr(plain, "all_tied_weights_keys", None) or {}
    if untied := [n for n, of in tied.items() if not torch.equal(held[n], held[of])]:
        raise ModelUnsupported(
            f"{untied[0]} and {tied[untied[0]]} are one weight in a {type(hf_model).__name__} and differ here; it cannot be exported"
        )
    return {name: held[name] for name in wanted if name not in tied}, plain


# -- writing ---------------------------------------------------------------------------------------


def _write(
    source: Model, plain: Any, tensors: dict[str, Tensor], about: dict[str, Any], folder: Path
) -> None:
    from huggingface_hub import save_torch_state_dict

    on_cpu = {name: each.detach().cpu().contiguous() for name, each in tensors.items()}
    save_torch_state_dict(on_cpu, folder, metadata={"format": "pt"})
    plain.config.save_pretrained(folder)
    with contextlib.suppress(
        ValueError
    ):  # Some models come with settings that transformers refuses to write.
        plain.generation_config.save_pretrained(folder)
    models.tokenizer(source).save_pretrained(folder)
    (folder / NOTE).write_text(json.dumps(about, indent=1), encoding="utf-8")


def _check_written(source: Model, tensors: dict[str, Tensor], folder: Path) -> None:
    """Read every `W_out` back and compare it with the model's."""
    names = {each.untyped_storage().data_ptr(): name for name, each in tensors.items()}
    wanted = set()
    for layer in range(models.n_layers(source)):
        wanted.add(names[models.W_out(source, layer).untyped_storage().data_ptr()])
    for path in folder.glob("*.safetensors"):
        with safe_open(str(path), framework="pt") as file:
            for name in wanted & set(file.keys()):
                if not torch.equal(file.get_tensor(name), tensors[name].detach().cpu()):
                    raise OutputError(f"{name} was not written to {path.name} as it is; try again")
                wanted.remove(name)
    if wanted:
        raise OutputError(f"{min(wanted)} was not written; try again")


def _check_folder(folder: Path, overwrite: bool) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise OutputError(f"{folder} is no folder; export to another place")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise OutputError(
            f"the folder {folder} is not empty; export to another one, or overwrite it"
        )
    if not (folder / "config.json").is_file():
        raise OutputError(f"the folder {folder} holds no model, so it is not overwritten")


@contextlib.contextmanager
def _written_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder beside `folder`; renamed at the end, removed after any error or Ctrl-C."""
    partial = old = folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Of its own name: another export of the same folder may be at work.
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        partial, old = beside / "new", beside / "old"
        partial.mkdir()
        yield partial
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OutputError):
            raise
        said = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise OutputError(f"cannot write the folder {folder}: {said}") from None
    finally:
        if old != folder:
            if old.exists() and not folder.exists():
                old.rename(folder)
            shutil.rmtree(old.parent, ignore_errors=True)
