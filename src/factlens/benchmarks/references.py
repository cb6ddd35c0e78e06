"""What generated texts are compared with: texts about subjects that do have a record's new object, and texts about anything else.

The official ones are `attribute_snippets.json`, from Wikipedia; those of the bundled world are the paragraphs of its subjects.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

from factlens.atlas.books import fact_book
from factlens.atlas.paragraphs import reference
from factlens.benchmarks.counterfact import Record
from factlens.benchmarks.draws import drawn
from factlens.benchmarks.mentions import mentioned
from factlens.benchmarks.record_files import streamed, value
from factlens.errors import FactFileError
from factlens.text_metrics import TfIdf, fit_tfidf


@dataclass(frozen=True)
class References:
    """Texts by relation and object, and the TF-IDF that was fitted on all of them."""

    texts: Mapping[tuple[str, str], tuple[str, ...]]
    """By `relation_id` and the object's `id`, as records have them."""
    tfidf: TfIdf

    def of(self, record: Record) -> tuple[str, ...]:
        """About subjects that have the record's new object; none where there are no such texts."""
        return self.texts.get((record.relation_id, record.target_new.id), ())


@cache
def bundled_references() -> References:
    """The paragraphs of the bundled world's subjects: what each is, and all its facts."""
    found: dict[tuple[str, str], list[str]] = {}
    paragraphs = []
    for subject in fact_book().subjects:
        paragraphs.append(reference(subject))
        for name, object_ in dict.fromkeys((f.relation.name, f.object) for f in subject.facts):
            found.setdefault((name, f"{name}/{object_}"), []).append(paragraphs[-1])
    return _references(found, paragraphs)


def read_references(path: str | Path) -> References:
    """Read the official `attribute_snippets.json`: a list of `relation_id`, `target_id` and `samples`, each of which has a `text`.

    Raises:
        FactFileError: with the record's number, the key, and what was expected there.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for key, texts in snippets(path):
        found.setdefault(key, []).extend(texts)
    if not found:
        raise FactFileError(f"{path} holds no texts")
    return _references(found, [text for listed in found.values() for text in listed])


def snippets(path: str | Path) -> Iterator[tuple[tuple[str, str], list[str]]]:
    """Relation and object of each record of that file, and its texts; one by one, because it is long. Raises what `read_references` raises."""
    for number, row in enumerate(streamed(Path(path), "attribute_snippets.json")):
        where = f"{path}, record {number}"
        key = value(row, "relation_id", str, where), value(row, "target_id", str, where)
        samples = value(row, "samples", list, where)
        yield key, [value(each, "text", str, f"{where}, samples") for each in samples]


def _references(found: Mapping[tuple[str, str], list[str]], texts: Iterable[str]) -> References:
    return References({key: tuple(listed) for key, listed in found.items()}, fit_tfidf(texts))


# -- unrelated text --------------------------------------------------------------------------------


UNRELATED = 4
"""Paragraphs over which an edited model is compared with the unedited one."""
FACTS = 3
"""At least so many facts has the subject of such a paragraph."""


def unrelated(names: Collection[str] = (), count: int = UNRELATED) -> tuple[str, ...]:
    """So many paragraphs of bundled subjects, in an order that never changes, without those that are about one of the names or mention it.

    Names are from `mentions.plain_name`. Of one name nearly always the same paragraphs come.
    """
    apart = (text for name, text in _paragraphs() if not mentioned(f"{name}: {text}", names))
    return tuple(islice(apart, count))


@cache
def _paragraphs() -> tuple[tuple[str, str], ...]:
    """Subjects with their paragraphs, each of which may be of several subjects and comes once."""
    subjects = {each.name: each for each in fact_book().subjects if len(each.facts) >= FACTS}
    found = ((name, reference(subjects[name])) for name in drawn(sorted(subjects), "unrelated"))
    return tuple({text: (name, text) for name, text in found}.values())
