"""Files of benchmark records: JSON lists whose every value is checked, so that an error names the record, the key and what was expected."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from factlens.errors import FactError, FactFileError
from factlens.files import written_whole

Made = TypeVar("Made")

CHUNK = 1 << 22
"""Characters of a long file that are read at once."""
_DECODER = json.JSONDecoder()
_SPACE, _BETWEEN = re.compile(r"\s*"), re.compile(r"[\s,]*")
_KINDS = {str: "text", int: "a whole number", dict: "keys and values", list: "a list"}


def read(
    path: Path,
    make: Callable[[object, int, str], Made],
    *,
    like: str,
    on_bad_row: Callable[[str], None] | None = None,
) -> list[Made]:
    """What `make(row, number, where)` makes of each row of a list; with `on_bad_row`, rows of which it makes nothing are told and left out.

    `like` is the official file's name, for errors.

    Raises:
        FactFileError: a file that is none, or a row that cannot be used.
    """
    found = []
    for number, row in enumerate(_rows(path, like)):
        where = f"{path}, record {number}"
        try:
            found.append(_made(make, row, number, where))
        except FactFileError as error:
            if on_bad_row is None:
                raise
            on_bad_row(str(error))
    if not found:
        raise FactFileError(f"{path} holds no records that can be used")
    return found


def _made(make: Callable[[object, int, str], Made], row: object, number: int, where: str) -> Made:
    try:
        return make(row, number, where)
    except FactError as error:
        raise FactFileError(f"{where}: {error}") from None


def write(rows: Iterable[Mapping[str, object]], path: str | Path) -> None:
    """Write rows as a JSON list, whole or not at all.

    Raises:
        OutputError: the place cannot be written.
    """
    listed = list(rows)
    with written_whole(path) as partial:
        partial.write_text(
            json.dumps(listed, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def _rows(path: Path, like: str) -> list[object]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise FactFileError(f"cannot read the records {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise FactFileError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise FactFileError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
    except RecursionError:
        raise FactFileError(f"{path} is nested too deeply to be a list of records") from None
    if not isinstance(rows, list):
        raise FactFileError(f"{path} must hold a list of records, as {like} does")
    return rows


def streamed(path: Path, like: str) -> Iterator[object]:
    """The rows of a list one by one, of a file that is too long to be held as one text.

    `like` is the official file's name, for errors.

    Raises:
        FactFileError: a file that cannot be read, or is no list to its end; told when that place is reached.
    """
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(CHUNK).lstrip()
            if not text.startswith("["):
                raise FactFileError(f"{path} must hold a list of records, as {like} does")
            text = text[1:]
            while True:
                at = 0
                while (found := _next_row(text, at)) is not None:
                    row, at = found
                    number += 1
                    yield row
                text = text[at:]
                more = file.read(max(CHUNK, len(text)))  # A long row is not tried over and over.
                if not more:
                    break
                text += more
    except OSError as error:
        raise FactFileError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise FactFileError(f"{path}, record {number}: not UTF-8; save it as UTF-8") from None
    if text.strip() != "]":
        raise FactFileError(f"{path}, record {number}: not JSON, or cut off")


def _next_row(text: str, at: int) -> tuple[object, int] | None:
    """The row that begins after `at` and where it ends; None where there is none, or not all of it."""
    try:
        row, end = _DECODER.raw_decode(text, _BETWEEN.match(text, at).end())  # type: ignore[union-attr]
    except (json.JSONDecodeError, RecursionError):
        return None
    after = _SPACE.match(text, end).end()  # type: ignore[union-attr]
    return (row, end) if text[after : after + 1] in (",", "]") else None


# -- values ----------------------------------------------------------------------------------------


def value(row: object, key: str, kind: type, where: str) -> Any:
    """The value of `key`, of the type that it must have.

    Raises:
        FactFileError: no such key, or a value of another type.
    """
    if not isinstance(row, Mapping):
        raise FactFileError(f"{where}: {row!r} is no record of named values")
    if key not in row:
        raise FactFileError(f"{where}: no {key}; it has {', '.join(map(str, row)) or 'nothing'}")
    found = row[key]
    if not isinstance(found, kind) or isinstance(found, bool):
        raise FactFileError(f"{where}: {key} must be {_KINDS[kind]}, not {found!r}")
    return found


def texts(row: object, key: str, where: str) -> tuple[str, ...]:
    """The list of texts under `key`, none of them blank.

    Raises:
        FactFileError: no such list, or something else in it.
    """
    found = value(row, key, list, where)
    for number, each in enumerate(found):
        if not isinstance(each, str) or not each.strip():
            raise FactFileError(f"{where}: {key}[{number}] must be text, not {each!r}")
    return tuple(found)
