"""Facts and where they come from: the bundled tables, the official `known_1000.json`, and users' own files."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from factlens import atlas
from factlens.errors import FactError, FactFileError, OutputError

COLUMNS = ("prompt", "subject", "object", "relation", "id")
"""Of a user's file; the first two are required."""


@dataclass(frozen=True)
class Fact:
    """A prompt that ends where the object begins, as in ROME, Section 2: (subject, relation, object).

    `object` is without its leading space; None traces whatever the model ranks first. `relation` and `id` are
    labels that results carry along.
    """

    prompt: str
    subject: str
    object: str | None = None
    relation: str | None = None
    id: str | None = None

    def __post_init__(self) -> None:
        for name in COLUMNS:
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name in COLUMNS[:2]):
                raise FactError(f"a fact's {name} must be text, not {value!r}")


@dataclass(frozen=True)
class Rewrite:
    """A fact to be changed: (subject, relation, object) becomes (subject, relation, `target`) (ROME, Section 3.1).

    After the edit the model should go on from `prompt` with `target`, given without its leading space. A `{}` in the prompt
    stands for the subject, as in CounterFact. `true` is what was there before, for tables; `id` a label.
    """

    prompt: str
    subject: str
    target: str
    true: str | None = None
    id: str | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "subject", "target", "true", "id"):
            value = getattr(self, name)
            if not isinstance(value, str) and (
                value is not None or name in ("prompt", "subject", "target")
            ):
                raise FactError(f"a rewrite's {name} must be text, not {value!r}")
        if not self.target.strip():
            raise FactError(
                f"the target {self.target!r} of {self.prompt!r} is empty; name the new object"
            )
        # Differs from a plain format(): other braces in a prompt are text.
        object.__setattr__(self, "prompt", self.prompt.replace("{}", self.subject))


def bundled_facts(
    split: Literal["train", "held", "fresh"] = "held", *, one_per_fact: bool = False
) -> list[Fact]:
    """The facts that ship with factlens, in templates of `split` ("train", "held" or "fresh").

    "held" and "fresh" are sentences that the bundled model was not trained on. `one_per_fact` keeps the first template of each
    fact instead of all.
    """
    stated = atlas.statements(split, templates=1 if one_per_fact else None)
    return [
        Fact(e.prompt, e.subject, e.object, e.relation, f"{e.relation}/{e.subject}/{number}")
        for number, e in enumerate(stated)
    ]


def bundled_subjects() -> list[str]:
    """The subjects of the bundled facts, each once: real names, over which noise levels are measured."""
    return list(dict.fromkeys(each.subject for each in atlas.statements("held", templates=1)))


# -- files -----------------------------------------------------------------------------------------


def read_facts(
    path: str | Path,
    *,
    ending: str | None = None,
    on_bad_row: Callable[[str], None] | None = None,
) -> list[Fact]:
    """Read facts from a file: `.json` (the official known_1000 form), `.jsonl` or `.csv`.

    CSV and JSONL rows have `prompt` and `subject`, and may have `object`, `relation`, `id`. A `{}` in the prompt
    stands for the subject. With `on_bad_row`, rows that cannot be used are left out, and it is told of each. `ending` says the
    form of a file whose name does not.

    Raises:
        FactFileError: with the row's number, what is wrong in it, and what was expected.
    """
    path = Path(path)
    readers = {".json": _json_rows, ".jsonl": _jsonl_rows, ".csv": _csv_rows}
    form = ending or path.suffix.lower()
    if form not in readers:
        raise FactFileError(f"{path} is none of {', '.join(readers)}; facts are read from those")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise FactFileError(f"cannot read the facts {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise FactFileError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    facts = []
    for where, row in readers[form](text, path):
        try:
            facts.append(_fact(row, where))
        except FactFileError as error:
            if on_bad_row is None:
                raise
            on_bad_row(str(error))
    if not facts:
        raise FactFileError(f"{path} holds no facts that can be used")
    return facts


def _csv_rows(text: str, path: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        yield from _checked_rows(reader, path)
    except csv.Error as error:
        raise FactFileError(f"{path}, line {reader.line_num}: not CSV ({error})") from None


def _checked_rows(
    reader: "csv.DictReader[str]", path: Path
) -> Iterator[tuple[str, Mapping[str, object]]]:
    columns = reader.fieldnames or []
    if missing := [name for name in COLUMNS[:2] if name not in columns]:
        raise FactFileError(
            f"{path} has no column {', '.join(missing)}; it has {', '.join(columns) or 'none'}, and "
            f"facts need {', '.join(COLUMNS[:2])} (and may have {', '.join(COLUMNS[2:])})"
        )
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        yield where, row


def _jsonl_rows(text: str, path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(
        text.split("\n"), start=1
    ):  # Not splitlines: JSON may hold U+2028.
        if not line.strip():
            continue
        yield f"{path}, line {number}", line


def _json_rows(text: str, path: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise FactFileError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
    if not isinstance(rows, list):
        raise FactFileError(f"{path} must hold a list of facts, as known_1000.json does")
    for number, row in enumerate(rows):
        yield f"{path}, record {number}", row


def _fact(row: object, where: str) -> Fact:
    """One row of any of the three forms; known_1000's names stand beside ours."""
    if isinstance(row, str):
        try:
            row = json.loads(row)
        except json.JSONDecodeError as error:
            raise FactFileError(f"{where}: not JSON ({error.msg})") from None
    if not isinstance(row, Mapping):
        raise FactFileError(f"{where}: {row!r} is no record of named values")
    if None in row:
        raise FactFileError(f"{where}: more cells than columns; quote prompts that hold commas")
    values: dict[str, str | None] = {}
    aliases = {"object": "attribute", "relation": "relation_id", "id": "known_id"}
    for name in COLUMNS:
        value = row.get(name, row.get(aliases.get(name, name)))
        values[name] = None if value is None or value == "" else str(value)
    for name in COLUMNS[:2]:
        if not values[name]:
            raise FactFileError(
                f"{where}: no {name}; it has {', '.join(map(str, row)) or 'nothing'}"
            )
    prompt, subject = str(values["prompt"]), str(values["subject"]).strip()
    prompt = prompt.replace("{}", subject)
    if subject not in prompt:
        raise FactFileError(
            f"{where}: subject {subject!r} does not occur in {prompt!r}; spans are matched verbatim"
        )
    return Fact(prompt.rstrip(), subject, values["object"], values["relation"], values["id"])


def write_facts(facts: Iterable[Fact], path: str | Path) -> None:
    """Write facts as CSV in the form that `read_facts` reads."""
    try:
        with Path(path).open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows([getattr(fact, name) or "" for name in COLUMNS] for fact in facts)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from None
