"""CounterFact's form is read and written key for key, and atlas-CounterFact is what the tables say."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from factlens import metrics
from factlens.atlas import relations
from factlens.atlas.tables import capitalised, world
from factlens.benchmarks import draws
from factlens.benchmarks.atlas_counterfact import (
    FEW_NEIGHBOURS,
    IMPLIED,
    NEW_LIKELIER,
    Records,
    counterfact,
    implied,
    other_facts,
)
from factlens.benchmarks.counterfact import Record, Target, read_records, write_records
from factlens.errors import FactError, FactFileError
from factlens.facts import Rewrite

OFFICIAL = {  # The form of the official file; its texts are verbatim, odd spaces included.
    "case_id": 1067,
    "pararel_idx": 11219,
    "requested_rewrite": {
        "prompt": "{} is affiliated with the",
        "relation_id": "P463",
        "target_new": {"str": "World Bank", "id": "Q7164"},
        "target_true": {"str": "FIFA", "id": "Q253414"},
        "subject": "Football Association",
    },
    "paraphrase_prompts": ["Shayna does this.  Football Association belongs to", "It is in"],
    "neighborhood_prompts": ["Zoë's team is in ", "South Africa is a member of"],
    "attribute_prompts": ["Laos is affiliated with"],
    "generation_prompts": ["Football Association is", "Football Association is"],
}


def changed(path: str, value: object) -> dict:
    """The official record with the value at `path` replaced, or taken out for None."""
    record = json.loads(json.dumps(OFFICIAL))
    *way, last = path.split(".")
    place = record
    for step in way:
        place = place[step]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return record


def write(tmp_path, rows: object):
    path = tmp_path / "counterfact.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


# --- the form ---------------------------------------------------------------------------------


def test_an_official_record_is_read_and_written_again_verbatim(tmp_path):
    (record,) = read_records(write(tmp_path, [OFFICIAL]))
    assert record.to_json() == OFFICIAL
    assert list(record.to_json()) == list(OFFICIAL)
    write_records([record], tmp_path / "again.json")
    assert read_records(tmp_path / "again.json") == [record]
    assert json.loads((tmp_path / "again.json").read_text(encoding="utf-8")) == [OFFICIAL]


def test_a_record_is_a_rewrite(tmp_path):
    (record,) = read_records(write(tmp_path, [OFFICIAL]))
    assert record.rewrite == Rewrite(
        "Football Association is affiliated with the",
        "Football Association",
        "World Bank",
        "FIFA",
        "1067",
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (changed("case_id", None), "record 1: no case_id; it has pararel_idx"),
        (changed("case_id", "12"), "case_id must be a whole number, not '12'"),
        (changed("pararel_idx", True), "pararel_idx must be a whole number"),
        (changed("requested_rewrite", "x"), "requested_rewrite must be keys and values"),
        (changed("requested_rewrite.subject", None), "requested_rewrite: no subject"),
        (changed("requested_rewrite.prompt", "no place"), "record 1: the prompt 'no place'"),
        (changed("requested_rewrite.target_new.str", " "), "target_new: str is empty"),
        (changed("requested_rewrite.target_true.id", None), "target_true: no id"),
        (changed("neighborhood_prompts", "one"), "neighborhood_prompts must be a list"),
        (changed("paraphrase_prompts", ["a", 3]), r"paraphrase_prompts\[1\] must be text"),
        (changed("generation_prompts", None), "no generation_prompts"),
        ([1], "record 1"),
    ],
)
def test_a_bad_record_is_named_with_its_key_and_can_be_left_out(tmp_path, row, message):
    path, told = write(tmp_path, [OFFICIAL, row]), []
    with pytest.raises(FactFileError, match=message) as caught:
        read_records(path)
    assert "\n" not in str(caught.value)
    assert len(read_records(path, on_bad_row=told.append)) == 1
    assert told == [str(caught.value)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[{oops", "line 1: not JSON"),
        (b'{"a": 1}', "must hold a list"),
        (b"[]", "no records that can be used"),
        ('["é"]'.encode("latin-1"), "not UTF-8"),
        (b"[" * 100_000, "nested too deeply|not JSON"),
        (None, "cannot read"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, content, message):
    path = tmp_path / "records.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FactFileError, match=message):
        read_records(path)


def test_a_prompt_without_a_place_for_its_subject_is_refused():
    with pytest.raises(FactError, match=r"has no \{\}"):
        Record(0, 0, "x", "r", Target("a", ""), Target("b", ""), "s", (), (), (), ())


# --- atlas ------------------------------------------------------------------------------------


SMALL = ("sport", "instrument", "maker")


@pytest.fixture(scope="module")
def records() -> Records:
    return counterfact()


@pytest.fixture(scope="module")
def known(atlas) -> Records:
    """Those that are left once atlas was asked, which takes half a minute."""
    return counterfact(atlas)


@pytest.fixture(scope="module")
def objects() -> dict[str, dict[str, set[str]]]:
    """By relation, the objects of each subject: written again from the tables, in small letters."""
    found: dict[str, dict[str, set[str]]] = {}
    for relation in relations():
        of = found.setdefault(relation.name, {})
        for subject, object_ in relation.facts:
            of.setdefault(subject.casefold(), set()).add(object_)
    return found


def subjects_in(prompt: str, of: dict[str, set[str]]) -> set[str]:
    """The longest subjects of a relation that occur in the prompt."""
    text = prompt.casefold()
    near = [name for name in of if name in text]  # Quicker than the expression on all of them.
    found = {name for name in near if re.search(rf"\b{re.escape(name)}\b", text)}
    return {name for name in found if not any(name in other and name != other for other in found)}


@pytest.mark.slow
def test_of_the_known_none_is_lost(records, known):
    kept = {record.case_id for record in known}
    assert kept < {record.case_id for record in records}
    assert len(known) + known.dropped["n"].sum() == sum(len(r.facts) for r in relations())
    assert set(known.dropped["reason"]) == {FEW_NEIGHBOURS, NEW_LIKELIER}


def test_every_fact_is_a_record_or_is_counted_with_its_reason(records):
    assert len(records) + records.dropped["n"].sum() == sum(len(r.facts) for r in relations())
    assert set(records.dropped["reason"]) == {FEW_NEIGHBOURS}
    expected = {
        relation.name: sum(
            Counter(o for _, o in relation.facts)[object_] <= 3 for _, object_ in relation.facts
        )
        for relation in relations()
    }
    few = records.dropped[records.dropped["reason"] == FEW_NEIGHBOURS]
    assert dict(zip(few["relation"], few["n"], strict=True)) == {
        name: n for name, n in expected.items() if n
    }


@pytest.mark.slow
def test_the_documents_table_is_what_was_counted(known):
    records = known
    text = (Path(__file__).parents[1] / "docs" / "editing.md").read_text(encoding="utf-8")
    written = {
        cells[0]: tuple(map(int, cells[1:]))
        for line in text.splitlines()
        if (cells := [cell.strip() for cell in line.strip("|").split("|")])[-1].isdigit()
    }
    made = Counter(record.relation_id for record in records)
    for relation in relations():
        dropped = records.dropped[records.dropped["relation"] == relation.name]
        counted = dict(zip(dropped["reason"], dropped["n"], strict=True))
        counts = (counted.get(FEW_NEIGHBOURS, 0), counted.get(NEW_LIKELIER, 0))
        assert written[relation.name] == (len(relation.facts), made[relation.name], *counts)
    for number in (len(records), len(records.tune), len(records.test)):
        assert f"{number:,}".replace(",", " ") in text


def test_no_new_object_is_true_and_all_are_of_the_relation(records, objects):
    for record in records:
        of = objects[record.relation_id]
        true = of[record.subject.casefold()]
        assert record.target_true.text in true
        assert record.target_new.text not in true
        assert any(record.target_new.text in each for each in of.values())


def test_neighbours_have_the_true_object_and_never_the_new_one(records, objects):
    for record in records:
        of = objects[record.relation_id]
        assert 3 <= len(record.neighborhood_prompts) <= 10
        assert len(set(record.neighborhood_prompts)) == len(record.neighborhood_prompts)
        for prompt in record.neighborhood_prompts:
            (subject,) = subjects_in(prompt, of)
            assert subject != record.subject.casefold()
            assert of[subject] == {record.target_true.text}


def test_attribute_prompts_are_about_subjects_that_have_the_new_object(records, objects):
    for record in records:
        of = objects[record.relation_id]
        assert 1 <= len(record.attribute_prompts) <= 10
        for prompt in record.attribute_prompts:
            (subject,) = subjects_in(prompt, of)
            assert of[subject] == {record.target_new.text}


def test_the_rewrite_is_a_training_sentence_and_paraphrases_are_held_out(records):
    templates = {relation.name: relation for relation in relations()}
    for record in records:
        relation = templates[record.relation_id]
        template = relation.train[record.pararel_idx]
        assert f"{record.prompt} {{o}}" == template.replace("{s}", "{}")
        if record.prompt.startswith("{}"):
            assert record.subject == capitalised(record.subject)
        held = {each.removesuffix(" {o}").replace("{s}", "{}").casefold() for each in relation.held}
        asked = [
            each.casefold().replace(record.subject.casefold(), "{}", 1)
            for each in record.paraphrase_prompts
        ]
        assert len(set(asked)) == 2
        assert set(asked) <= held
        assert record.rewrite.prompt not in record.generation_prompts
        assert all(record.subject.casefold() in e.casefold() for e in record.generation_prompts)


def test_the_model_finds_the_true_object_likelier_before_the_edit(atlas):
    some = counterfact(atlas, first=100).records
    new = metrics.score(atlas, [(r.rewrite.prompt, r.target_new.text) for r in some]).nll
    true = metrics.score(atlas, [(r.rewrite.prompt, r.target_true.text) for r in some]).nll
    assert bool((true < new).all())


@pytest.mark.slow
def test_the_first_records_of_a_part_are_asked_alone(known, atlas):
    told: list[tuple[int, int]] = []
    for part, every in (("tune", known.tune), ("test", known.test)):
        some = counterfact(atlas, part=part, first=3, progress=lambda *each: told.append(each))
        assert some.records == every[:3]
    assert max(told) == (3, 3)
    assert counterfact(part="test", first=3, only=SMALL).records == counterfact(only=SMALL).test[:3]


def test_of_what_a_model_does_not_know_others_are_taken_in_its_place(oracle_model):
    whole = counterfact(oracle_model, only=SMALL)
    some = counterfact(oracle_model, only=SMALL, first=5)
    assert some.records == whole.records[:5]
    left_out = some.dropped.groupby("reason")["n"].sum()[NEW_LIKELIER]
    assert 0 < left_out < whole.dropped.groupby("reason")["n"].sum()[NEW_LIKELIER]
    assert len(counterfact(oracle_model, only=SMALL, first=10**6)) == len(whole)


def test_what_a_model_drops_is_counted_and_without_one_nothing_is(oracle_model):
    asked, every = counterfact(oracle_model, only=SMALL), counterfact(only=SMALL)
    counts = asked.dropped.groupby("reason")["n"].sum()
    assert counts[NEW_LIKELIER] == len(every) - len(asked) > 20, "it knows none of this"
    assert set(every.dropped["reason"]) <= {FEW_NEIGHBOURS}


def test_the_same_seed_gives_the_same_records_and_another_others(records):
    again = {record.case_id: record for record in counterfact(only=SMALL)}
    some = [record for record in records if record.relation_id in SMALL]
    assert all(again[record.case_id] == record for record in some)
    kept = {record.case_id for record in some}
    assert [case for case in again if case in kept] == [record.case_id for record in some]
    other = {record.case_id: record for record in counterfact(only=SMALL, seed=1)}
    assert list(other) != list(again)
    assert sum(other[r.case_id].target_new == r.target_new for r in some) < len(some) / 2


def test_a_relation_that_is_not_there_is_named():
    with pytest.raises(FactError, match="no relation sports; there are capital, continent"):
        counterfact(only=["sports"])


def test_the_records_are_these_on_every_machine(records):
    first = [(r.case_id, r.subject, r.target_new.text) for r in records.records[:2]]
    assert first == [(5370, "Gadolinium", "gas"), (2603, "Matthew Arnold", "Croatia")]
    assert len({record.case_id for record in records}) == len(records)


def test_the_first_records_are_a_fair_sample(records):
    every, first = (
        Counter(r.relation_id for r in some) for some in (records.records, records.records[:400])
    )
    for name, n in every.items():
        share = n / len(records)
        assert abs(first[name] / 400 - share) < 4 * (share * (1 - share) / 400) ** 0.5 + 1e-9


def test_no_subject_is_in_both_parts(records):
    tune = {record.subject.casefold() for record in records.tune}
    test = {record.subject.casefold() for record in records.test}
    assert not tune & test
    assert len(records.tune) + len(records.test) == len(list(records))
    assert 0.2 < len(records.tune) / len(records) < 0.3
    assert len(records.test) >= 200


def test_other_facts_are_true_of_the_subject_and_of_other_relations(records, objects):
    counts = Counter()
    for record in records:
        for fact in other_facts(record):
            assert fact.subject in fact.prompt
            assert fact.subject.casefold() == record.subject.casefold()
            assert fact.relation != record.relation_id
            assert fact.object in objects[fact.relation][fact.subject.casefold()]
            assert {fact.relation, record.relation_id} != {"landmark_city", "landmark_country"}
            counts[record.case_id] += 1
    assert len(counts) > len(records) / 2
    assert all(n % 2 == 0 for n in counts.values()), "each in a training and a held-out sentence"


def test_a_record_of_another_data_set_has_no_other_facts(tmp_path):
    row = changed("requested_rewrite.subject", "Lionel Messi")
    (record,) = read_records(write(tmp_path, [row]))
    assert other_facts(record) == []
    assert draws.is_tuned("the Louvre") == draws.is_tuned("The Louvre")


def test_implied_relations_are_relations_of_the_tables():
    names = {one.name for one in world(()).relations}
    assert {name for group in IMPLIED for name in group} <= names


def test_what_a_new_object_makes_false_is_implied_both_ways_and_nothing_else():
    assert implied("landmark_city", "landmark_country")
    assert implied("landmark_country", "landmark_city")
    assert not implied("field", "native_language")
    assert not implied("university_city", "museum_city")
