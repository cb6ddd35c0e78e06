"""Files: written whole or not at all, named by what they hold, and kept from other processes."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from factlens.errors import FactlensError, OutputError


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Give a temporary name beside `path` to write to; renamed at the end, removed after any error or Ctrl-C.

    Raises:
        OutputError: the place cannot be written, or is full.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        with partial.open("rb") as written:
            os.fsync(
                written.fileno()
            )  # Before the name is there, so that what has the name is whole.
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):  # Renamed already, or in a place that cannot be touched.
            partial.unlink()


def sha256_of(path: Path) -> str:
    """The sha256 of a file of any size, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def alone(lock: Path, busy: FactlensError) -> Iterator[None]:
    """Keep other processes away for the length of a `with` block; `busy` is raised where one is there. A killed process leaves no lock.

    Raises:
        OutputError: the lock's folder cannot be written.
    """
    held = FileLock(lock)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held.acquire(timeout=0)
    except Timeout:
        raise busy from None
    except OSError as error:
        raise OutputError(f"cannot write to the folder {lock.parent}: {error.strerror}") from None
    try:
        yield
    finally:
        held.release()
