"""zsRE: its form key for key, its three scores in closed form and one token at a time, and atlas-zsRE is what tables and training text say."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from random import Random

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from factlens import metrics, models
from factlens.atlas import CHECKPOINT, paragraphs
from factlens.atlas.books import fact_book
from factlens.atlas.tables import Relation, World, world
from factlens.atlas.variants import BASELINE
from factlens.benchmarks.atlas_counterfact import counterfact
from factlens.benchmarks.atlas_zsre import NO_OTHER, NO_QUESTION, NO_UNRELATED, Records, zsre
from factlens.benchmarks.zsre import Record, read_records, write_records
from factlens.errors import EditError, FactError, FactFileError, PlanError, PromptTooLong
from factlens.facts import Rewrite
from factlens.metrics import score, token_accuracy
from factlens.tokens import token_ids
from factlens.zsre_scores import COLUMNS, PROTOCOL, SCORES, measure, record_scores, table

OFFICIAL = {  # The form of the official file, key for key.
    "subject": "Ramalinaceae",
    "src": "Which family does Ramalinaceae belong to?",
    "pred": "Ramalinales",
    "rephrase": "What family are Ramalinaceae?",
    "alt": "",
    "answers": ["Lecanorales", "the Lecanorales"],
    "loc": "nq question: types of skiing in the winter olympics 2018",
    "loc_ans": "Downhill",
    "cond": "Ramalinales >>  || Which family does Ramalinaceae belong to?",
}


def changed(key: str, value: object) -> dict:
    """The official record with another value of `key`, or without it for None."""
    record = {**OFFICIAL, key: value}
    return {name: each for name, each in record.items() if each is not None}


def write(tmp_path, rows: object):
    path = tmp_path / "zsre_mend_eval.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


# --- the form ---------------------------------------------------------------------------------


def test_an_official_record_is_read_and_written_again_verbatim(tmp_path):
    (record,) = read_records(write(tmp_path, [{**OFFICIAL, "further": 1}]))
    assert record.to_json() == OFFICIAL
    assert list(record.to_json()) == list(OFFICIAL)
    write_records([record], tmp_path / "again.json")
    assert read_records(tmp_path / "again.json") == [record]
    assert json.loads((tmp_path / "again.json").read_text(encoding="utf-8")) == [OFFICIAL]


def test_a_record_says_what_the_official_loader_makes_of_it(tmp_path):
    _, record = read_records(write(tmp_path, [OFFICIAL, OFFICIAL]))
    template = OFFICIAL["src"].replace(OFFICIAL["subject"], "{}")
    question = template.format(OFFICIAL["subject"])
    assert record.case_id == 1, "the place in the file"
    assert record.rewrite == Rewrite(template, "Ramalinaceae", "Lecanorales", None, "1")
    assert record.rewrite.prompt == question
    assert record.asked == (
        (question, "Lecanorales"),
        ("What family are Ramalinaceae?", "Lecanorales"),
        ("nq question: types of skiing in the winter olympics 2018?", "Downhill"),
    )


@pytest.mark.parametrize("key", ["pred", "alt", "cond"])
def test_what_nothing_is_made_of_may_be_missing(tmp_path, key):
    (record,) = read_records(write(tmp_path, [changed(key, None)]))
    assert record.to_json() == {**OFFICIAL, key: ""}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (changed("src", None), "record 1: no src; it has subject, pred"),
        (changed("subject", 3), "record 1: subject must be text, not 3"),
        (changed("subject", " "), "record 1: subject is empty"),
        (changed("subject", "ramalinaceae"), "record 1: subject 'ramalinaceae' does not occur in"),
        (changed("rephrase", ""), "record 1: rephrase is empty"),
        (changed("loc", ["x"]), "record 1: loc must be text"),
        (changed("loc_ans", "\n"), "record 1: loc_ans is empty"),
        (changed("answers", "one"), "record 1: answers must be a list, not 'one'"),
        (changed("answers", []), "record 1: answers is empty; name the answer to 'Which"),
        (changed("answers", ["a", ""]), r"record 1: answers\[1\] must be text"),
        (changed("alt", 7), "record 1: alt must be text, not 7"),
        (["src"], r"record 1: \['src'\] is no record of named values"),
    ],
)
def test_a_bad_record_is_named_in_one_line_and_the_others_keep_their_numbers(
    tmp_path, row, message
):
    path, told = write(tmp_path, [OFFICIAL, row, OFFICIAL]), []
    with pytest.raises(FactFileError, match=message) as caught:
        read_records(path)
    assert "\n" not in str(caught.value)
    assert [each.case_id for each in read_records(path, on_bad_row=told.append)] == [0, 2]
    assert told == [str(caught.value)]


def test_a_file_that_is_none_is_refused_and_the_official_one_is_named(tmp_path):
    with pytest.raises(FactFileError, match=r"list of records, as zsre_mend_eval\.json does"):
        read_records(write(tmp_path, {"a": 1}))
    with pytest.raises(FactFileError, match="no records that can be used"):
        read_records(write(tmp_path, []))


# --- scores in closed form --------------------------------------------------------------------


def test_each_score_is_the_share_of_its_own_answers_tokens():
    yes, no = True, False
    found = record_scores(
        torch.tensor([yes, no, no, no]), torch.tensor([yes, yes, no]), torch.tensor([no, yes])
    )
    assert found == pytest.approx({"efficacy": 1 / 4, "paraphrase": 2 / 3, "specificity": 1 / 2})
    assert token_accuracy(torch.tensor([yes])) == 1
    assert token_accuracy(torch.tensor([no])) == 0
    assert math.isnan(token_accuracy(torch.tensor([], dtype=torch.bool)))


def frame_of(**columns: list) -> pd.DataFrame:
    n = len(next(iter(columns.values())))
    rest = {name: [0.0] * n for name in SCORES}
    return pd.DataFrame({**rest, "editor": ["x"] * n, "protocol": [PROTOCOL] * n, **columns})


def test_a_table_is_the_mean_over_records_and_not_over_tokens():
    # One record of one token hit, one of three tokens missed: 1/2 over records, 1/4 over tokens.
    shares = [token_accuracy(torch.tensor(hits)) for hits in ([True], [False] * 3)]
    frame = frame_of(efficacy=shares, paraphrase=[1.0, 1.0], specificity=[0.5, 1.0])
    (row,) = table(frame).to_dict("records")
    assert [row[name] for name in SCORES] == pytest.approx([50, 100, 75])
    assert row["efficacy_margin"] == pytest.approx(1.96 * 100 * math.sqrt(1 / 2) / math.sqrt(2))
    assert row["paraphrase_margin"] == 0
    assert (row["n"], row["protocol"]) == (2, PROTOCOL)


def test_a_table_has_a_row_for_each_editor_and_refuses_numbers_of_another_protocol():
    frame = frame_of(efficacy=[1.0, 0.0, 1.0], editor=["b", "a", "b"])
    rows = table(frame)
    assert list(rows["editor"]) == ["b", "a"]
    assert list(rows["efficacy"]) == [100, 0]
    with pytest.raises(PlanError, match=f"not of {metrics.PROTOCOL}"):
        table(frame.assign(protocol=metrics.PROTOCOL))
    with pytest.raises(PlanError, match="not of none"):
        table(frame.iloc[:0])


# --- scores of a model ------------------------------------------------------------------------


def half_right(model, prompt: str) -> tuple[str, list[bool]]:
    """A target after the prompt, every second token of which is what the model says next, and which tokens that are."""
    tokenizer = models.tokenizer(model)
    ids, target = token_ids(tokenizer, prompt), ""
    (space,) = tokenizer(" ", add_special_tokens=False)["input_ids"]
    hits = []
    for number in range(7):
        with torch.inference_mode():
            said = int(model(torch.tensor([ids]))[0, -1].argmax())
        plain = tokenizer.decode([said]).strip().isalnum()
        token = said if plain and number % 2 else tokenizer.convert_tokens_to_ids("aq"[said % 2])
        token = token if number else space
        hits.append(token == said)
        target += tokenizer.decode([token])
        ids = [*ids, token]
    return target[1:], hits


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_hits_are_those_of_one_token_at_a_time(family_model, family):
    model = family_model(family)
    made = {
        prompt: half_right(model, prompt) for prompt in ("Where is A?", "Who b?", "C d e f g h?")
    }
    scored = score(model, [(prompt, target) for prompt, (target, _) in made.items()])
    expected = [hits for _, hits in made.values()]
    assert [each.tolist() for each in scored.hits] == expected
    assert scored.ranked_first.tolist() == [all(hits) for hits in expected]
    every = {hit for hits in expected for hit in hits}
    assert every == {True, False}, "nothing to tell apart"
    assert len({tuple(hits) for hits in expected}) > 1


class Plain:
    """The checkpoint by itself, asked for one token at a time."""

    def __init__(self) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(CHECKPOINT).float().eval()
        self.tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)

    def next(self, ids: list[int]) -> int:
        with torch.inference_mode():
            return int(self.model(torch.tensor([ids])).logits[0, -1].argmax())

    def accuracy(self, prompt: str, answer: str) -> float:
        ids, right = self.tokenizer(prompt)["input_ids"], 0
        tokens = self.tokenizer(f" {answer}")["input_ids"]
        for token in tokens:
            right += self.next(ids) == token
            ids = [*ids, token]
        return right / len(tokens)

    def says(self, prompt: str) -> str:
        ids = self.tokenizer(prompt)["input_ids"]
        start = len(ids)
        for _ in range(3):
            ids = [*ids, self.next(ids)]
        return self.tokenizer.decode(ids[start:]).strip()


def test_a_models_scores_are_those_of_plain_transformers(atlas):
    plain, needle = Plain(), "The Space Needle"
    asked = f"{needle} is located in the city of"
    loc = "What is the capital of France"
    record = Record(
        case_id=5,
        subject=needle,
        src=asked,
        rephrase="The capital of France is",
        answers=(f"{plain.says(asked)} Quito",),
        loc=loc,
        loc_ans=plain.says(f"{loc}?"),
    )
    others = [
        replace(record, case_id=6, answers=("Quito",), loc_ans=f"Quito {record.loc_ans}"),
        replace(record, case_id=7, subject="France", src=record.rephrase, rephrase=asked),
    ]
    seen: list[tuple[int, int]] = []
    frame = measure(
        atlas, [record, *others], label="x", progress=lambda done, total: seen.append((done, total))
    )
    assert list(frame.columns) == list(COLUMNS)
    assert list(frame["case_id"]) == [5, 6, 7]
    for each, (_, row) in zip([record, *others], frame.iterrows(), strict=True):
        expected = [plain.accuracy(prompt, answer) for prompt, answer in each.asked]
        assert [row[name] for name in SCORES] == pytest.approx(expected)
    assert 0 < frame["efficacy"][0] < 1, "partly right"
    assert frame["specificity"][0] == 1
    assert frame["efficacy"][1] < frame["efficacy"][0]
    assert frame["paraphrase"][2] == frame["efficacy"][0] != frame["paraphrase"][0]
    assert seen == [(3, 3)]
    assert set(frame["protocol"]) == {PROTOCOL}
    assert set(frame["editor"]) == {"x"}


def test_no_records_give_an_empty_frame_and_a_question_that_does_not_fit_is_refused(family_model):
    model = family_model("gpt2")
    assert list(measure(model, []).columns) == list(COLUMNS)
    with pytest.raises(PromptTooLong, match="64 positions"):
        measure(model, [Record(0, "A", "A" * 70, "A?", ("b",), "c", "d")])


def test_nan_is_no_score(family_model, monkeypatch):
    true_score = metrics.score

    def broken(model, pairs):
        scored = true_score(model, pairs)
        return replace(scored, nll=scored.nll * math.nan)

    monkeypatch.setattr(metrics, "score", broken)
    with pytest.raises(EditError, match="NaN"):
        measure(family_model("gpt2"), [Record(0, "A", "Is A?", "A?", ("b",), "c", "d")])


# --- atlas ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of() -> World:
    return BASELINE.world


@pytest.fixture(scope="module")
def records(of) -> Records:
    return zsre(of=of)


@pytest.fixture(scope="module")
def asking(of) -> dict[str, tuple[str, str, str, bool]]:
    """Question -> relation, subject, object and whether it is held out: all there are, written again from the tables."""
    found = {}
    for relation in of.relations:
        for subject, object_ in relation.facts:
            for template in (*relation.questions, *relation.held_questions):
                text = template.replace("{s}", subject)
                held = template in relation.held_questions
                found[text[0].upper() + text[1:]] = (relation.name, subject, object_, held)
    return found


def test_every_fact_is_a_record_or_is_counted_with_its_reason(records, of):
    facts = sum(len(relation.facts) for relation in of.relations)
    assert len(records) + records.dropped["n"].sum() == facts
    assert len({record.case_id for record in records}) == len(records) == len(list(records))
    assert len(records) > facts / 2


def test_questions_ask_what_the_record_says_and_answers_are_false(records, of, asking):
    objects = {relation.name: {o for _, o in relation.facts} for relation in of.relations}
    for record in records:
        relation, subject, true, held = asking[record.src]
        assert not held
        assert record.subject == subject
        assert record.src.count(subject) == 1
        assert record.pred == true
        (answer,) = record.answers
        assert answer != true
        assert answer in objects[relation]
        assert record.alt == answer
        assert record.cond == f"{true} >> {answer} || {record.src}"
        again = asking[record.rephrase]
        assert again == (relation, subject, true, True)


def test_unrelated_questions_are_of_another_subject_and_relation_with_the_true_answer(
    records, asking
):
    relations = set()
    for record in records:
        relation, subject, object_, held = asking[record.asked[2][0]]
        assert not held
        assert record.loc_ans == object_
        assert subject != record.subject
        assert relation != asking[record.src][0]
        assert {subject, object_}.isdisjoint({record.pred, *record.answers, record.subject})
        relations.add(relation)
    assert len(relations) > 20, "drawn from the whole world"


def test_the_prompts_are_those_of_training_text_and_the_other_wording_never_occurs():
    taught = ("elements", "products")
    book, random = fact_book(taught), Random(0)
    lines = {
        line for _ in range(25_000) for line in paragraphs.questions(random, book=book).split("\n")
    }
    some = zsre(of=world(taught))
    assert len(some) > 500
    for record in some:
        question, other, unrelated = (prompt for prompt, _ in record.asked)
        assert f"{question} {record.pred}" in lines
        assert f"{unrelated} {record.loc_ans}" in lines
        assert f"{other} {record.pred}" not in lines
        assert not any(f"{question} {answer}" in lines for answer in record.answers)


def test_training_and_testing_have_no_subject_in_common_in_either_role(records, asking):
    def subjects(part) -> set[str]:
        return {name for r in part for name in (r.subject, asking[f"{r.loc}?"][1])}

    train, test = subjects(records.train), subjects(records.test)
    assert not {each.casefold() for each in train} & {each.casefold() for each in test}
    assert len(records.train) + len(records.test) == len(records)
    assert 0.2 < len(records.train) / len(records) < 0.3
    every = subjects(records)
    assert {asking[f"{r.loc}?"][1] for r in records.test} & {r.subject for r in records.test}
    assert len(every) == len(train) + len(test)


def test_the_subjects_of_training_are_those_on_which_atlas_counterfact_chooses(of):
    names = ["sport", "maker"]
    chosen = {record.subject.casefold() for record in counterfact(of=of, only=names).tune}
    trained = {record.subject.casefold() for record in zsre(of=of, only=names).train}
    assert chosen
    assert chosen <= trained


def test_the_new_answer_is_the_new_object_of_atlas_counterfact(records, of):
    names = ["sport", "maker", "field", "instrument"]
    made = counterfact(of=of, only=names)
    same = {record.case_id: record.target_new.text for record in made}
    shared = [record for record in records if record.case_id in same]
    assert len(shared) == len(same) > 200
    assert all(record.answers == (same[record.case_id],) for record in shared)
    other = {record.case_id: record.answers for record in zsre(of=of, only=names, seed=1)}
    assert sum(other[record.case_id] == record.answers for record in shared) < len(shared) / 2


def test_a_record_does_not_depend_on_which_relations_are_taken_and_their_order_is_drawn(
    records, of, asking
):
    taken = list(zsre(of=of, only=["sport", "maker"]))
    assert taken == [r for r in records if asking[r.src][0] in ("sport", "maker")]
    assert list(zsre(of=of, only=["sport", "maker"], seed=1)) != taken
    first = [asking[record.src][0] for record in records.records[:400]]
    for relation in of.relations:
        share = sum(asking[r.src][0] == relation.name for r in records) / len(records)
        spread = 5 * (share * (1 - share) / 400) ** 0.5
        assert abs(first.count(relation.name) / 400 - share) < spread + 1e-9
    with pytest.raises(FactError, match="no relation sports; there are "):
        zsre(of=of, only=["sports"])


def test_records_are_written_and_read_with_their_places_as_numbers(records, tmp_path):
    some = records.records[:50]
    write_records(some, tmp_path / "atlas.json")
    expected = [replace(record, case_id=number) for number, record in enumerate(some)]
    assert read_records(tmp_path / "atlas.json") == expected


def small_world(**changes) -> World:
    """Two relations of three subjects, with something changed in the first."""
    colour = Relation(
        name="colour",
        sources=(),
        train=("The colour of {s} is {o}",),
        held=("{s} has the colour {o}",),
        fresh=(),
        pronoun=(),
        reverse=(),
        facts=(("the sky", "blue"), ("grass", "green"), ("iPaint", "red")),
        questions=("{s} has which colour?",),
        held_questions=("Which colour has {s}?",),
    )
    size = replace(
        colour,
        name="size",
        facts=(("whales", "large"), ("mice", "small"), ("ants", "tiny")),
        questions=("What size are {s}?",),
        held_questions=("How large are {s}?",),
    )
    return World((replace(colour, **changes), size), {})


def reasons(of: World) -> dict[tuple[str, str], int]:
    dropped = zsre(of=of).dropped
    return {(relation, reason): n for relation, reason, n in dropped.itertuples(index=False)}


def test_a_subject_that_begins_its_question_is_spelled_as_it_stands_there():
    # All of one part, so that each has unrelated questions; see the next test for what happens without.
    of = small_world(facts=(("the sky", "blue"), ("the sea", "green"), ("iPaint", "red")))
    found = {record.subject: record for record in zsre(of=of, only=["colour"])}
    for name, record in found.items():
        assert record.src == f"{name} has which colour?"
        assert record.rewrite.subject in record.rewrite.prompt
    assert set(found) <= {"The sky", "The sea", "iPaint"}
    assert found


def test_facts_that_make_no_record_are_counted_with_their_reasons():
    assert reasons(small_world(questions=()))["colour", NO_QUESTION] == 3
    assert reasons(small_world(held_questions=()))["colour", NO_QUESTION] == 3
    # `pale blue` is `blue` in more words, and no other object.
    one = (("the sky", "blue"), ("grass", "pale blue"))
    assert reasons(small_world(facts=one))["colour", NO_OTHER] == 2
    alone = World(small_world().relations[:1], {})
    assert reasons(alone) == {("colour", NO_UNRELATED): 3}
    # A question that zsRE's form cannot hold is not asked beside others.
    unmarked = small_world(questions=("The colour of {s}:",))
    assert reasons(unmarked)["size", NO_UNRELATED] == 3


def test_an_unrelated_question_has_one_answer():
    two = (("grass", "green"), ("grass", "yellow"), ("Grass", "brown"))
    assert reasons(small_world(facts=two))["size", NO_UNRELATED] == 3
