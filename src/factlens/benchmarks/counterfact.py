"""CounterFact records in the official JSON form (ROME, Section 3.3 and Appendix D): read, written, and as rewrites."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from factlens.benchmarks.record_files import Unusable, read_all, texts, usable, value, write
from factlens.errors import FactError, FactFileError
from factlens.facts import Rewrite

PROMPTS = (
    "paraphrase_prompts",
    "neighborhood_prompts",
    "attribute_prompts",
    "generation_prompts",
)
"""The record's lists of whole prompts, by their official names."""


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
    return usable(read_rows(path), Path(path), on_bad_row)


def read_rows(path: str | Path) -> list[Record | Unusable]:
    """`read_records` with each row that cannot be used in its place, and why: what an evaluation is given.

    Raises:
        FactFileError: a file that is none, or in which no row can be used.
    """
    return read_all(Path(path), record_of, benchmark="counterfact", like="counterfact.json")


def write_records(records: Iterable[Record], path: str | Path) -> None:
    """Write records in the official form, which `read_records` and the official code read."""
    write((record.to_json() for record in records), path)


def record_of(row: object, number: int, where: str) -> Record:
    """What one row of the official form says; `where` it is, for errors. Raises what `read_records` raises, or FactError."""
    rewrite = value(row, "requested_rewrite", dict, where)
    inside = f"{where}, requested_rewrite"
    subject = value(rewrite, "subject", str, inside)
    if not subject.strip():
        raise FactFileError(f"{inside}: subject is empty; name what the fact is about")
    lists = {name: texts(row, name, where) for name in PROMPTS}
    return Record(
        case_id=value(row, "case_id", int, where),
        pararel_idx=value(row, "pararel_idx", int, where),
        prompt=value(rewrite, "prompt", str, inside),
        relation_id=value(rewrite, "relation_id", str, inside),
        target_new=_target(rewrite, "target_new", inside),
        target_true=_target(rewrite, "target_true", inside),
        subject=subject,
        **lists,
    )


def _target(rewrite: object, key: str, where: str) -> Target:
    found = value(rewrite, key, dict, where)
    text = value(found, "str", str, f"{where}, {key}")
    if not text.strip():
        raise FactFileError(f"{where}, {key}: str is empty; name the object")
    return Target(text, value(found, "id", str, f"{where}, {key}"))
