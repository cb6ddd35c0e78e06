"""Files that are written whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from factlens.errors import OutputError


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
