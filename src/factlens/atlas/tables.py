"""Fact tables and sentence templates, read into relations and statements."""

import csv
import re
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

from factlens.errors import ConfigError

FOLDER = Path(__file__).parent
CHECKPOINT = FOLDER / "checkpoint"
"""Folder of the shipped checkpoint, in Hugging Face's format."""

TAUGHT = (
    "countries",
    "people",
    "athletes",
    "musicians",
    "companies",
    "products",
    "elements",
    "landmarks",
)
"""Tables that the bundled model was taught; the others are there for recipes that teach them. For most of their subjects the last word
settles the facts; for namesakes (people, companies) and landmarks it does not."""

NAMED = re.compile(r"\b(is|was) (called|known as|named)( the)? \{o\}$")
NO_ANSWER = "-"
"""A cell of a table that has no single uncontested answer. Deliberate, unlike a blank one."""

Table = list[dict[str, str]]
Templates = Mapping[str, Mapping[str, Any]]
"""`templates.yaml` as it stands: relation -> from, train, held, fresh, pro, rev, ask, ask_held, group."""
Split = Literal["train", "held", "fresh"]
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

    @cached_property
    def direct(self) -> tuple[str, ...]:
        """Those of `train` in which no *called* and the like stands between *is* and the object. After `The capital of {s} is` comes then the capital."""
        return tuple(template for template in self.train if not NAMED.search(template))

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
    """The relations of the tables that are taught, in the order of `templates.yaml`."""
    return world().relations


@cache
def world(taught: tuple[str, ...] = TAUGHT) -> World:
    """The world of some of the bundled tables, by default of those that are taught, and with an empty tuple of all.

    Raises:
        ConfigError: there is no table of a name that is to be taught.
    """
    tables, templates = load_tables(), load_templates()
    if unknown := set(taught) - set(tables):
        raise ConfigError(f"no table {', '.join(sorted(unknown))}; there are {', '.join(tables)}")
    found = read_relations(tables, templates, taught or tables)
    return World(found, read_kinds(templates))


def settled_facts(relation: Relation) -> Iterator[tuple[str, str]]:
    """The facts of a relation that the last word of their subject settles: all subjects that end in it, if only this one, have the object."""
    shares = sharing(relation.facts, lambda subject: subject.split()[-1])
    return (pair for pair, share in zip(relation.facts, shares, strict=True) if share == 1)


def sharing(facts: Sequence[tuple[str, str]], end: Callable[[str], Hashable]) -> Iterator[float]:
    """For each fact of a relation: of the subjects with the same end, its own among them, the share that has its object."""
    having: dict[Hashable, Counter[str]] = {}
    for subject, object_ in facts:
        having.setdefault(end(subject), Counter())[object_] += 1
    for subject, object_ in facts:
        alike = having[end(subject)]
        yield alike[object_] / alike.total()


def statements(
    split: Split = "train", of: World | None = None, *, templates: int | None = None
) -> Iterator[Statement]:
    """Every fact in every template of `split`, or in the first `templates` of each relation; of the bundled world by default."""
    for relation in (of or world()).relations:
        for subject, object_ in relation.facts:
            for template in relation.templates(split)[:templates]:
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
    # Both are safe loaders, which make plain data only; libyaml's is much the faster, where it is built.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    loaded: Templates = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    return loaded


def read_relations(
    tables: Mapping[str, Table], templates: Templates, taken: Collection[str] | None = None
) -> tuple[Relation, ...]:
    """Join tables (all, or those taken) and templates; cells without a single answer make no fact, nor a relation without facts."""
    joined = (
        _relation(name, entry, tables, tables if taken is None else taken)
        for name, entry in relation_entries(templates).items()
    )
    return tuple(one for one in joined if one.facts)


def _relation(
    name: str, entry: Mapping[str, Any], tables: Mapping[str, Table], taken: Collection[str]
) -> Relation:
    sources = tuple(Source(*source) for source in entry["from"] if source[0] in taken)
    return Relation(
        name=name,
        sources=sources,
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
