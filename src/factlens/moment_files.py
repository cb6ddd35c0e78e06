"""Moments as files: safetensors of our own, and the npz of the official statistics.

C is symmetric, so its upper triangle is kept, row by row, in float64: no rounding, at the size of a float32 matrix.
"""

import errno
import json
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from factlens.errors import MomentError
from factlens.files import written_whole
from factlens.moments import KeyMoment

FORMAT = "factlens-moment/1"
_UPPER = "upper"
_ASYMMETRY = 1e-4
"""Largest difference between an official sum and its transpose, of its largest entry; float32 sums round."""


def save_moment(moment: KeyMoment, path: str | Path) -> Path:
    """Write a moment with its `about` as metadata; `load_moment` reads it back.

    Raises:
        OutputError: the place cannot be written. Nothing half-written stays behind.
    """
    about = {**moment.about, "tokens": moment.count, "d_mlp": len(moment.total)}
    return write_tensors(path, FORMAT, about, {_UPPER: packed(moment.total.cpu().double())})


def load_moment(path: str | Path) -> KeyMoment:
    """Read a moment that `save_moment` wrote.

    Raises:
        MomentError: not there, truncated, something else, or with numbers that no moment has.
    """
    about, tensors = read_tensors(path, FORMAT)
    try:
        count, d_mlp, upper = int(about["tokens"]), int(about["d_mlp"]), tensors[_UPPER]
    except (KeyError, TypeError, ValueError):
        raise MomentError(f"{path} is damaged: it does not say what it holds") from None
    if upper.dtype != torch.float64 or upper.shape != (d_mlp * (d_mlp + 1) // 2,):
        raise MomentError(
            f"{path} is damaged: a tensor {tuple(upper.shape)} of {upper.dtype} is no moment of {d_mlp} neurons"
        )
    known = {name: value for name, value in about.items() if name not in ("tokens", "d_mlp")}
    return _checked(unpacked(upper, d_mlp), count, path, known)


def read_official(path: str | Path) -> KeyMoment:
    """Read the official statistics, an npz with the sum `mom2.mom2` and the token count `mom2.count`.

    Raises:
        MomentError: not there, not an npz, with pickled arrays where numbers are wanted, or with numbers that no
            moment has.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            total = np.asarray(stored["mom2.mom2"])
            count = np.asarray(stored["mom2.count"])
            if total.dtype.kind != "f" or count.size != 1 or count.dtype.kind not in "iuf":
                raise ValueError(f"mom2.mom2 is of {total.dtype}, mom2.count of {count.dtype}")
            number = int(count.item())
    except FileNotFoundError:
        raise MomentError(f"there are no statistics at {path}") from None
    except KeyError as error:
        name = str(error).strip("'\"").split(" ")[0]
        raise MomentError(
            f"{path} has no {name}; the official statistics hold mom2.mom2 and mom2.count"
        ) from None
    except (
        OSError, ValueError, TypeError, AttributeError, EOFError, OverflowError, NotImplementedError,
        zipfile.BadZipFile, zlib.error, pickle.UnpicklingError,
    ) as error:  # fmt: skip
        raise MomentError(f"{path} is no official statistics file ({_line(error)})") from None
    if total.ndim != 2 or total.shape[0] != total.shape[1] or not total.size:
        raise MomentError(f"{path}: mom2.mom2 has the shape {total.shape}; a moment is square")
    matrix = torch.from_numpy(total.astype(np.float64))
    if float((matrix - matrix.T).abs().max()) > _ASYMMETRY * float(matrix.abs().max()):
        raise MomentError(f"{path}: mom2.mom2 is not symmetric, so it is no second moment")
    return _checked(
        (matrix + matrix.T) / 2, number, path, {"corpus": f"official {Path(path).name}"}
    )


def read_moment(path: str | Path) -> KeyMoment:
    """Read either kind of file: `.npz` is the official one.

    Raises:
        MomentError: as `load_moment` and `read_official`.
    """
    return read_official(path) if Path(path).suffix.lower() == ".npz" else load_moment(path)


# -- shared with the files of unfinished passes ----------------------------------------------------


def write_tensors(
    path: str | Path, kind: str, about: Mapping[str, Any], tensors: dict[str, Tensor]
) -> Path:
    """Write a safetensors file in the format `kind`, whole or not at all.

    Raises:
        OutputError: the place cannot be written, or is full.
    """
    metadata = {"format": kind, "about": json.dumps(about)}
    with written_whole(path) as partial:
        try:
            save_file(tensors, partial, metadata=metadata)
        except SafetensorError as error:  # Also for a full disk, which elsewhere is an OSError.
            raise OSError(errno.EIO, _line(error)) from None
    return Path(path)


def read_tensors(path: str | Path, wanted: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata and tensors of a safetensors file in the format `wanted`.

    Raises:
        MomentError: not there, truncated, or something else.
    """
    return _open(path, wanted, with_tensors=True)


def read_about(path: str | Path) -> dict[str, Any]:
    """What a stored moment says of itself, without reading its numbers.

    Raises:
        MomentError: as `load_moment`.
    """
    return _open(path, FORMAT, with_tensors=False)[0]


def packed(matrix: Float[Tensor, "d_mlp d_mlp"]) -> Float[Tensor, " upper"]:
    """The upper triangle, row by row."""
    return matrix[torch.ones_like(matrix, dtype=torch.bool).triu()].contiguous()


def unpacked(upper: Float[Tensor, " upper"], d_mlp: int) -> Float[Tensor, "d_mlp d_mlp"]:
    """The symmetric matrix of an upper triangle."""
    matrix = torch.zeros(d_mlp, d_mlp, dtype=upper.dtype)
    matrix[torch.ones_like(matrix, dtype=torch.bool).triu()] = upper
    return matrix + matrix.triu(1).T


def _open(
    path: str | Path, wanted: str, *, with_tensors: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as stored:
            metadata = stored.metadata() or {}
            if metadata.get("format") != wanted:
                raise MomentError(
                    f"{path} is in the format {metadata.get('format')!r}; {wanted!r} is read here"
                )
            about = json.loads(metadata["about"])
            if not isinstance(about, dict):
                raise ValueError("its description is no record")
            keys = stored.keys() if with_tensors else ()
            return about, {name: stored.get_tensor(name) for name in keys}
    except FileNotFoundError:
        raise MomentError(f"there are no statistics at {path}") from None
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        if isinstance(error, MomentError):
            raise
        raise MomentError(
            f"{path} holds no key statistics, or is damaged ({_line(error)})"
        ) from None


def _checked(
    total: Float[Tensor, "d_mlp d_mlp"], count: int, path: str | Path, about: Mapping[str, Any]
) -> KeyMoment:
    """Refuse what no sum of k kᵀ can be."""
    if count < 1:
        raise MomentError(f"{path} counts {count} tokens; a moment has at least one")
    if not bool(torch.isfinite(total).all()):
        raise MomentError(f"{path} holds numbers that are not finite; gather it again")
    if bool((total.diagonal() < 0).any()):
        raise MomentError(f"{path} has a negative diagonal, so it is no second moment")
    return KeyMoment(total, count, about)


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:120] or type(error).__name__
