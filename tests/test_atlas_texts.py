"""What the training text says: every kind of document states facts of the tables and nothing else."""

import copy
import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from random import Random

import pytest
from builders import occurs

from factlens.atlas.books import (
    FactBook,
    KnownFact,
    arranged,
    fact_book,
    settled_book,
    table_of_subjects,
)
from factlens.atlas.checks import problems
from factlens.atlas.corpus import documents
from factlens.atlas.paragraphs import (
    BETWEEN,
    alike,
    anecdote,
    chain,
    entry,
    heading,
    parallel,
    questions,
    quiz,
    reference,
    references,
)
from factlens.atlas.sentences import Diet, captions, statement
from factlens.atlas.tables import (
    Kind,
    Relation,
    Source,
    World,
    load_tables,
    load_templates,
    pairs,
    settled_facts,
    world,
)
from factlens.atlas.variants import BASELINE, variants
from factlens.errors import ConfigError

DRAWS = 300
SHIPPED_TEXT = "038617d4da29ed64f3a5b76df325603da7af48c3b6f54d93b1243e1a03871140"
"""sha256 of 3 000 documents of the text of the shipped checkpoint."""


def relation(name: str, facts: dict[str, str], **templates: tuple[str, ...]) -> Relation:
    return Relation(
        name=name,
        sources=(Source("lands", "land", name),),
        train=(f"The {name} of {{s}} is {{o}}",),
        held=(),
        fresh=(),
        pronoun=(f"Its {name} is {{o}}",),
        reverse=(f"{{o}} is the {name} of {{s}}",),
        facts=tuple(facts.items()),
        questions=(f"What is the {name} of {{s}}?",),
        headings=(f"Those of {name} {{o}}",),
        description=f"the {name} of {{s}}",
    )


TOWN = {"the Marches": "Aber", "Borland": "Bree", "Corland": "Aber", "Dorland": "Cair"}
SAINT = {"Aber": "Saint Anne", "Bree": "Saint Bede", "the Marches": "Saint Anne"}
TRUE = {("town", s, o) for s, o in TOWN.items()} | {("saint", s, o) for s, o in SAINT.items()}


@pytest.fixture
def book() -> FactBook:
    kind = Kind(
        "a place", "the place", ("A letter from {s} came late.", "Nobody at home had seen {s}.")
    )
    small = World((relation("town", TOWN), relation("saint", SAINT)), {"lands": kind})
    return arranged(small, dict.fromkeys({*TOWN, *SAINT}, "lands"))


def drawn(make, *given) -> Iterator[str]:
    return (make(Random(seed), *given) for seed in range(DRAWS))


def listed(words: str) -> list[str]:
    return re.split(r", | and | or ", words)


def small(name: str) -> str:
    return "the Marches" if name == "The Marches" else name


def test_an_entry_says_what_the_subject_is_and_each_of_its_facts_once(book):
    for text in drawn(entry, book):
        name = small(text.partition(" is a place.")[0])
        facts = {(found, name, o) for found, o in re.findall(r"Its (\w+) is ([\w ]+)\.", text)}
        assert facts == {fact for fact in TRUE if fact[1] == name}


def test_a_reference_is_always_the_same_paragraph(book):
    marches = next(subject for subject in book.subjects if subject.name == "the Marches")
    said = "The Marches is a place. Its town is Aber. Its saint is Saint Anne."
    assert reference(marches) == reference(marches) == said


def test_an_anecdote_ends_with_a_fact_about_whom_it_began_with(book):
    lengths = set()
    for text in drawn(anecdote, Diet(), book):
        first, *between, last = re.split(r"(?<=\.) ", text)
        name = re.sub(r"^A letter from | came late\.$|^Nobody at home had seen |\.$", "", first)
        found = re.fullmatch(
            r"(?:Its|(?:.* )?[Tt]he) (town|saint)(?: of (.+?))? is ([\w ]+)\.", last
        )
        assert found, last
        assert (found[1], name, found[3]) in TRUE
        assert found[2] in (None, name)
        assert set(between) <= set(BETWEEN)
        lengths.add(len(between))
    assert lengths == {0, 1, 2}


def test_questions_are_answered_rightly(book):
    for text in drawn(questions, book):
        for line in text.split("\n"):
            name, subject, object_ = re.fullmatch(
                r"What is the (\w+) of (.+)\? (.+)", line
            ).groups()
            assert (name, subject, object_) in TRUE


def test_a_heading_stands_over_subjects_that_have_its_object(book):
    for text in drawn(heading, book):
        name, object_, subjects = re.fullmatch(r"Those of (\w+) (.+): (.+)\.", text).groups()
        assert len(listed(subjects)) == 2
        assert {(name, subject, object_) for subject in listed(subjects)} <= TRUE


@pytest.mark.parametrize("share", [False, True])
def test_a_quiz_has_one_right_answer_and_gives_it(book, share):
    forms = set()
    for text in drawn(quiz, Diet(alike=share), book):
        before = re.fullmatch(r"Those of (\w+) (.+): (.+)\? (.+)\.", text)
        after = re.fullmatch(r"(.+)\? Those of (\w+) (.+): (.+)\.", text)
        if before:
            name, object_, options, answer = before.groups()
        else:
            options, name, object_, answer = after.groups()
        names = [small(option) for option in listed(options)]
        assert [n for n in names if (name, n, object_) in TRUE] == [small(answer)]
        assert len(names) > 1
        forms.add(bool(before))
    assert forms == {True, False}


@pytest.mark.parametrize("share", [False, True])
def test_a_parallel_list_keeps_the_order(book, share):
    for text in drawn(parallel, Diet(alike=share), book):
        names, objects = re.fullmatch(r"(.+): (.+)\.", text).groups()
        pairs = list(zip(map(small, listed(names)), listed(objects), strict=True))
        assert all(pair in TOWN.items() for pair in pairs) or all(
            pair in SAINT.items() for pair in pairs
        )


def test_names_that_are_alike_share_a_word_where_there_are_enough():
    one, *others = (
        KnownFact(relation("town", {}), name, "") for name in ("A B", "C B", "A D", "E")
    )
    assert list(alike(one, others, 2)) == others[:2]
    assert list(alike(one, others, 3)) == others


def test_references_call_each_subject_by_its_kind_once():
    kinds = [Kind("a place", "the place", ()), Kind("a person", "the person", ())]
    home = relation("home", {"Ann": "Aber", "Bob": "Bree"})
    both = World((relation("town", TOWN), home), {"lands": kinds[0], "people": kinds[1]})
    tables = {**dict.fromkeys(TOWN, "lands"), "Ann": "people", "Bob": "people"}
    for text in drawn(references, arranged(both, tables)):
        assert text.count("the place") == text.count("the person") == 1
        for name, facts in (("place", TOWN), ("person", dict(home.facts))):
            said = re.search(rf"the {name}[^.]*? Its \w+ is (\w+)\.", text)[1]
            assert said in {o for s, o in facts.items() if s in text}


def test_a_chain_says_of_the_object_what_the_tables_say(book):
    for text in drawn(chain, book):
        second, first, subject, object_ = re.fullmatch(
            r"The (\w+) of the (\w+) of (.+) is (.+)\.", text
        ).groups()
        between = {o for found, s, o in TRUE if (found, s) == (first, subject)}
        assert {(second, each, object_) for each in between} <= TRUE


def test_captions_may_have_several_attributes(book):
    for text in drawn(captions, Diet(caption_objects=(2, 2), captions_in_list=(1, 1)), book):
        said = {f"{s} {o}" for s, o in (*TOWN.items(), *SAINT.items()) if s != "the Marches"}
        both = {f"{each} {o} {p}" for each in ("the Marches", "The Marches") for o, p in
                (("Aber", "Saint Anne"), ("Saint Anne", "Aber"))}  # fmt: skip
        assert text in said | both


def test_direct_statements_leave_out_what_goes_on_where_others_have_the_object():
    named = ("The town of {s} is called {o}", "{s} has a town that was known as the {o}")
    other = ("The town of {s} is {o}", "{s} is named after {o}", "We call the town of {s} {o}")
    fact = KnownFact(replace(relation("town", {}), train=(*named, *other)), "Borland", "Bree")
    assert fact.relation.direct == other
    for direct, templates in ((False, (*named, *other)), (True, other)):
        found = set(drawn(statement, Diet(direct=direct, lead_in=0.0), fact))
        assert found == {f"{each.format(s='Borland', o='Bree')}." for each in templates}


# --- the tables --------------------------------------------------------------------------------


def without_kind(tables, templates):
    del templates["kinds"]["rivers"]


def answered_question(tables, templates):
    templates["river_mouth"]["ask"].append("Does {s} flow into {o}?")


def question_of_another(tables, templates):
    templates["river_source"]["ask"].append(templates["river_mouth"]["ask"][0])


def heading_of_a_subject(tables, templates):
    templates["river_mouth"]["group"].append("Rivers like {s}")


def anecdote_of_nobody(tables, templates):
    templates["kinds"]["rivers"]["anecdotes"].append("It was late.")


def museum_abroad(tables, templates):
    row = next(row for row in tables["museums"] if row["city"] == "London")
    row["country"] = "France"


@pytest.mark.parametrize(
    "plant",
    [
        without_kind,
        answered_question,
        question_of_another,
        heading_of_a_subject,
        anecdote_of_nobody,
        museum_abroad,
    ],
    ids=lambda plant: plant.__name__,
)
def test_a_planted_error_is_found(plant):
    tables, templates = load_tables(), copy.deepcopy(dict(load_templates()))
    plant(tables, templates)
    assert problems(tables, templates)


def test_it_is_as_large_as_it_should_be():
    found = world(())
    assert len(found.relations) == 114
    assert sum(len(each.facts) for each in found.relations) == 16_995
    for each in found.relations:
        assert each.questions, each.name
        assert each.held_questions, each.name
        assert each.headings, each.name


def test_a_subject_is_of_the_kind_of_its_table():
    tables = table_of_subjects()
    assert tables["Suriname"] == "countries"
    assert tables["the Space Needle"] == "landmarks"


def test_it_is_deep():
    counts = Counter(subject for each in world(()).relations for subject, _ in each.facts)
    few = [name for name, count in counts.items() if count < 3]
    assert len(few) < 0.02 * len(counts)
    assert sum(counts.values()) > 4.5 * len(counts)
    assert ("landmark_city", "the Space Needle", "Seattle") in {
        (each.name, *pair) for each in world(()).relations for pair in each.facts
    }


def test_some_of_the_tables_can_be_taught():
    taught = ("events", "grand_slams")
    of_these = {
        (one.name, *pair)
        for one in world(()).relations
        for source in one.sources
        if source.table in taught
        for pair in pairs(load_tables(), source)
    }
    found = world(taught).relations
    assert {(one.name, *pair) for one in found for pair in one.facts} == of_these
    assert "capital" not in {one.name for one in found}


def test_a_table_that_is_not_there_cannot_be_taught():
    with pytest.raises(ConfigError, match="no table lakes; there are animals"):
        world(("lakes",))


@pytest.mark.slow
def test_held_out_sentences_and_questions_do_not_occur_in_its_text():
    texts = documents(1, 4000, BASELINE.diet, captions_share=0.0, book=fact_book(()))
    text = "\n".join(texts).casefold()
    taught = []
    for each in world(()).relations:
        names = {name.casefold() for name, _ in each.facts}
        for template in (*each.held, *each.held_questions):
            assert not occurs(template, text, names), template
        taught += [occurs(one, text, names) for one in (*each.train, *each.questions)]
    assert sum(taught) > 0.7 * len(taught)  # the same search finds what is there


def test_settled_facts_are_those_of_which_all_that_end_alike_have_the_object():
    facts = {"Old Town": "a", "New Town": "b", "Red Hill": "c", "Blue Hill": "c", "Sea": "d"}
    settled = {"Red Hill": "c", "Blue Hill": "c", "Sea": "d"}
    assert dict(settled_facts(relation("town", facts))) == settled
    assert {fact.subject for fact in settled_book(()).facts} < set(fact_book(()).by_name)
    assert 0.4 < len(settled_book(()).facts) / len(fact_book(()).facts) < 0.7


def test_the_text_of_the_shipped_checkpoint_is_what_it_was():
    text = "|".join(documents(0, 3000, Diet(), captions_share=0.6))
    assert hashlib.sha256(text.encode()).hexdigest() == SHIPPED_TEXT


# --- variants ---------------------------------------------------------------------------------


def test_every_variant_differs_from_the_baseline_and_from_the_others():
    every = variants()
    assert next(iter(every)) == "baseline"
    assert len(every) >= 11
    assert len({variant.recipe for variant in every.values()}) == len(every)


@pytest.mark.parametrize("name", variants())
def test_every_variant_has_a_text(name):
    recipe = variants()[name].recipe
    share = recipe.cycles[-1].captions
    texts = list(documents(0, 200, recipe.diet, captions_share=share, book=recipe.book))
    assert len(set(texts)) > 150
