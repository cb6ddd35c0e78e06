"""Files of benchmark records: JSON lists whose every value is checked, so that an error names the record, the key and what was expected."""

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Unusable:
    """A row of a file of which no record can be made. An evaluation has it as a row with its reason."""

    benchmark: str
    """The name of what it was to be a record of."""
    case_id: int
    """Its own number; without one its place in the file, counted down from -1, which is no record's."""
    subject: str
    relation_id: str
    """Both as far as the row has them."""
    reason: str


def read_all(
    path: Path, make: Callable[[object, int, str], Made], *, benchmark: str, like: str
) -> list[Made | Unusable]:
    """What `make(row, number, where)` makes of each row of a list, and in the place of a row of which it makes nothing why.

    `like` is the official file's name, for errors.

    Raises:
        FactFileError: a file that is none, or in which no row can be used.
    """
    found = [_made(make, row, number, benchmark) for number, row in enumerate(_rows(path, like))]
    reasons = [each.reason for each in found if isinstance(each, Unusable)]
    if len(reasons) == len(found):
        first = f" ({reasons[0]})" if reasons else ""
        raise FactFileError(f"{path} holds no records that can be used{first}")
    return found


def usable(
    found: Iterable[Made | Unusable], path: Path, on_bad_row: Callable[[str], None] | None
) -> list[Made]:
    """The records of `read_all`; with `on_bad_row` it is told of each row that is none, without it the first is refused.

    Raises:
        FactFileError: naming that row.
    """
    records = []
    for each in found:
        if not isinstance(each, Unusable):
            records.append(each)
        elif on_bad_row is None:
            raise FactFileError(f"{path}, {each.reason}")
        else:
            on_bad_row(f"{path}, {each.reason}")
    return records


def _made(
    make: Callable[[object, int, str], Made], row: object, number: int, benchmark: str
) -> Made | Unusable:
    where = f"record {number}"
    try:
        return make(row, number, where)
    except FactFileError as error:
        reason = str(error)
    except FactError as error:
        reason = f"{where}: {error}"
    return Unusable(
        benchmark=benchmark,
        case_id=_named(row, "case_id", int, -1 - number),
        subject=_named(row, "subject", str, ""),
        relation_id=_named(row, "relation_id", str, ""),
        reason=reason,
    )


def _named(row: object, key: str, kind: type, missing: Any) -> Any:
    """What a row, or the rewrite in it, has under a key, where it is of the kind."""
    rewrite = row.get("requested_rewrite") if isinstance(row, Mapping) else None
    for place in (row, rewrite):
        with contextlib.suppress(FactFileError):
            return value(place, key, kind, "")
    return missing


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
    if isinstance(found, int) and not -(2**63) <= found < 2**63:
        raise FactFileError(f"{where}: {key} must fit 64 bits, and has {found.bit_length()}")
    if isinstance(found, str):
        _check_text(found, key, where)
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
        _check_text(each, f"{key}[{number}]", where)
    return tuple(found)


def _check_text(text: str, key: str, where: str) -> None:
    """Refuse half of a pair of code points, which JSON can hold and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise FactFileError(f"{where}: {key} is not valid text: {text!a}") from None
