"""atlas-zsRE: records of zsRE's form, built from the questions of the bundled world, so that every experiment runs offline.

A pure function of the world and the seed. What is drawn is drawn by sha256, so that a record does not depend on which others there are.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from factlens.atlas import Relation
from factlens.atlas.tables import World, capitalised, world
from factlens.benchmarks.draws import (
    Drawn,
    digest,
    drawn,
    is_tuned,
    new_object,
    numbered,
    overlapping,
)
from factlens.benchmarks.zsre import Record

NO_QUESTION = "the relation has no question, or none that is held out"
NO_OTHER = "the relation has no other object for it"
NO_UNRELATED = "there is no question that has nothing to do with it"


class Records(Drawn[Record]):
    """The records of zsRE's form, and how many facts made none."""

    @property
    def train(self) -> tuple[Record, ...]:
        """For training an editor and for choosing its numbers; of other subjects than `test`, in its unrelated questions too.

        The same subjects as `tune` of atlas-CounterFact, so that an editor trained on one benchmark can be tested on the other.
        Other seeds give other new objects, and so more records of these subjects.
        """
        return self.tune


@dataclass(frozen=True)
class _Unrelated:
    """A fact to ask for beside an edit that has nothing to do with it."""

    relation: Relation
    subject: str
    object: str


def zsre(*, only: Collection[str] | None = None, seed: int = 0, of: World | None = None) -> Records:
    """The atlas-zsRE records: for each fact whose relation has questions, another answer to learn.

    The question is one that training text asks, word for word and with the answer directly after it, its other wording one that it
    never asks, and the unrelated question one that training text asks of another subject and relation, with its true answer.

    Differs from zsRE, whose answers are true: the bundled model knows those, so the answer to learn is another object of the relation,
    the one that atlas-CounterFact draws with the same seed. The true one stands in `pred`.

    Args:
        only: names of the relations to take; all by default.
        seed: of the draws of objects, questions and the order.
        of: another world than the bundled one.

    Raises:
        FactError: no such relation.
    """
    of = of or world()
    pools = {part: _pool(of, part, str(seed)) for part in (True, False)}
    kept: list[Record] = []
    dropped: list[tuple[str, str]] = []
    for number, relation, subject, object_ in numbered(of, only):
        pool = pools[is_tuned(subject)]
        made = _record(relation, subject, object_, number, pool, str(seed))
        if isinstance(made, Record):
            kept.append(made)
        else:
            dropped.append((relation.name, made))
    counts = pd.DataFrame(dropped, columns=["relation", "reason"])
    table = counts.groupby(["relation", "reason"], sort=True).size().reset_index(name="n")
    kept.sort(key=lambda each: digest(str(seed), "order", str(each.case_id)))
    return Records(tuple(kept), table)


# -- one record ------------------------------------------------------------------------------------


def _record(
    relation: Relation,
    subject: str,
    object_: str,
    number: int,
    pool: Sequence[_Unrelated],
    seed: str,
) -> Record | str:
    """The record of fact `number` of the world, or why there is none."""
    mark = (seed, relation.name, subject)
    if not relation.questions or not relation.held_questions:
        return NO_QUESTION
    new = new_object(relation, subject, object_, mark)
    if new is None:
        return NO_OTHER
    unrelated = _unrelated(pool, relation, (subject, object_, new), mark)
    if unrelated is None:
        return NO_UNRELATED
    template = drawn(relation.questions, *mark, "question")[0]
    src = _question(template, subject)
    loc = _question(drawn(_asking(unrelated.relation), *mark, "loc")[0], unrelated.subject)
    return Record(
        case_id=number,
        subject=capitalised(subject) if template.startswith("{s}") else subject,
        src=src,
        rephrase=_question(drawn(relation.held_questions, *mark, "rephrase")[0], subject),
        answers=(new,),
        loc=loc.removesuffix("?"),
        loc_ans=unrelated.object,
        pred=object_,
        alt=new,
        cond=f"{object_} >> {new} || {src}",
    )


def _question(template: str, subject: str) -> str:
    """A question as training text asks it (`factlens.atlas.paragraphs.questions`): its answer follows after a space."""
    return capitalised(template.replace("{s}", subject))


def _asking(relation: Relation) -> list[str]:
    """The questions that zsRE's form can hold as unrelated ones, to which it adds the question mark."""
    return [each for each in relation.questions if each.endswith("?")]


# -- unrelated questions ---------------------------------------------------------------------------


def _pool(of: World, tuned: bool, seed: str) -> list[_Unrelated]:
    """The facts of one part of the subjects that can be asked for and have one answer, in an order of their own."""
    found = [
        _Unrelated(relation, subject, object_)
        for relation in of.relations
        if _asking(relation)
        for subject, object_ in _single(relation)
        if is_tuned(subject) == tuned
    ]
    found.sort(key=lambda each: digest(seed, "pool", each.relation.name, each.subject))
    return found


def _single(relation: Relation) -> Iterator[tuple[str, str]]:
    """The facts whose subject has no other object in the relation."""
    counts = Counter(subject.casefold() for subject, _ in relation.facts)
    return ((s, o) for s, o in relation.facts if counts[s.casefold()] == 1)


def _unrelated(
    pool: Sequence[_Unrelated], relation: Relation, names: tuple[str, ...], mark: tuple[str, ...]
) -> _Unrelated | None:
    """The first fact, from a drawn place on, of another relation in which none of the record's names stands."""
    start = int(digest(*mark, "unrelated"), 16)
    for step in range(len(pool)):
        fact = pool[(start + step) % len(pool)]
        if fact.relation.name != relation.name and not any(
            overlapping(name, (fact.subject, fact.object)) for name in names
        ):
            return fact
    return None
