"""A run directory: parts that were finished stay finished.

    runs/x/
      run.yaml             the whole configuration, what it belongs to, versions
      facts.parquet        the facts asked, and which of them the model knows
      parts/part-00017.parquet   one chunk's `Trace`, or rows, written to a temporary name, then renamed
      frame.parquet, ...   all parts together

The same command resumes. Another configuration is refused, with what differs; a damaged part is set aside and done
again; a second process at the same run is told to wait.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from factlens.errors import OutputError, RunError, TraceFileError
from factlens.files import alone, written_whole
from factlens.row_files import Rows
from factlens.traces import Trace

FORMAT = "factlens-run/1"
TOLD = 3
"""Differences between two configurations that a refusal names."""
_RUN, _PARTS, _LOCK = "run.yaml", "parts", ".lock"

Part = TypeVar("Part", Trace, Rows)


@dataclass(frozen=True)
class Store:
    """An open run directory."""

    folder: Path

    def part(self, number: int) -> Path:
        """Where the part `number` is, or will be."""
        return self.folder / _PARTS / f"part-{number:05d}.parquet"

    def read(self, number: int) -> Trace | None:
        """A finished part; None if there is none. A damaged one is renamed `.damaged`, and then there is none.

        Raises:
            RunError: it is there and cannot be opened, which says nothing against what it holds.
        """
        return self._whole(number, Trace.load)

    def read_rows(self, number: int) -> Rows | None:
        """A finished part of an evaluation. Raises what `read` raises."""
        return self._whole(number, Rows.load)

    def _whole(self, number: int, load: Callable[[Path], Part]) -> Part | None:
        path = self.part(number)
        try:
            path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RunError(f"cannot read {path}: {error.strerror}") from None
        try:
            return load(path)
        except (TraceFileError, RunError):
            set_aside = [path.with_suffix(f".damaged{n or ''}") for n in range(100)]
            path.replace(next(name for name in set_aside if not name.exists()))
            return None

    def write(self, number: int, part: Trace | Rows) -> None:
        """Keep a finished part.

        Raises:
            OutputError: the disk is full, or the directory cannot be written. Earlier parts stay.
        """
        part.save(self.part(number))

    def config(self) -> dict[str, Any]:
        """What `run.yaml` says: `config`, `about`, and `sessions`, the times it was run."""
        return _read(self.folder)

    def add_session(self, seconds: float, about: Mapping[str, Any]) -> None:
        """Note how long this time took, and on what."""
        content = self.config()
        session = {"seconds": round(seconds, 1), **_plain(about)}
        _write(self.folder, {**content, "sessions": [*content["sessions"], session]})


def open_store(folder: str | Path, config: Mapping[str, Any], about: Mapping[str, Any]) -> Store:
    """Begin a run in `folder`, or go on with the one that is there.

    Args:
        config: what the results depend on; a run that was begun with another is refused.
        about: what is worth knowing and may change in between, such as versions.

    Raises:
        RunError: the directory holds a run with another configuration, or something else.
        OutputError: it cannot be written.
    """
    folder, wanted = Path(folder), _plain(config)
    if (folder / _RUN).exists():
        found = _read(folder)
        if not any(folder.glob("*.parquet")) and not any((folder / _PARTS).glob("*.parquet")):
            # Stopped before anything was known: nothing to protect.
            _write(folder, {**found, "config": wanted, "about": _plain(about)})
            return Store(folder)
        if differences := _differences(found["config"], wanted):
            said = "; ".join(differences[:TOLD])
            more = len(differences) - TOLD
            raise RunError(
                f"{folder} was begun with another configuration: {said}{f'; and {more} more' if more > 0 else ''}. Use another "
                "folder (--out), or the settings it was begun with"
            )
        return Store(folder)
    if folder.is_dir() and (folder / _PARTS).exists():
        raise RunError(f"{folder} holds parts but no {_RUN}; use another folder (--out)")
    try:
        (folder / _PARTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}: {error.strerror}") from None
    _write(folder, {"format": FORMAT, "config": wanted, "about": _plain(about), "sessions": []})
    return Store(folder)


def existing_store(folder: str | Path) -> Store:
    """The run that is in `folder`.

    Raises:
        RunError: there is none.
    """
    _read(Path(folder))
    return Store(Path(folder))


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keep other processes away from a run for the length of a `with` block. A killed process leaves no lock.

    Raises:
        RunError: another process is at it.
        OutputError: the directory cannot be written.
    """
    busy = RunError(
        f"another process is at work on {folder}; wait for it, or use another folder (--out)"
    )
    with alone(Path(folder) / _LOCK, busy):
        yield


def _read(folder: Path) -> dict[str, Any]:
    path = folder / _RUN
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(
            f"there is no run in {folder} (no {_RUN}); `factlens average --out {folder}` begins one"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        line = str(error).split("\n")[0]
        raise RunError(f"cannot read {path}: {line}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise RunError(f"{path} is no run of this version; expected the format {FORMAT!r}")
    return content


def _write(folder: Path, content: Mapping[str, Any]) -> None:
    with written_whole(folder / _RUN) as partial:
        partial.write_text(yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True))


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """As YAML will give it back: tuples as lists, nothing of numpy."""
    return json.loads(json.dumps(value, default=float))


def _differences(found: Any, wanted: Any, name: str = "") -> list[str]:
    """What differs, leaf by leaf, for a person to read."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = dict.fromkeys([*found, *wanted])
        return [
            line
            for key in keys
            for line in _differences(found.get(key), wanted.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if found == wanted else [f"{name} was {found!r}, now {wanted!r}"]
