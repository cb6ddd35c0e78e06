"""zsRE records in the official JSON form (`zsre_mend_eval.json`; ROME, Section 3.2 and Appendix C): read, written, and as rewrites."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from factlens.benchmarks.record_files import Unusable, read_all, texts, usable, value, write
from factlens.errors import FactError
from factlens.facts import Rewrite

REQUIRED = ("subject", "src", "rephrase", "loc", "loc_ans")
"""Keys whose text is used, so that it must be there; beside them the list `answers`."""
NOTES = ("pred", "alt", "cond")
"""Keys of which nothing is made; they may be empty, as some are in the official file, or missing."""
KEYS = ("subject", "src", "pred", "rephrase", "alt", "answers", "loc", "loc_ans", "cond")
"""All keys, in the order of the official file."""


@dataclass(frozen=True)
class Record:
    """One question to answer anew, the same in other words, and an unrelated one. Fields have their official names, text stands as in the file."""

    case_id: int
    """The record's place in its file, as in the official loader: the file itself has no numbers."""
    subject: str
    src: str
    """The question, with the subject in it. The answer is to follow it."""
    rephrase: str
    """The same question in other words: paraphrase."""
    answers: tuple[str, ...]
    """The answer to learn comes first; as in the official loader no other is used."""
    loc: str
    """An unrelated question without its question mark, in the official file after `nq question: `."""
    loc_ans: str
    """Its gold answer, which must be kept: specificity."""
    pred: str = ""
    """What another model answered."""
    alt: str = ""
    """A false answer, which MEND's own experiments teach and ROME's do not."""
    cond: str = ""
    """`pred`, `alt` and `src` in one line."""

    def __post_init__(self) -> None:
        for name in REQUIRED:
            if not getattr(self, name).strip():
                raise FactError(f"{name} is empty; give its text")
        if not self.answers or not self.answers[0].strip():
            raise FactError(f"answers is empty; name the answer to {self.src!r}")
        if self.subject not in self.src:
            raise FactError(
                f"subject {self.subject!r} does not occur in src {self.src!r}; it is matched verbatim"
            )

    @property
    def rewrite(self) -> Rewrite:
        """The requested change, its id the case's number; what was true before is not known."""
        return Rewrite(self.src, self.subject, self.answers[0], None, str(self.case_id))

    @property
    def asked(self) -> tuple[tuple[str, str], tuple[str, str], tuple[str, str]]:
        """Prompt and target of efficacy, of paraphrase and of specificity.

        The last prompt is `loc` and a question mark, the words `nq question: ` with it where the file has them.
        """
        answer = self.answers[0]
        return (self.src, answer), (self.rephrase, answer), (f"{self.loc}?", self.loc_ans)

    def to_json(self) -> dict[str, object]:
        """The record in the official form, key for key; its place in the list is its number."""
        own = asdict(self) | {"answers": list(self.answers)}
        return {key: own[key] for key in KEYS}


def read_records(
    path: str | Path, *, on_bad_row: Callable[[str], None] | None = None
) -> list[Record]:
    """Read the official `zsre_mend_eval.json`, or any list of records of its form; further keys are left out.

    With `on_bad_row`, records that cannot be used are left out, and it is told of each; the others keep their numbers.
    Differs from the official loader: `loc` need not begin with `nq question: `, which only questions of that data set have, and a
    subject that stands twice in its question is taken at its first place, where the loader makes a template of two.

    Raises:
        FactFileError: with the record's number, the key, and what was expected there.
    """
    return usable(read_rows(path), Path(path), on_bad_row)


def read_rows(path: str | Path) -> list[Record | Unusable]:
    """`read_records` with each row that cannot be used in its place, and why: what an evaluation is given.

    Raises:
        FactFileError: a file that is none, or in which no row can be used.
    """
    return read_all(Path(path), _record, benchmark="zsre", like="zsre_mend_eval.json")


def write_records(records: Iterable[Record], path: str | Path) -> None:
    """Write records in the official form. Read again, they are numbered by their places."""
    write((record.to_json() for record in records), path)


def _record(row: Any, number: int, where: str) -> Record:
    text = {key: value(row, key, str, where) for key in REQUIRED}
    answers = texts(row, "answers", where)
    notes = {key: value(row, key, str, where) for key in NOTES if key in row}
    return Record(case_id=number, answers=answers, **text, **notes)
