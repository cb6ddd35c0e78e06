"""Where moments lie between runs: one file for each layer, named by what it was gathered over.

    moments/<fingerprint>/
      layer-05.atlas-corpus.10240-tokens.safetensors
      layer-05.wikimedia-wikipedia-20231101.en.b04c8d1ceb2f.100000-documents.shard-2-of-8.safetensors
      <name>.layers-<digest>.partial     a pass that was stopped, or is at work
      <name>.lock

A file that is damaged is set aside and gathered again. A folder that cannot be written costs the time of gathering,
not the result: a warning says so.
"""

import contextlib
import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from factlens.corpora import Corpus
from factlens.errors import FactWarning, MomentError
from factlens.moment_files import (
    load_moment,
    packed,
    read_about,
    read_tensors,
    save_moment,
    unpacked,
    write_tensors,
)
from factlens.moments import KeyMoment

PARTIAL = "factlens-partial-moments/1"


@dataclass(frozen=True)
class Reached:
    """How far a pass has come."""

    read: int = 0
    """Documents of the corpus that were looked at, those of other shards too."""
    read_tokens: int = 0
    """Their tokens, which decide where the corpus ends."""
    documents: int = 0
    """Documents that were run."""
    tokens: int = 0
    """Tokens that were run: the count of the moments."""


@dataclass(frozen=True)
class Shelf:
    """The folder of one model's moments."""

    folder: Path

    def path(self, layer: int, name: str) -> Path:
        """Where the moment of `layer` is, or will be."""
        return self.folder / f"layer-{layer:02d}.{name}.safetensors"

    def read(self, layer: int, name: str) -> KeyMoment | None:
        """A stored moment, or None. A damaged one is renamed `.damaged`, and then there is none."""
        return self._read(self.path(layer, name))

    def most(self, layer: int) -> KeyMoment | None:
        """The stored moment of a layer over the most tokens, single shards left out; None if there is none."""
        found: list[tuple[int, str, Path]] = []
        for path in sorted(self.folder.glob(f"layer-{layer:02d}.*.safetensors")):
            try:
                about = read_about(path)
            except MomentError:
                self._read(path)  # Sets it aside.
                continue
            if whole(about):
                found.append((int(about.get("tokens", 0)), path.name, path))
        for _, _, path in sorted(found, reverse=True):
            if (moment := self._read(path)) is not None:
                return moment
        return None

    def write(self, layer: int, name: str, moment: KeyMoment) -> Path | None:
        """Keep a moment; None, and a warning, where nothing can be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return save_moment(moment, self.path(layer, name))
        except OSError as error:  # Among them OutputError.
            _warn(f"{error}; the statistics are used but not kept")
            return None

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[bool]:
        """Keep others from gathering the same; waits for one that is at it. Gives whether files can be written."""
        lock = FileLock(self.folder / f"{name}.lock")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                _warn(f"another process gathers the same statistics ({name}); waiting for it")
                lock.acquire()
        except OSError as error:
            _warn(
                f"cannot write to {self.folder} ({error.strerror}); the statistics are used but not kept"
            )
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def partial(self, name: str, layers: Sequence[int]) -> Path:
        """Where an unfinished pass over `layers` is kept."""
        digest = hashlib.sha256(repr(sorted(layers)).encode()).hexdigest()
        return self.folder / f"{name}.layers-{digest[:8]}.partial"

    def _read(self, path: Path) -> KeyMoment | None:
        if not path.exists():
            return None
        try:
            return load_moment(path)
        except MomentError as error:
            set_aside(path, str(error))
            return None


def name_of(corpus: Corpus, asked: str, shard: tuple[int, int] | None) -> str:
    """What a moment was gathered over, as part of a file's name."""
    digest = f".{corpus.digest[:12]}" if corpus.digest else ""
    part = f".shard-{shard[0]}-of-{shard[1]}" if shard else ""
    return f"{slug(corpus.name)}{digest}.{asked}{part}"


def slug(name: str) -> str:
    """A name without what file systems do not like."""
    return re.sub(r"[^\w.-]+", "-", name)[:80]


def whole(about: Mapping[str, Any]) -> bool:
    """Whether no shard of the corpus is missing."""
    shards = about.get("shards") or []
    return not shards or len(shards) == shards[0][1]


def set_aside(path: Path, reason: str) -> None:
    """Rename a damaged file, so that it is made again and can be looked at."""
    names = [path.with_name(f"{path.name}.damaged{number or ''}") for number in range(100)]
    free = next((each for each in names if not each.exists()), names[-1])
    with contextlib.suppress(OSError):
        path.replace(free)
    _warn(f"{reason}; set aside, and gathered again where needed")


def write_partial(
    path: Path, totals: Mapping[int, Tensor], reached: Reached, belongs: Mapping[str, Any]
) -> None:
    """Keep an unfinished pass.

    Raises:
        OutputError: the disk is full.
    """
    about = {"reached": asdict(reached), "belongs": dict(belongs)}
    write_tensors(
        path, PARTIAL, about, {str(layer): packed(total.cpu()) for layer, total in totals.items()}
    )


def read_partial(path: Path, totals: Mapping[int, Tensor], belongs: Mapping[str, Any]) -> Reached:
    """Fill `totals` from an unfinished pass and say how far it came; nowhere if there is none that fits."""
    if not path.exists():
        return Reached()
    try:
        about, tensors = read_tensors(path, PARTIAL)
        reached = Reached(**about["reached"])
        if about["belongs"] != json.loads(json.dumps(belongs)):
            return Reached()
        whole_ones = {
            layer: unpacked(tensors[str(layer)], len(total)) for layer, total in totals.items()
        }
        if not all(bool(torch.isfinite(each).all()) for each in whole_ones.values()):
            raise ValueError("numbers that are not finite")
    except (MomentError, KeyError, TypeError, ValueError, RuntimeError) as error:
        set_aside(path, f"{path} cannot be gone on with ({str(error)[:120]})")
        return Reached()
    for layer, total in totals.items():
        total.copy_(whole_ones[layer])
    return reached


def _warn(message: str) -> None:
    warnings.warn(message, FactWarning, stacklevel=3)
