"""What can be checked of the tables and templates without knowing the world.

Each check yields sentences, one per problem; none means that all is well. The facts themselves were
checked by reading: `docs/atlas.md` lists the rows that were taken out, and why.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import permutations

from factlens.atlas.tables import NO_ANSWER, Source, Table, Templates, pairs

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

PLACES = (
    Source("countries", "capital", "country"),
    Source("cities", "city", "country"),
    Source("landmarks", "city", "country"),
    Source("companies", "headquarters_city", "country"),
)
"""Columns that say in which country a city is."""

COUNTRY_COLUMNS = (
    ("cities", "country"),
    ("landmarks", "country"),
    ("companies", "country"),
    ("people", "country"),
    ("athletes", "country"),
)


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
    for relation, entry in templates.items():
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
    for source in PLACES:
        for city, country in pairs(tables, source):
            countries[city].setdefault(country, source.table)
    for city, found in countries.items():
        if len(found) > 1:
            places = ", ".join(f"{country!r} ({table}.csv)" for country, table in found.items())
            yield f"the city {city!r} is in {places}"


def unknown_countries(tables: Mapping[str, Table]) -> Iterator[str]:
    """A country named as an object that is no row of the table of countries."""
    known = {row["country"] for row in tables["countries"]} | {NO_ANSWER}
    for table, column in COUNTRY_COLUMNS:
        for number, row in enumerate(tables[table], start=2):
            if row[column] not in known:
                yield f"{table}.csv line {number}: no country {row[column]!r} in countries.csv"


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
    for relation, entry in templates.items():
        for split in ("train", "held", "fresh", "pro", "rev"):
            for template in entry[split]:
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
        for relation, entry in templates.items()
        for split in ("train", "held", "fresh")
        for template in entry[split]
    ]
    for (relation, split, prompt), (other, other_split, longer) in permutations(prompts, 2):
        if relation != other and f"{longer} ".startswith(f"{prompt} "):
            yield f"{relation} {prompt!r} begins {other} {longer!r}"
        if split != "train" and other_split == "train" and prompt.casefold() in longer.casefold():
            yield f"{relation} {split} {prompt!r} is trained in {other} {longer!r}"
    yield from repeated(prompts)


def repeated(prompts: Iterable[tuple[str, str, str]]) -> Iterator[str]:
    """The same prompt twice in one relation."""
    seen: set[tuple[str, str]] = set()
    for relation, split, prompt in prompts:
        if (relation, prompt) in seen:
            yield f"{relation} {split}: {prompt!r} stands twice"
        seen.add((relation, prompt))
