"""What texts are compared with, names that are mentioned, and records asked the other way round."""

from __future__ import annotations

import json

import pytest

from factlens.atlas import relations
from factlens.atlas.books import fact_book
from factlens.atlas.paragraphs import reference
from factlens.benchmarks.atlas_counterfact import counterfact
from factlens.benchmarks.inverses import inverses
from factlens.benchmarks.mentions import mentioned, plain_name
from factlens.benchmarks.references import UNRELATED, bundled_references, read_references, unrelated
from factlens.errors import FactFileError


@pytest.fixture(scope="module")
def records():
    return counterfact(only=["sport", "landmark_city", "currency"]).records


def test_reference_texts_are_about_subjects_that_have_the_new_object(records):
    subjects = fact_book().subjects
    for record in records[::9]:
        texts = bundled_references().of(record)
        assert texts
        assert all(record.target_new.text.casefold() in text.casefold() for text in texts)
        fact = (record.relation_id, record.target_new.text)
        assert list(texts) == [
            reference(each)
            for each in subjects
            if fact in {(one.relation.name, one.object) for one in each.facts}
        ]


def test_the_official_file_of_texts_is_read_and_another_refused(records, tmp_path):
    path, record = tmp_path / "attribute_snippets.json", records[0]
    listed = [{"name": "A", "text": "aa bb"}, {"name": "B", "text": "cc"}]
    rows = {record.relation_id: {record.target_new.id: listed}, "P1": {"Q1": [{"text": "dd"}]}}
    path.write_text(json.dumps(rows))
    found = read_references(path)
    assert found.of(record) == ("aa bb", "cc")
    assert list(found.tfidf.columns) == ["aa", "bb", "cc", "dd"]
    assert found.of(next(r for r in records if r.target_new != record.target_new)) == ()
    for content in ("[1]", "{", '{"P1": {"Q1": [{"name": "x"}]}}', '{"P1": 3}'):
        path.write_text(content)
        with pytest.raises(FactFileError, match=r"is not of attribute_snippets\.json's form"):
            read_references(path)


def test_unrelated_texts_are_always_the_same_but_for_those_that_mention_a_name():
    texts = unrelated()
    assert len(texts) == UNRELATED == len(set(texts))
    assert unrelated({"nobody at all"}) == texts
    subject = next(each for each in fact_book().subjects if reference(each) == texts[0])
    for name in (subject.name, subject.facts[0].object):
        others = unrelated({plain_name(name)})
        assert texts[0] not in others
        assert len(others) == UNRELATED
        kept = [text for text in texts if text in others]
        assert list(others[: len(kept)]) == kept
        assert len(kept) >= UNRELATED - 2, "the others stay"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The Hague's mayor", {"the hague"}),
        ("He lives in Rome, Italy.", {"rome"}),
        ("Romeo", set()),
        ("A. A. Milne wrote it", {"a a milne"}),
        ("", set()),
    ],
)
def test_names_are_mentioned_as_whole_words(text, found):
    names = {plain_name(each) for each in ("the Hague", "Rome", "A. A. Milne", "Milne wrote")}
    assert mentioned(text, names) == found | ({"milne wrote"} if "Milne" in text else set())


def test_a_record_asked_the_other_way_round_ends_where_its_subject_begins(records):
    of = {relation.name: relation for relation in relations()}
    made = {}
    for record in records:
        found = inverses(record)
        made.setdefault(record.relation_id, set()).add(len(found))
        for each in found:
            ends = [r.removesuffix("{s}") for r in of[record.relation_id].reverse]
            new = {e.replace("{o}", record.target_new.text).rstrip().casefold() for e in ends}
            assert each.new.casefold() in new
            assert each.new.casefold() == each.true.casefold().replace(
                record.target_true.text.casefold(), record.target_new.text.casefold(), 1
            )
            assert (each.subject, record.target_true.text) in of[record.relation_id].facts
    counts = {name: {sum(r.endswith(" {s}") for r in of[name].reverse)} for name in made}
    assert made == counts
    assert counts["sport"] != {0}


def test_a_record_of_another_data_set_has_no_other_way_round(records):
    from dataclasses import replace

    assert inverses(replace(records[0], relation_id="P27")) == ()
    assert inverses(replace(records[0], subject="Nobody")) == ()
