"""CounterFact records in the official JSON form (ROME, Section 3.3 and Appendix D): read, written, and as rewrites."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from factlens.errors import FactError, FactFileError
from factlens.facts import Rewrite
from factlens.files import written_whole

PROMPTS = (
    "paraphrase_prompts",
    "neighborhood_prompts",
    "attribute_prompts",
    "generation_prompts",
)
"""The record's lists of whole prompts, by their official names."""
_KINDS = {str: "text", int: "a whole number", dict: "keys and values", list: "a list"}


@dataclass(frozen=True)
class Target:
    """An object: its text, without a leading space, and its identifier (`Q1860` in the official file)."""

    text: str
    id: str


@dataclass(frozen=True)
class Record:
    """One counterfactual: what to rewrite, and the prompts that say whether it was. All text stands as in the file."""

    case_id: int
    pararel_idx: int
    prompt: str
    """With `{}` for the subject."""
    relation_id: str
    target_new: Target
    target_true: Target
    subject: str
    paraphrase_prompts: tuple[str, ...]
    """Ask for the same fact in other words: generalisation."""
    neighborhood_prompts: tuple[str, ...]
    """Ask the same of other subjects with the same true object, which must keep it: specificity."""
    attribute_prompts: tuple[str, ...]
    """Ask the same of subjects that do have the new object: what the new fact should look like."""
    generation_prompts: tuple[str, ...]
    """Beginnings from which free text is written."""

    def __post_init__(self) -> None:
        if "{}" not in self.prompt:
            raise FactError(
                f"the prompt {self.prompt!r} has no {{}} for its subject {self.subject!r}"
            )

    @property
    def rewrite(self) -> Rewrite:
        """The requested change, its id the case's number."""
        return Rewrite(
            self.prompt,
            self.subject,
            self.target_new.text,
            self.target_true.text,
            str(self.case_id),
        )

    def to_json(self) -> dict[str, object]:
        """The record in the official form, key for key."""
        return {
            "case_id": self.case_id,
            "pararel_idx": self.pararel_idx,
            "requested_rewrite": {
                "prompt": self.prompt,
                "relation_id": self.relation_id,
                "target_new": {"str": self.target_new.text, "id": self.target_new.id},
                "target_true": {"str": self.target_true.text, "id": self.target_true.id},
                "subject": self.subject,
            },
            **{name: list(getattr(self, name)) for name in PROMPTS},
        }


def read_records(
    path: str | Path, *, on_bad_row: Callable[[str], None] | None = None
) -> list[Record]:
    """Read the official `counterfact.json`, or any list of records of its form; further keys are left out.

    With `on_bad_row`, records that cannot be used are left out, and it is told of each.

    Raises:
        FactFileError: with the record's number, the key, and what was expected there.
    """
    path = Path(path)
    rows = _rows(path)
    records = []
    for number, row in enumerate(rows):
        try:
            records.append(_record(row, f"{path}, record {number}"))
        except FactFileError as error:
            if on_bad_row is None:
                raise
            on_bad_row(str(error))
    if not records:
        raise FactFileError(f"{path} holds no records that can be used")
    return records


def write_records(records: Iterable[Record], path: str | Path) -> None:
    """Write records in the official form, which `read_records` and the official code read."""
    rows = [record.to_json() for record in records]
    with written_whole(path) as partial:
        partial.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _rows(path: Path) -> list[object]:
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
        raise FactFileError(f"{path} must hold a list of records, as counterfact.json does")
    return rows


def _record(row: object, where: str) -> Record:
    rewrite = _get(row, "requested_rewrite", dict, where)
    inside = f"{where}, requested_rewrite"
    lists = {name: _prompts(row, name, where) for name in PROMPTS}
    try:
        return Record(
            case_id=_get(row, "case_id", int, where),
            pararel_idx=_get(row, "pararel_idx", int, where),
            prompt=_get(rewrite, "prompt", str, inside),
            relation_id=_get(rewrite, "relation_id", str, inside),
            target_new=_target(rewrite, "target_new", inside),
            target_true=_target(rewrite, "target_true", inside),
            subject=_get(rewrite, "subject", str, inside),
            **lists,
        )
    except FactError as error:
        raise FactFileError(f"{where}: {error}") from None


def _get(row: object, key: str, kind: type, where: str):  # type: ignore[no-untyped-def]
    """The value of `key`, of the type that it must have."""
    if not isinstance(row, Mapping):
        raise FactFileError(f"{where}: {row!r} is no record of named values")
    if key not in row:
        raise FactFileError(f"{where}: no {key}; it has {', '.join(map(str, row)) or 'nothing'}")
    value = row[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise FactFileError(f"{where}: {key} must be {_KINDS[kind]}, not {value!r}")
    return value


def _target(rewrite: object, key: str, where: str) -> Target:
    found = _get(rewrite, key, dict, where)
    text = _get(found, "str", str, f"{where}, {key}")
    if not text.strip():
        raise FactFileError(f"{where}, {key}: str is empty; name the object")
    return Target(text, _get(found, "id", str, f"{where}, {key}"))


def _prompts(row: object, key: str, where: str) -> tuple[str, ...]:
    found = _get(row, key, list, where)
    for number, prompt in enumerate(found):
        if not isinstance(prompt, str) or not prompt.strip():
            raise FactFileError(f"{where}: {key}[{number}] must be text, not {prompt!r}")
    return tuple(found)
