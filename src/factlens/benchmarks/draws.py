"""What records of the bundled world have in common: its facts by number, new objects, the split by subject, and draws by sha256.

What is drawn depends on its mark and on what there is to draw from, never on which other records are made.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, runtime_checkable

import pandas as pd

from factlens.atlas import Relation
from factlens.atlas.tables import World
from factlens.errors import FactError

TUNED = 4
"""One subject of so many is for what is chosen or trained, the others for testing it."""
PARTS = ("tune", "held", "test")
HELD = 8
"""One subject of so many is held out of what editors are trained on."""
_SEPARATOR = "\x1f"


@runtime_checkable
class About(Protocol):
    """A record of any benchmark."""

    @property
    def subject(self) -> str:
        """What it is about."""


Made = TypeVar("Made", bound=About)


@dataclass(frozen=True)
class Drawn(Generic[Made]):
    """The records of a benchmark, in an order in which the first n are a fair sample, and how many facts made none."""

    records: tuple[Made, ...]
    dropped: pd.DataFrame
    """`relation, reason, n`: facts that made no record."""

    @property
    def tune(self) -> tuple[Made, ...]:
        """For choosing an editor's numbers, or training it; of other subjects than `test`."""
        return self._of("tune")

    @property
    def held(self) -> tuple[Made, ...]:
        """Of `tune`, those of subjects that no editor is trained on: for choosing the numbers of trained editors too."""
        return self._of("held")

    @property
    def test(self) -> tuple[Made, ...]:
        """For the numbers that are reported."""
        return self._of("test")

    def _of(self, part: str) -> tuple[Made, ...]:
        return tuple(record for record in self.records if is_of(part, record.subject))

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Made]:
        return iter(self.records)


def is_tuned(subject: str) -> bool:
    """Whether the subject's records are for choosing; the same with and without a capital."""
    return int(digest("split", subject.casefold())[:8], 16) % TUNED == 0


def is_of(part: str, subject: str) -> bool:
    """Whether the subject's records are of a part: "tune", "held", which is some of those, or "test", which is none of them.

    Raises:
        FactError: no such part.
    """
    if part not in PARTS:
        raise FactError(f"no part {part!r} of the records; there are {', '.join(PARTS)}")
    if part == "test":
        return not is_tuned(subject)
    return is_tuned(subject) and (part == "tune" or is_held(subject.casefold()))


def is_held(about: str) -> bool:
    """Whether what is about a subject, in small letters, or a passage is held out of what editors are trained on."""
    return int(digest("held lesson", about)[:8], 16) % HELD == 0


def numbered(of: World, only: Collection[str] | None) -> Iterator[tuple[int, Relation, str, str]]:
    """Every fact of the relations, with its number in the tables, whichever relations are taken.

    Raises:
        FactError: no such relation.
    """
    known = [relation.name for relation in of.relations]
    if unknown := set(only or ()) - set(known):
        raise FactError(f"no relation {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    facts = ((relation, *pair) for relation in of.relations for pair in relation.facts)
    for number, (relation, subject, object_) in enumerate(facts):
        if only is None or relation.name in only:
            yield number, relation, subject, object_


def new_object(relation: Relation, subject: str, object_: str, mark: tuple[str, ...]) -> str | None:
    """Another object of the relation that is not true of the subject, and not the true one in longer or shorter words."""
    true = {o for s, o in relation.facts if s.casefold() == subject.casefold()} | {object_}
    objects = {o for _, o in relation.facts}
    for one in true:
        objects -= overlapping(one, objects)
    found = drawn(sorted(objects), *mark, "new object")
    return found[0] if found else None


def overlapping(one: str, others: Iterable[str]) -> set[str]:
    """Those in whose words the one stands, or that stand in its own: `dollar` and `Canadian dollar`."""
    padded = f" {one.casefold()} "
    return {o for o in others if (has := f" {o.casefold()} ") in padded or padded in has}


def drawn(items: Sequence[str], *mark: str) -> list[str]:
    """The items in an order that depends on nothing but them and the mark."""
    start = _SEPARATOR.join((*mark, ""))
    return sorted(items, key=lambda item: hashlib.sha256(f"{start}{item}".encode()).digest())


def digest(*words: str) -> str:
    """The sha256 of the words, in hexadecimal digits."""
    return hashlib.sha256(_SEPARATOR.join(words).encode()).hexdigest()
