"""A model's fingerprint: what an edit, a noise level or a stored trace belongs to.

sha256 over the shape of the model, its vocabulary, and for each weight its name, shape, type and 4 096 entries at
fixed places, plus all of every `W_out`, the matrices that edits change. Weights are read through TransformerLens's
names (`blocks.3.attn.W_Q`), so a bridge and an unprocessed `HookedTransformer` of one model agree.
"""

import hashlib
import math
import platform
import weakref
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from factlens import models
from factlens.models import Model

SAMPLED = 4096
_NUMBERS = ("n_layers", "d_model", "n_heads", "d_head", "d_mlp", "d_vocab")
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
    digest.update(repr(_numbers(model)).encode())
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


def _numbers(model: Model) -> list[tuple[str, int]]:
    names = list(_NUMBERS)
    if models.weight(model, "pos_embed.W_pos") is not None:
        # Without learned positions any context may be set, and HookedTransformer sets its own.
        names.append("n_ctx")
    return [(name, int(getattr(models.cfg(model), name, 0) or 0)) for name in names]


def _weights(model: Model) -> Iterator[tuple[str, Tensor, bool]]:
    names = [(name, False) for name in _TOP]
    for layer in range(models.n_layers(model)):
        names += [(f"blocks.{layer}.{name}", False) for name in _BLOCK]
        names.append((f"blocks.{layer}.{_WHOLE}", True))
    parallel = models.is_parallel(model)
    for name, whole in names:
        tensor = _get(model, name)
        if tensor is None or (parallel and _is_first_norm(model, name, tensor)):
            continue
        yield name, tensor, whole


def _is_first_norm(model: Model, name: str, tensor: Tensor) -> bool:
    """Whether `name` is a second norm like the first: of the one norm of GPT-J's blocks HookedTransformer keeps two."""
    if ".ln2." not in name:
        return False
    first = models.weight(model, name.replace(".ln2.", ".ln1."))
    return first is not None and torch.equal(tensor, first)


def _get(model: Model, name: str) -> Tensor | None:
    """The weight called `name`, or None where the architecture has none, or one of zeros."""
    found = None
    if name.endswith(("attn.W_K", "attn.W_V")):
        # HookedTransformer repeats the heads that several queries share, and keeps them once under these names.
        found = models.weight(model, name.replace(".W_", "._W_"))
    if found is None:
        found = models.weight(model, name)
    if found is None:
        return None
    # A bias of zeros is what HookedTransformer gives an architecture without one.
    return found if found.ndim > 1 or bool(found.any()) else None


def _sample(tensor: Tensor) -> Tensor:
    """Up to 4 096 entries, evenly spaced in row order, read without copying the whole weight."""
    return tensor.detach()[_places(tuple(tensor.shape), tensor.device)]


@lru_cache(maxsize=64)
def _places(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
    """The same for every weight of a shape; making them takes longer than reading them."""
    size = math.prod(shape)
    places = torch.linspace(0, size - 1, min(SAMPLED, size), dtype=torch.float64)
    return torch.unravel_index(places.long().to(device), shape)


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def provenance(model: Model) -> dict:
    """What a stored result says of the model it belongs to, and of the versions that it was computed with."""
    config = models.config_of(model)
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
