"""A model's fingerprint: what an edit, a noise level or a stored trace belongs to.

sha256 over the shape of the model, its vocabulary, and for each weight its name, shape, type and 4 096 entries at
fixed places, plus all of every `W_out`, the matrices that edits change. Weights are read through TransformerLens's
names (`blocks.3.attn.W_Q`), so a bridge and an unprocessed `HookedTransformer` of one model agree.
"""

import hashlib
import platform
import weakref
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from factlens import models
from factlens.configs import config_for
from factlens.models import Model

SAMPLED = 4096
_NUMBERS = ("n_layers", "d_model", "n_heads", "d_head", "d_mlp", "d_vocab", "n_ctx")
_TOP = ("embed.W_E", "pos_embed.W_pos", "unembed.W_U", "ln_final.w", "ln_final.b")
_BLOCK = (
    "ln1.w",
    "ln1.b",
    "ln2.w",
    "ln2.b",
    "attn.W_Q",
    "attn.W_K",
    "attn.W_V",
    "attn.W_O",
    "attn.b_O",
    "mlp.W_in",
    "mlp.W_gate",
    "mlp.b_in",
    "mlp.b_out",
)
_WHOLE = "mlp.W_out"


def fingerprint(model: Model) -> str:
    """64 hexadecimal digits; the same on CPU and GPU, different after any edit of a `W_out`."""
    digest = hashlib.sha256(models.architecture_class(model).encode())
    config = models.cfg(model)
    digest.update(repr([(name, int(getattr(config, name, 0) or 0)) for name in _NUMBERS]).encode())
    vocabulary = models.tokenizer(model).get_vocab() if models.tokenizer(model) else {}
    digest.update(repr(sorted(vocabulary.items(), key=lambda item: item[1])).encode())
    for name, tensor, whole in _weights(model):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_bytes(tensor if whole else _sample(tensor)))
    return digest.hexdigest()


_known: "weakref.WeakKeyDictionary[Model, tuple[bytes, str]]" = weakref.WeakKeyDictionary()


def remembered_fingerprint(model: Model) -> str:
    """`fingerprint`, computed again only when a sample of the weights or the sum of some `W_out` has changed.

    Hashing all of every `W_out` takes seconds on a large model, too long for each of many traces.
    """
    digest = hashlib.sha256()
    for _, tensor, whole in _weights(model):
        digest.update(_bytes(_sample(tensor)))
        if whole:
            digest.update(_bytes(tensor.detach().sum(dtype=torch.float64)[None]))
    quick = digest.digest()
    if model not in _known or _known[model][0] != quick:
        _known[model] = (quick, fingerprint(model))
    return _known[model][1]


def _weights(model: Model) -> Iterator[tuple[str, Tensor, bool]]:
    names = [(name, False) for name in _TOP]
    for layer in range(models.n_layers(model)):
        names += [(f"blocks.{layer}.{name}", False) for name in _BLOCK]
        names.append((f"blocks.{layer}.{_WHOLE}", True))
    for name, whole in names:
        tensor = _get(model, name)
        if tensor is not None:
            yield name, tensor, whole


def _get(model: Model, name: str) -> Tensor | None:
    """The weight called `name`, or None where the architecture has none, or one of zeros."""
    found = models.weight(model, name)
    if found is None:
        return None
    # A bias of zeros is what HookedTransformer gives an architecture without one.
    return found if found.ndim > 1 or bool(found.any()) else None


def _sample(tensor: Tensor) -> Tensor:
    """Up to 4 096 entries, evenly spaced in row order, read without copying the whole weight."""
    places = torch.linspace(
        0, tensor.numel() - 1, min(SAMPLED, tensor.numel()), dtype=torch.float64
    )
    index = torch.unravel_index(places.long().to(tensor.device), tensor.shape)
    return tensor.detach()[index]


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def provenance(model: Model) -> dict:
    """What a stored result says of the model it belongs to, and of the versions that it was computed with."""
    config = config_for(models.model_name(model), models.architecture(model))
    packages = {}
    for name in ("factlens", "transformer-lens", "transformers", "torch"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed as a package"
    return {
        "model": models.model_name(model),
        "fingerprint": remembered_fingerprint(model),
        "config": config.name if config is not None else None,
        "processing": models.processing(model),
        "dtype": str(models.dtype_of(model)).removeprefix("torch."),
        "device": str(models.device_of(model)),
        "python": platform.python_version(),
        "versions": packages,
    }
