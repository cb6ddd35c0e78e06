"""What can be checked of the tables and templates without knowing the world.

Each check yields sentences, one per problem; none means that all is well. The facts themselves were
checked by reading: `docs/atlas-taken-out.csv` lists what was taken out or corrected, and why.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from factlens.atlas.tables import (
    KINDS,
    NO_ANSWER,
    Source,
    Table,
    Templates,
    pairs,
    relation_entries,
)

ALIASES = {
    "america": "the United States",
    "usa": "the United States",
    "us": "the United States",
    "united states of america": "the United States",
    "uk": "the United Kingdom",
    "england": "the United Kingdom",
    "great britain": "the United Kingdom",
    "holland": "the Netherlands",
    "burma": "Myanmar",
    "czechia": "the Czech Republic",
    "uae": "the United Arab Emirates",
    "new york city": "New York",
    "washington dc": "Washington",
    "kiev": "Kyiv",
    "soccer": "football",
}
"""Names, normalised, that the tables spell in another way."""

CITY_COLUMNS = ("city", "capital", "headquarters_city")
"""Columns of cities; the table's country, or itself if it is one, says in which country they are."""


def problems(tables: Mapping[str, Table], templates: Templates) -> list[str]:
    """Everything that is wrong with the tables and the templates, in words."""
    return [
        *bad_cells(tables),
        *duplicates(tables),
        *contradictions(tables, templates),
        *cities_in_two_countries(tables),
        *unknown_countries(tables),
        *spelling_variants(tables),
        *bad_templates(templates),
        *colliding_templates(templates),
        *bad_questions(templates),
        *bad_kinds(tables, templates),
    ]


def bad_cells(tables: Mapping[str, Table]) -> Iterator[str]:
    """Cells that are missing, blank, surplus, or padded with spaces."""
    for name, rows in tables.items():
        for number, row in enumerate(rows, start=2):
            for column, cell in row.items():
                if not isinstance(cell, str) or not cell or cell != " ".join(cell.split()):
                    yield f"{name}.csv line {number}: {column} is {cell!r}"


def duplicates(tables: Mapping[str, Table]) -> Iterator[str]:
    """Two rows of a table about one subject (its first column)."""
    for name, rows in tables.items():
        seen: dict[str, int] = {}
        for number, row in enumerate(rows, start=2):
            subject = next(iter(row.values()))
            first = seen.setdefault(normalised(subject), number)
            if first != number:
                yield f"{name}.csv line {number}: {subject!r} stands in line {first} already"


def contradictions(tables: Mapping[str, Table], templates: Templates) -> Iterator[str]:
    """One subject with two objects in one relation, or stated twice, also across tables."""
    for relation, entry in relation_entries(templates).items():
        objects: dict[str, list[str]] = defaultdict(list)
        for source in entry["from"]:
            for subject, object_ in pairs(tables, Source(*source)):
                objects[subject].append(object_)
        for subject, found in objects.items():
            if len(found) > 1:
                yield f"{relation}: {subject!r} has {', '.join(map(repr, found))}"


def cities_in_two_countries(tables: Mapping[str, Table]) -> Iterator[str]:
    """A city that different rows, or tables, put in different countries."""
    countries: dict[str, dict[str, str]] = defaultdict(dict)
    for table, rows in tables.items():
        for column in CITY_COLUMNS:
            if column in rows[0] and "country" in rows[0]:
                for city, country in pairs(tables, Source(table, column, "country")):
                    countries[city].setdefault(country, table)
    for city, found in countries.items():
        if len(found) > 1:
            places = ", ".join(f"{country!r} ({table}.csv)" for country, table in found.items())
            yield f"the city {city!r} is in {places}"


def unknown_countries(tables: Mapping[str, Table]) -> Iterator[str]:
    """A country named as an object that is no row of the table of countries."""
    known = {row["country"] for row in tables["countries"]} | {NO_ANSWER}
    for table, rows in tables.items():
        for number, row in enumerate(rows, start=2):
            if row.get("country", NO_ANSWER) not in known:
                yield f"{table}.csv line {number}: no country {row['country']!r} in countries.csv"


def spelling_variants(tables: Mapping[str, Table]) -> Iterator[str]:
    """Cells that differ only in article, case, accents or punctuation, and known aliases."""
    spellings: dict[str, set[str]] = defaultdict(set)
    for rows in tables.values():
        for row in rows:
            for cell in row.values():
                spellings[normalised(cell)].add(cell)
    for key, found in spellings.items():
        proper = {cell for cell in found if cell[:1].isupper() or cell.startswith("the ")}
        if len(proper) > 1:
            yield f"spelled differently: {', '.join(map(repr, sorted(proper)))}"
        if key in ALIASES:
            yield f"{', '.join(map(repr, sorted(found)))} should be {ALIASES[key]!r}"


def normalised(words: str) -> str:
    """Lower case, without accents, punctuation and article; `St.` is `saint`."""
    plain = unicodedata.normalize("NFKD", words.casefold())
    kept = "".join(letter if letter.isalnum() else " " for letter in plain if letter.isascii())
    listed = ["saint" if word == "st" else word for word in kept.split() if word != "the"]
    return " ".join(listed) or words


def bad_templates(templates: Templates) -> Iterator[str]:
    """Templates without exactly one subject and object, or with text after a last object."""
    for relation, entry in relation_entries(templates).items():
        for split in ("train", "held", "fresh", "pro", "rev"):
            for template in entry.get(split, ()):
                subjects = 0 if split == "pro" else 1
                if (template.count("{s}"), template.count("{o}")) != (subjects, 1):
                    yield f"{relation} {split}: wrong placeholders in {template!r}"
                elif split != "rev" and not template.endswith(" {o}"):
                    yield f"{relation} {split}: the object is not last in {template!r}"


def colliding_templates(templates: Templates) -> Iterator[str]:
    """Prompts that begin alike in two relations, and held-out prompts inside training ones.

    `{s} is known for` asks for a field, but also begins `{s} is known for playing the`.
    """
    prompts = [
        (relation, split, template.removesuffix(" {o}"))
        for relation, entry in relation_entries(templates).items()
        for split in ("train", "held", "fresh")
        for template in entry.get(split, ())
    ]
    asking: dict[str, list[str]] = defaultdict(list)
    for relation, _, prompt in prompts:
        asking[prompt].append(relation)
    for other, _, longer in prompts:
        words = longer.split(" ")
        for count in range(1, len(words) + 1):
            for relation in asking.get(prompt := " ".join(words[:count]), ()):
                if relation != other:
                    yield f"{relation} {prompt!r} begins {other} {longer!r}"
    trained = [(other, p, p.casefold()) for other, split, p in prompts if split == "train"]
    for relation, split, prompt in prompts:
        if split != "train":
            sought = prompt.casefold()
            for other, longer, folded in trained:
                if sought in folded:
                    yield f"{relation} {split} {prompt!r} is trained in {other} {longer!r}"
    yield from repeated(prompts)


def repeated(prompts: Iterable[tuple[str, str, str]]) -> Iterator[str]:
    """The same prompt twice in one relation."""
    seen: set[tuple[str, str]] = set()
    for relation, split, prompt in prompts:
        if (relation, prompt) in seen:
            yield f"{relation} {split}: {prompt!r} stands twice"
        seen.add((relation, prompt))


def bad_questions(templates: Templates) -> Iterator[str]:
    """Questions and headings with other placeholders than they should have, and questions asked twice."""
    asked: dict[str, str] = {}
    for relation, entry in relation_entries(templates).items():
        for question in (*entry.get("ask", ()), *entry.get("ask_held", ())):
            if question.count("{s}") != 1 or "{o}" in question or not question.endswith("?"):
                yield f"{relation}: {question!r} is no question about a subject"
            if question in asked:
                yield f"{relation} asks {question!r}, as {asked[question]} does"
            asked[question] = relation
        for heading in entry.get("group", ()):
            if heading.count("{o}") != 1 or "{s}" in heading:
                yield f"{relation}: {heading!r} is no heading under an object"


def bad_kinds(tables: Mapping[str, Table], templates: Templates) -> Iterator[str]:
    """Tables of which the templates do not say what their subjects are, and anecdotes without a subject."""
    kinds: Mapping[str, Any] = templates.get(KINDS, {})
    if kinds and (unlike := set(tables) ^ set(kinds)):
        yield f"tables without a kind, or kinds without a table: {', '.join(sorted(unlike))}"
    for table, kind in kinds.items():
        for anecdote in kind["anecdotes"]:
            if anecdote.count("{s}") != 1 or "{o}" in anecdote:
                yield f"{table}: wrong placeholders in {anecdote!r}"
