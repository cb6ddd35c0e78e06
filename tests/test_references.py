"""What texts are compared with, names that are mentioned, and records asked the other way round."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factlens.atlas import relations
from factlens.atlas.books import fact_book
from factlens.atlas.paragraphs import reference
from factlens.benchmarks import record_files
from factlens.benchmarks.atlas_counterfact import counterfact
from factlens.benchmarks.inverses import inverses
from factlens.benchmarks.mentions import mentioned, plain_name
from factlens.benchmarks.record_files import streamed
from factlens.benchmarks.references import UNRELATED, bundled_references, read_references, unrelated
from factlens.errors import FactFileError


def snippet(relation: str, target: str, *texts: str) -> dict[str, object]:
    """A record of the official file."""
    samples = [{"entity": f"Q{n}", "text": text} for n, text in enumerate(texts)]
    return {"relation_id": relation, "target_id": target, "samples": samples}


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
    rows = [
        snippet(record.relation_id, record.target_new.id, "aa bb", "cc"),
        snippet("P1", "Q1", "dd"),
        snippet("P1", "Q2"),
    ]
    path.write_text(json.dumps(rows))
    found = read_references(path)
    assert found.of(record) == ("aa bb", "cc")
    assert list(found.tfidf.columns) == ["aa", "bb", "cc", "dd"]
    assert found.of(next(r for r in records if r.target_new != record.target_new)) == ()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"P1": {"Q1": [{"text": "x"}]}}', r"must hold a list of records, as attribute_snip"),
        ("[1]", "record 0: 1 is no record of named values"),
        ('[{"relation_id": "P1"}]', "record 0: no target_id; it has relation_id"),
        ('[{"relation_id": "P1", "target_id": "Q1", "samples": [{}]}]', "samples: no text"),
        ('[{"relation_id": "P1", "target_id": "Q1", "samples": "x"}]', "samples must be a list"),
        ("[", "record 0: not JSON, or cut off"),
        ('[{"relation_id": "P1", "target_id": "Q1", "samples": []}', "record 0: not JSON, or cut"),
        ("[]", "holds no texts"),
        ("", "must hold a list"),
    ],
)
def test_another_file_than_the_official_one_is_refused(tmp_path, content, words):
    path = tmp_path / "attribute_snippets.json"
    path.write_text(content)
    with pytest.raises(FactFileError, match=words) as caught:
        read_references(path)
    assert "\n" not in str(caught.value)
    path.write_bytes(b"[\xff]")
    with pytest.raises(FactFileError, match="record 0: not UTF-8"):
        read_references(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(json_values), st.integers(1, 9), st.sampled_from([None, 1]), st.booleans())
def test_a_long_file_gives_row_by_row_what_it_gives_at_once(rows, chunk, indent, ascii_only):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_files, "CHUNK", chunk)
        path = Path(folder) / "long.json"
        text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
        path.write_text(text, encoding="utf-8")
        assert list(streamed(path, "long.json")) == json.loads(text)
        path.write_text(text[:-1], encoding="utf-8")
        with pytest.raises(FactFileError, match=r"record \d+: not JSON, or cut off"):
            list(streamed(path, "long.json"))


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
