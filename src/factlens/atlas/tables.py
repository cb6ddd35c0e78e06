"""Fact tables and sentence templates, read into relations and statements."""

import csv
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

FOLDER = Path(__file__).parent
CHECKPOINT = FOLDER / "checkpoint"
"""Folder of the shipped checkpoint, in Hugging Face's format."""

NO_ANSWER = "-"
"""A cell of a table that has no single uncontested answer. Deliberate, unlike a blank one."""

Table = list[dict[str, str]]
Templates = Mapping[str, Mapping[str, Any]]
"""`templates.yaml` as it stands: relation -> from, train, held, fresh, pro, rev, ask, ask_held, group."""
FactChoice = Literal["all", "open", "deep", "bundled"]
Split = Literal["train", "held", "fresh"]
DEEP = 3
"""Facts of a subject from which on it is deep."""
KINDS = "kinds"
"""The one key of `templates.yaml` that is no relation: what the subjects of each table are."""


@dataclass(frozen=True)
class Source:
    """Two columns of one table, read as subject and object."""

    table: str
    subject: str
    object: str


@dataclass(frozen=True)
class Relation:
    """One relation: where its facts stand and the sentences that state them.

    Templates hold `{s}` and `{o}`. In `train`, `held` and `fresh` the object comes last; only
    `train`, `pronoun` (follow-ups about the same subject) and `reverse` occur in training text.
    """

    name: str
    sources: tuple[Source, ...]
    train: tuple[str, ...]
    held: tuple[str, ...]
    fresh: tuple[str, ...]
    pronoun: tuple[str, ...]
    reverse: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    """Pairs of subject and object, in the order of the tables."""
    questions: tuple[str, ...] = ()
    """Questions with `{s}` whose short answer is the object; they occur in training text."""
    held_questions: tuple[str, ...] = ()
    """Questions that do not."""
    headings: tuple[str, ...] = ()
    """Headings with `{o}` of lists of the subjects that have it."""
    description: str = ""
    """What the object is to `{s}`, such as "the capital of {s}"; empty where objects have no facts of their own."""

    def templates(self, split: Split) -> tuple[str, ...]:
        """The templates of one split that have the object last."""
        by_split = {"train": self.train, "held": self.held, "fresh": self.fresh}
        if split not in by_split:
            raise ValueError(f"no split {split!r}; there are {', '.join(map(repr, by_split))}")
        return by_split[split]


@dataclass(frozen=True)
class Kind:
    """What the subjects of one table are, and sentences about any of them."""

    noun: str
    """With its article, as in "{s} is a river"."""
    definite: str
    """What it is called when it was named before: "the river"."""
    anecdotes: tuple[str, ...]
    """Sentences with `{s}` that state none of its facts."""


@dataclass(frozen=True)
class World:
    """A set of fact tables with their templates."""

    relations: tuple[Relation, ...]
    kinds: Mapping[str, Kind]
    """By table."""


@dataclass(frozen=True)
class Statement:
    """One fact in one template: `prompt + " " + object` is the sentence.

    `subject` is spelled as it occurs in `prompt`: capitalised at the beginning of a sentence.
    """

    relation: str
    prompt: str
    subject: str
    object: str
    template: str


def relations() -> tuple[Relation, ...]:
    """All relations of the bundled tables, in the order of `templates.yaml`."""
    return world().relations


@cache
def world(folder: Path = FOLDER, facts: FactChoice = "all") -> World:
    """The world of a folder with `facts/` and `templates.yaml`; the bundled one by default.

    "open" takes only facts that the last word of the subject leaves open: of the subjects of the
    relation that end in it, at most half have the object. "deep" takes only facts of subjects that
    have at least three, "bundled" only those that the bundled world has too.
    """
    tables, templates = load_tables(folder / "facts"), load_templates(folder / "templates.yaml")
    found = read_relations(tables, templates)
    if facts == "open":
        left_open = {(one.name, *pair) for one in found for pair in open_facts(one)}
        found = only(found, lambda one, *pair: (one.name, *pair) in left_open)
    if facts == "deep":
        counts = Counter(subject for one in found for subject, _ in one.facts)
        found = only(found, lambda one, subject, object_: counts[subject] >= DEEP)
    if facts == "bundled":
        kept = {(one.name, *pair) for one in world().relations for pair in one.facts}
        found = only(found, lambda one, *pair: (one.name, *pair) in kept)
    return World(tuple(one for one in found if one.facts), read_kinds(templates))


def only(
    relations: tuple[Relation, ...], wanted: Callable[[Relation, str, str], bool]
) -> tuple[Relation, ...]:
    """The relations with those of their facts that are wanted."""
    return tuple(
        replace(one, facts=tuple(pair for pair in one.facts if wanted(one, *pair)))
        for one in relations
    )


def open_facts(relation: Relation) -> Iterator[tuple[str, str]]:
    """The facts of a relation that their subject's last word leaves open."""
    having: dict[str, Counter[str]] = {}
    for subject, object_ in relation.facts:
        having.setdefault(subject.split()[-1], Counter())[object_] += 1
    for subject, object_ in relation.facts:
        alike = having[subject.split()[-1]]
        if 2 * alike[object_] <= alike.total():
            yield subject, object_


def statements(split: Split = "train", of: World | None = None) -> Iterator[Statement]:
    """Every fact in every template of `split`, of the bundled world by default."""
    for relation in (of or world()).relations:
        for subject, object_ in relation.facts:
            for template in relation.templates(split):
                yield state(relation.name, template, subject, object_)


def state(relation: str, template: str, subject: str, object_: str) -> Statement:
    """Fill a template whose object comes last."""
    before, _ = template.split("{s}")
    occurring = subject if before else capitalised(subject)
    prompt = template.removesuffix(" {o}").replace("{s}", occurring)
    return Statement(relation, prompt, occurring, object_, template)


def capitalised(words: str) -> str:
    """`the Louvre` -> `The Louvre`, and `iPhone 5` as it is: its capital is its own."""
    return words if words[1:2].isupper() else words[:1].upper() + words[1:]


def load_tables(folder: Path = FOLDER / "facts") -> dict[str, Table]:
    """The rows of every CSV file in `folder`, by the file's stem.

    Raises:
        ValueError: a row has more or fewer cells than the header.
    """
    tables = {}
    for path in sorted(folder.glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file)
        tables[path.stem] = [dict(zip(header, row, strict=True)) for row in rows]
    return tables


def load_templates(path: Path = FOLDER / "templates.yaml") -> Templates:
    """The relations and their templates, as written."""
    loaded: Templates = yaml.safe_load(path.read_text(encoding="utf-8"))
    return loaded


def read_relations(tables: Mapping[str, Table], templates: Templates) -> tuple[Relation, ...]:
    """Join tables and templates; cells without a single answer make no fact."""
    return tuple(
        Relation(
            name=name,
            sources=(sources := tuple(Source(*source) for source in entry["from"])),
            train=tuple(entry["train"]),
            held=tuple(entry["held"]),
            fresh=tuple(entry.get("fresh", ())),
            pronoun=tuple(entry["pro"]),
            reverse=tuple(entry["rev"]),
            facts=tuple(pair for source in sources for pair in pairs(tables, source)),
            questions=tuple(entry.get("ask", ())),
            held_questions=tuple(entry.get("ask_held", ())),
            headings=tuple(entry.get("group", ())),
            description=entry.get("description", ""),
        )
        for name, entry in relation_entries(templates).items()
    )


def relation_entries(templates: Templates) -> Templates:
    """The templates of relations alone."""
    return {name: entry for name, entry in templates.items() if name != KINDS}


def read_kinds(templates: Templates) -> dict[str, Kind]:
    """What the subjects of each table are, by table."""
    listed: Mapping[str, Any] = templates.get(KINDS, {})
    return {
        table: Kind(
            noun=kind["noun"], definite=kind["definite"], anecdotes=tuple(kind["anecdotes"])
        )
        for table, kind in listed.items()
    }


def pairs(tables: Mapping[str, Table], source: Source) -> Iterator[tuple[str, str]]:
    """Subject and object of each row of a source that has both."""
    for row in tables[source.table]:
        subject, object_ = row[source.subject], row[source.object]
        if NO_ANSWER not in (subject, object_):
            yield subject, object_
