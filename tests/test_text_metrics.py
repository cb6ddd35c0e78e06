"""Scores of texts in closed form: entropy of n-grams, TF-IDF as scikit-learn words it, and what counts as said."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from factlens.text_metrics import (
    WORD,
    fit_tfidf,
    generation_entropy,
    ngram_entropy,
    reference_score,
    says,
)

texts = st.lists(st.sampled_from(["ab", "bc", "cd,", "de.", "ef"]), min_size=1, max_size=12).map(
    " ".join
)


# --- GE ---------------------------------------------------------------------------------------


def test_entropies_of_ngrams_in_closed_form():
    words = ["to", "and", "to", "and", "to"]
    assert ngram_entropy(words, 2) == pytest.approx(1), "to and, and to: twice each"
    thirds = math.log2(3) - 2 / 3
    assert ngram_entropy(words, 3) == pytest.approx(thirds), "to and to twice, and to and once"
    text = "to and to and to"
    assert generation_entropy([text]) == pytest.approx(1 / 3 + 2 / 3 * thirds)
    distinct = " ".join("abcdefghi")
    whole = math.log2(8) / 3 + 2 * math.log2(7) / 3
    assert generation_entropy([distinct]) == pytest.approx(whole)
    assert generation_entropy([text, distinct]) == pytest.approx(
        (1 / 3 + 2 / 3 * thirds + whole) / 2
    )
    assert generation_entropy(["no no no no no"]) == 0
    assert generation_entropy(["one", ""]) == 0
    assert math.isnan(generation_entropy([]))


def test_words_end_at_punctuation():
    assert WORD.findall("Oh, it isn't Zoë's... 3.5%") == [
        *("Oh", ",", "it", "isn't", "Zoë's", ".", ".", ".", "3", ".", "5", "%"),
    ]


@given(texts)
def test_saying_it_all_twice_is_no_more_varied_than_its_number_of_ngrams(text):
    twice = generation_entropy([f"{text} {text}"])
    count = len(WORD.findall(f"{text} {text}"))
    assert 0 <= twice <= math.log2(max(1, count)) + 1e-9
    assert twice < generation_entropy([" ".join(map(str, range(2 * count)))])


# --- RS ---------------------------------------------------------------------------------------


def test_tfidf_in_closed_form():
    tfidf = fit_tfidf(["aa bb", "AA cc a", "aa, dd."])
    assert list(tfidf.columns) == ["aa", "bb", "cc", "dd"], "no words of one letter, no capitals"
    rare = math.log(4 / 2) + 1
    assert tfidf.idf == pytest.approx([1, rare, rare, rare])
    found = tfidf.vector("bb BB aa zz")
    assert found == pytest.approx(np.array([1, 2 * rare, 0, 0]) / math.hypot(1, 2 * rare))
    assert tfidf.vector("zz") == pytest.approx(np.zeros(4))
    score = reference_score(tfidf, ["bb", "bb aa"], ["aa", "cc"])
    assert score == pytest.approx(1 / math.hypot(1, 2 * rare) / math.hypot(1, rare))
    assert reference_score(tfidf, ["bb"], ["cc dd"]) == 0
    assert math.isnan(reference_score(tfidf, [], ["aa"]))
    assert math.isnan(reference_score(tfidf, ["aa"], []))


@given(st.lists(texts, min_size=1, max_size=5), st.lists(texts, min_size=1, max_size=5))
def test_the_cosine_is_symmetric_and_one_for_the_same_words_in_any_order(one, other):
    tfidf = fit_tfidf([*one, *other])
    score = reference_score(tfidf, one, other)
    assert score == pytest.approx(reference_score(tfidf, other, one))
    assert -1e-9 <= score <= 1 + 1e-9
    assert reference_score(tfidf, one, one[::-1]) == pytest.approx(1)


# --- what is said -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("continuation", "object_", "said"),
    [
        (" Rome. It", "Rome", True),
        (" Rome", "Rome", True),
        (" Romeo", "Rome", False),
        (" the city of Rome", "Rome", False),
        (" Canadian dollar, which", "Canadian dollar", True),
        (" rome", "Rome", False),
        ("", "Rome", False),
    ],
)
def test_an_object_is_said_if_the_text_goes_on_with_its_words(continuation, object_, said):
    assert says(continuation, object_) is said
