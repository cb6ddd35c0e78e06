"""Scores in closed form, and log-probabilities against a model that is asked one prompt at a time."""

from __future__ import annotations

import math

import pytest
import torch
from builders import FAMILIES
from hypothesis import given
from hypothesis import strategies as st

from factlens import metrics, models, runs
from factlens.errors import FactError, PromptTooLong
from factlens.metrics import (
    half_width,
    harmonic_mean,
    kl_per_token,
    magnitude,
    mean_nll,
    next_logprobs,
    score,
    success,
)
from factlens.tokens import answer_ids, token_ids

nlls = st.lists(st.floats(0, 50), min_size=1, max_size=8)


def test_hand_computed_cases():
    new, true = torch.tensor([0.5, 2.0, 1.0]), torch.tensor([1.0, 1.0, 1.0])
    assert success(new, true) == pytest.approx(1 / 3), "a tie is no success"
    assert success(true, new) == pytest.approx(1 / 3)
    expected = (math.exp(-0.5) + math.exp(-2) + math.exp(-1) - 3 * math.exp(-1)) / 3
    assert magnitude(new, true) == pytest.approx(expected)
    assert mean_nll(torch.tensor([0.5, 0.125]).log()) == pytest.approx(2 * math.log(2))
    assert harmonic_mean([1.0, 0.5, 0.25]) == pytest.approx(3 / 7)
    assert harmonic_mean([1.0, 0.0, 1.0]) == 0.0
    assert half_width([1.0, 0.0, 1.0, 0.0]) == pytest.approx(1.96 * math.sqrt(1 / 3) / 2)
    assert half_width([1.0, float("nan"), 3.0]) == pytest.approx(1.96)
    assert math.isnan(half_width([1.0]))
    assert math.isnan(success(torch.empty(0), torch.empty(0)))


def test_the_papers_table_has_these_harmonic_means():
    # Table 2, GPT-2 XL, ROME: ES 100.0, PS 96.4, NS 75.4 give S 89.2; unedited 22.2, 24.7, 78.1 give 30.5.
    assert harmonic_mean([100.0, 96.4, 75.4]) == pytest.approx(89.2, abs=0.05)
    assert harmonic_mean([22.2, 24.7, 78.1]) == pytest.approx(30.5, abs=0.05)


@given(nlls, nlls)
def test_success_and_magnitude_change_sides_with_their_targets(one, other):
    size = min(len(one), len(other))
    first, second = torch.tensor(one[:size]), torch.tensor(other[:size])
    ties = float((first == second).double().mean())
    assert success(first, second) + success(second, first) + ties == pytest.approx(1)
    assert magnitude(first, second) == pytest.approx(-magnitude(second, first), abs=1e-7)
    assert success(first, first) == magnitude(first, first) == 0


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=5))
def test_the_harmonic_mean_lies_between_least_and_mean(values):
    assert min(values) - 1e-9 <= harmonic_mean(values) <= sum(values) / len(values) + 1e-9


def test_kl_in_closed_form():
    before = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]]).clamp(min=1e-30).log()
    after = torch.tensor([[0.25, 0.25, 0.5], [0.25, 0.25, 0.5]]).log()
    assert kl_per_token(before, after) == pytest.approx(math.log(2) / 2)
    assert kl_per_token(before, before) == 0
    assert kl_per_token(after, before) > 10, "not symmetric"
    assert math.isnan(kl_per_token(before[:0], after[:0]))


# --- measuring --------------------------------------------------------------------------------


def one_by_one(model, prompt: str, target: str) -> tuple[float, bool]:
    """Mean nll and greedy, token by token with nothing padded, batched or cut."""
    tokenizer = models.tokenizer(model)
    ids, total, first = token_ids(tokenizer, prompt), 0.0, True
    answer = answer_ids(tokenizer, prompt, target)
    with torch.inference_mode():
        for token in answer:
            logits = model(torch.tensor([ids]))[0, -1].double()
            total -= float(logits.log_softmax(-1)[token])
            first = first and int(logits.argmax()) == token
            ids = [*ids, token]
    return total / len(answer), first


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_those_of_one_prompt_at_a_time(family_model, family):
    model = family_model(family)
    prompts = ["Ab", "A much longer prompt than", "The one of x is", "Ab"]
    pairs = [(prompt, target) for prompt in prompts for target in ("q", "zo", "some words")]
    scored = score(model, pairs)
    expected = [one_by_one(model, *pair) for pair in pairs]
    torch.testing.assert_close(
        scored.nll.double(), torch.tensor([nll for nll, _ in expected]).double(), atol=2e-5, rtol=0
    )
    assert scored.ranked_first.tolist() == [first for _, first in expected]
    assert float(scored.nll.max() - scored.nll.min()) > 0.5, "nothing to tell apart"


def test_what_is_ranked_first_is_what_greedy_continues_with(atlas):
    prompt = "The Space Needle is located in the city of"
    tokenizer, ids = models.tokenizer(atlas), token_ids(models.tokenizer(atlas), prompt)
    start = len(ids)
    with torch.inference_mode():
        for _ in range(3):
            ids.append(int(atlas(torch.tensor([ids]))[0, -1].argmax()))
    said = tokenizer.decode(ids[start:])
    targets = ["Seattle", said.strip(), f"{said.strip()} ever", "Rome"]
    scored = score(atlas, [(prompt, target) for target in targets])
    assert scored.ranked_first.tolist() == [True, True, False, False]


def test_more_pairs_than_a_batch_and_none(family_model, monkeypatch):
    model = family_model("gpt2")
    pairs = [(f"{'ab' * n} is", target) for n in range(1, 9) for target in ("x", "yz")]
    whole = score(model, pairs)
    monkeypatch.setattr(metrics, "BATCH", 3)
    torch.testing.assert_close(score(model, pairs).nll, whole.nll, atol=1e-5, rtol=0)
    assert len(score(model, []).nll) == 0


def test_rows_of_unlike_length_are_not_padded_to_one_another(family_model, monkeypatch):
    model, passes, logits_of = family_model("gpt2"), [], runs.logits_of

    def watched(model, tokens, **more):
        passes.append(tuple(tokens.shape))
        return logits_of(model, tokens, **more)

    monkeypatch.setattr(runs, "logits_of", watched)
    monkeypatch.setattr(metrics, "FEW", 3)
    pairs = [("a" * length, "x") for length in (10, 4, 6, 7, 5)]
    found = score(model, pairs)
    assert passes == [(3, 7), (2, 11)]  # With the object's space.
    for name, value in (("FEW", 4), ("UNLIKE", math.inf)):
        monkeypatch.setattr(metrics, name, value)
        torch.testing.assert_close(score(model, pairs).nll, found.nll, atol=1e-5, rtol=0)
    assert passes[2:] == [(4, 8), (1, 11), (5, 11)]


def test_a_prompt_that_does_not_fit_is_refused(family_model):
    with pytest.raises(PromptTooLong, match="64 positions"):
        score(family_model("gpt2"), [("a" * 60, "b" * 9)])
    with pytest.raises(FactError, match=r"the prompt '\\n' has no tokens"):
        score(family_model("gpt2"), [("a", "b"), ("\n", "b")])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_logprobs_of_texts_are_those_of_each_text_alone(family_model, family):
    model = family_model(family)
    texts = ["A text", "Another and longer one, with a mark", "x" * 200]
    found = next_logprobs(model, texts)
    for text, each in zip(texts, found, strict=True):
        ids = token_ids(models.tokenizer(model), text)[:64]
        with torch.inference_mode():
            alone = model(torch.tensor([ids]))[0].log_softmax(dim=-1)
        torch.testing.assert_close(each, alone, atol=2e-5, rtol=0)
    assert len(found[2]) == 64, "as much as fits"
    assert next_logprobs(model, []) == []
