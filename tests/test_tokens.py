"""Token ids are Hugging Face's; spans are found by offsets; every position has its role."""

from __future__ import annotations

import pytest
from builders import FAMILIES, WITH_BOS, save_tokenizer
from conftest import ORACLE
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from factlens import models
from factlens.errors import FactError, PromptTooLong, SubjectNotFound
from factlens.tokens import ROLES, answer_ids, role_of, token_ids, tokenize

PROMPT = "The Space Needle is in the city of"


@pytest.fixture(scope="module")
def byte_level():
    """A tokenizer whose vocabulary holds every byte."""
    return AutoTokenizer.from_pretrained(ORACLE / "model")


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, bos=True)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_hugging_faces_in_every_family(family_model, family_folder, family):
    model = family_model(family)
    expected = AutoTokenizer.from_pretrained(family_folder(family))("Say abc")["input_ids"]
    ids = tokenize(models.tokenizer(model), "Say abc", "abc").ids[0].tolist()
    assert ids == expected
    assert (ids[0] == 0) == (family in WITH_BOS)


def test_transformer_lens_string_path_would_prepend_a_start_token(family_model):
    model = family_model("gpt2")
    ids = models.tokenizer(model)("abc")["input_ids"]
    assert model.to_tokens("abc")[0].tolist() == [0, *ids]


def test_a_start_token_can_be_forced_in_and_taken_out(byte_level, with_bos):
    assert token_ids(byte_level, "a", prepend_bos=True)[1:] == token_ids(byte_level, "a")
    assert token_ids(with_bos, "a", prepend_bos=False) == token_ids(with_bos, "a")[1:]
    assert token_ids(with_bos, "a", prepend_bos=True) == token_ids(with_bos, "a")


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        (PROMPT, "The Space Needle"),
        ("The mother of Zoë Kravitz is", "Zoë Kravitz"),
        ("東京タワー is in the city of", "東京タワー"),
        ("In Łódź 🏙️ people speak", "Łódź 🏙️"),
        ("Ünal", "Ünal"),
        ("  spaces  before", "spaces"),
    ],
)
def test_the_span_holds_the_subject_and_no_more(byte_level, prompt, subject):
    found = tokenize(byte_level, prompt, subject)
    begin, end = found.subject
    ids = found.ids[0].tolist()
    assert subject in byte_level.decode(ids[begin:end])
    assert subject not in byte_level.decode(ids[begin + 1 : end])
    assert subject not in byte_level.decode(ids[begin : end - 1])


@given(st.text(min_size=0, max_size=12), st.text(min_size=1, max_size=8), st.text(max_size=12))
def test_spans_of_any_text_cover_the_subject(before, subject, after):
    tokenizer = AutoTokenizer.from_pretrained(ORACLE / "model")
    prompt, subject = before + subject + after, subject.strip()
    if not subject:
        return
    found = tokenize(tokenizer, prompt, subject)
    offsets = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
    start = prompt.find(subject)
    begin, end = found.subject
    covered = {c for s, e in offsets[begin:end] for c in range(s, e)}
    outside = {c for s, e in (*offsets[:begin], *offsets[end:]) for c in range(s, e)}
    inside = set(range(start, start + len(subject)))
    assert inside - covered <= set(range(len(prompt))) - outside, (
        "no token outside holds a part of it"
    )


def test_spaces_around_a_subject_do_not_take_in_its_neighbours(byte_level):
    bare, spaced = (
        tokenize(byte_level, PROMPT, each) for each in ("Space Needle", " Space Needle ")
    )
    assert bare.subject == spaced.subject


def test_a_start_token_is_never_subject(with_bos):
    found = tokenize(with_bos, "abc is", "abc")
    assert found.subject == (1, 4)
    assert found.roles[0] == "before subject"


def test_another_occurrence_can_be_picked(byte_level):
    prompt = "Paris in Texas is not Paris in"
    first, second = (tokenize(byte_level, prompt, "Paris", subject_at=at) for at in (0, 1))
    assert first.occurrences == second.occurrences == 2
    assert first.subject[0] == 0 < second.subject[0]
    with pytest.raises(SubjectNotFound, match="occurs 2 times"):
        tokenize(byte_level, prompt, "Paris", subject_at=2)


@pytest.mark.parametrize(
    ("subject", "length", "expected"),
    [
        (
            (1, 4),
            7,
            "before subject|first subject|middle subject|last subject|first after|further|last",
        ),
        ((0, 1), 3, "last subject|first after|last"),
        ((0, 2), 3, "first subject|last subject|last"),
        ((1, 3), 3, "before subject|first subject|last subject"),
    ],
)
def test_roles_follow_the_papers_figure(subject, length, expected):
    roles = [role_of(position, subject, length) for position in range(length)]
    assert roles == expected.split("|")
    assert set(roles) <= set(ROLES)


def test_answers_bring_the_space_that_separates_words(byte_level):
    ids = answer_ids(byte_level, PROMPT, "Seattle")
    assert byte_level.decode(ids) == " Seattle"
    assert answer_ids(byte_level, PROMPT, " Seattle") == ids
    assert byte_level.decode(answer_ids(byte_level, PROMPT + " ", "Seattle")) == "Seattle"


def test_bad_prompts_are_refused_in_one_line(byte_level):
    for prompt, subject, error, words in [
        ("", "x", FactError, "is empty"),
        ("   ", "x", FactError, "is empty"),
        ("Paris is", " ", FactError, "the subject"),
        ("The Eiffel Tower is in", "Eiffel tower", SubjectNotFound, "matched verbatim"),
    ]:
        with pytest.raises(error, match=words) as caught:
            tokenize(byte_level, prompt, subject)
        assert "\n" not in str(caught.value)
    with pytest.raises(PromptTooLong, match="4 positions"):
        tokenize(byte_level, "Paris is a city of light", "Paris", context=4)
