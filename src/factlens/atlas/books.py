"""The facts of a world, arranged as its texts need them: one by one, by subject, and by object."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property

from factlens.atlas.tables import (
    TAUGHT,
    Kind,
    Relation,
    World,
    load_tables,
    pairs,
    settled_facts,
    world,
)


@dataclass(frozen=True)
class KnownFact:
    """A subject, a relation and its object."""

    relation: Relation
    subject: str
    object: str


@dataclass(frozen=True)
class Subject:
    """A subject with all its facts, in the order of the relations."""

    name: str
    kind: Kind | None
    """None where the templates say nothing of its table."""
    facts: tuple[KnownFact, ...]


@dataclass(frozen=True)
class FactBook:
    """All facts of a world."""

    facts: tuple[KnownFact, ...]
    subjects: tuple[Subject, ...]
    by_object: tuple[tuple[KnownFact, ...], ...]
    """Facts of one relation that share their object, where there are at least two."""

    @cached_property
    def by_name(self) -> dict[str, Subject]:
        """The subjects by name."""
        return {subject.name: subject for subject in self.subjects}

    @cached_property
    def by_subject(self) -> tuple[tuple[KnownFact, ...], ...]:
        """The facts of each subject that has at least two."""
        return tuple(subject.facts for subject in self.subjects if len(subject.facts) > 1)

    @cached_property
    def contested(self) -> tuple[KnownFact, ...]:
        """Facts of relations with at least two objects, so that there is something to choose from."""
        objects: dict[str, set[str]] = {}
        for fact in self.facts:
            objects.setdefault(fact.relation.name, set()).add(fact.object)
        return tuple(fact for fact in self.facts if len(objects[fact.relation.name]) > 1)

    @cached_property
    def by_relation(self) -> dict[str, list[KnownFact]]:
        """The facts of each relation."""
        found: dict[str, list[KnownFact]] = {}
        for fact in self.facts:
            found.setdefault(fact.relation.name, []).append(fact)
        return found

    @cached_property
    def chained(self) -> tuple[KnownFact, ...]:
        """Facts whose object has facts of its own, and can be described by its subject."""
        return tuple(
            fact for fact in self.facts if fact.relation.description and fact.object in self.by_name
        )


@cache
def fact_book(taught: tuple[str, ...] = TAUGHT) -> FactBook:
    """The facts of the world of some tables (`tables.world`), in the order of the tables."""
    return arranged(world(taught), table_of_subjects())


@cache
def settled_book(taught: tuple[str, ...] = TAUGHT) -> FactBook:
    """Those of `fact_book`'s facts that the last word of their subject settles."""
    of = world(taught)
    kept = tuple(replace(one, facts=tuple(settled_facts(one))) for one in of.relations)
    return arranged(replace(of, relations=kept), table_of_subjects())


def arranged(of: World, tables: Mapping[str, str]) -> FactBook:
    """Arrange a world's facts; `tables` says in which table each subject stands."""
    facts = tuple(
        KnownFact(relation, subject, object_)
        for relation in of.relations
        for subject, object_ in relation.facts
    )
    by_subject: dict[str, list[KnownFact]] = {}
    by_object: dict[tuple[str, str], list[KnownFact]] = {}
    for fact in facts:
        by_subject.setdefault(fact.subject, []).append(fact)
        by_object.setdefault((fact.relation.name, fact.object), []).append(fact)
    return FactBook(
        facts=facts,
        subjects=tuple(
            Subject(name, of.kinds.get(tables[name]), tuple(group))
            for name, group in by_subject.items()
        ),
        by_object=tuple(tuple(group) for group in by_object.values() if len(group) > 1),
    )


@cache
def table_of_subjects() -> dict[str, str]:
    """The table in which each subject stands, of all bundled tables: its kind."""
    tables = load_tables()
    found: dict[str, str] = {}
    for relation in world(()).relations:
        for source in relation.sources:
            for subject, _ in pairs(tables, source):
                found.setdefault(subject, source.table)
    return found
