"""Rewrites from files: CounterFact's records, or a table of one's own."""

import csv
import json
from pathlib import Path
from typing import Any

from factlens.benchmarks.counterfact import Record, read_records
from factlens.errors import FactError, FactFileError
from factlens.facts import Rewrite

COLUMNS = ("prompt", "subject", "target", "true")
"""Of a table; the last may be left out."""


def read_rewrites(path: Path) -> list[tuple[Rewrite, Record | None]]:
    """Rewrites of CounterFact's .json with their records, or of a table with `prompt, subject, target` and maybe `true`.

    Raises:
        FactFileError: with the record's number, and what is wrong in it.
    """
    if path.suffix.lower() == ".json":
        return [(record.rewrite, record) for record in read_records(path)]
    found: list[tuple[Rewrite, Record | None]] = []
    for number, row in enumerate(_rows(path)):
        named: dict[str, Any] = {name: row.get(name) or None for name in COLUMNS}
        where = f"{path}, record {number}"
        if missing := [name for name in COLUMNS[:3] if named[name] is None]:
            raise FactFileError(
                f"{where}: no {', '.join(missing)}; it has {', '.join(map(str, row)) or 'nothing'}"
            )
        if wrong := [name for name in COLUMNS if not isinstance(named[name], str | None)]:
            raise FactFileError(f"{where}: {wrong[0]} must be text, not {named[wrong[0]]!r}")
        if None in row:
            raise FactFileError(f"{where}: more cells than columns; quote prompts that hold commas")
        try:
            rewrite = Rewrite(**named)
        except FactError as error:
            raise FactFileError(f"{where}: {error}") from None
        found.append((rewrite, None))
    if not found:
        raise FactFileError(f"{path} holds no rewrites")
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    """The records of a .csv or .jsonl file."""

    ending = path.suffix.lower()
    if ending not in (".csv", ".jsonl"):
        raise FactFileError(f"{path} is none of .csv, .jsonl, .json; rewrites are read from those")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if ending == ".csv":
                return list(csv.DictReader(file, strict=True))
            rows = [json.loads(line) for line in file if line.strip()]
    except OSError as error:
        raise FactFileError(f"cannot read the rewrites {path}: {error.strerror}") from None
    except (csv.Error, ValueError, RecursionError) as error:
        raise FactFileError(f"{path} is not {ending[1:].upper()} in UTF-8: {error}") from None
    return [row if isinstance(row, dict) else {} for row in rows]
