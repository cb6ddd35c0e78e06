"""Text that a model writes: greedy is the argmax of full runs, draws are seeded, nothing of the model's or torch's moves."""

from __future__ import annotations

import pytest
import torch
from builders import FAMILIES
from test_hooked_transformer import HookedTransformer, build  # noqa: F401

from factlens import generation, models, runs
from factlens.errors import FactError, PlanError, PromptTooLong
from factlens.generation import generate, sample
from factlens.tokens import token_ids

PROMPTS = ["The cat sat on", "abc", "Hello there my friend, this"]
BOTH_KINDS = [*FAMILIES, "lens gpt2", "lens gptj", "lens qwen2"]


@pytest.fixture
def any_model(request, family_model):
    """A bridge of the family, or ("lens gpt2") a HookedTransformer of it where TransformerLens has one."""

    def get(family: str):
        if not family.startswith("lens "):
            return family_model(family)
        if HookedTransformer is None:
            pytest.skip("HookedTransformer was removed in TransformerLens 4")
        return request.getfixturevalue("build")(family.removeprefix("lens "))

    return get


def slow_greedy(model, ids: list[int], new: int, end: int) -> list[int]:
    """One full run a token, unpadded, without a cache: the oracle."""
    ids = list(ids)
    for _ in range(new):
        following = int(runs.logits_of(model, torch.tensor([ids]), keep=1)[0, -1].argmax())
        if following == end:
            break
        ids.append(following)
    return ids


@pytest.mark.filterwarnings("ignore:HookedTransformer.*is deprecated")
@pytest.mark.parametrize("family", BOTH_KINDS)
def test_greedy_is_the_argmax_of_full_runs_also_for_unequal_prompts(any_model, family):
    model = any_model(family)
    tokenizer = models.tokenizer(model)
    texts = generate(model, PROMPTS, max_new_tokens=12)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = token_ids(tokenizer, prompt)
        slow = slow_greedy(model, ids, 12, tokenizer.eos_token_id)
        assert text == prompt + tokenizer.decode(slow[len(ids) :])
        assert text == generate(model, prompt, max_new_tokens=12)
        assert len(text) > len(prompt)
    assert len(set(texts)) == 3


def test_the_comparison_sees_a_missing_mask(family_model):
    """Positive control: the same rows padded without a mask are continued otherwise."""
    model = family_model("gpt2")
    ids = [token_ids(models.tokenizer(model), prompt) for prompt in PROMPTS]
    longest = max(map(len, ids))
    rows = torch.tensor([[0] * (longest - len(each)) + each for each in ids])
    out = model.original_model.generate(
        rows, attention_mask=torch.ones_like(rows), max_new_tokens=12, pad_token_id=0
    )
    masked = generate(model, PROMPTS, max_new_tokens=12)
    text = models.tokenizer(model).decode(out[1, longest:], skip_special_tokens=True)
    assert PROMPTS[1] + text != masked[1]


def test_a_text_ends_where_the_model_ends_it(family_model):
    model = family_model("gptj")
    prompt = PROMPTS[2]
    assert len(generate(model, prompt, max_new_tokens=12)) - len(prompt) < 12
    assert "endoftext" not in generate(model, prompt, max_new_tokens=12)
    # Of the model's own settings only the tokens that end a text count.
    settings = model.original_model.generation_config
    comma = models.tokenizer(model)(",")["input_ids"][-1]
    settings.eos_token_id, settings.repetition_penalty = [0, comma], 5.0
    try:
        assert generation._end_ids(model) == (0, comma)
        plain = slow_greedy(model, token_ids(models.tokenizer(model), "abc"), 12, comma)
        got = generate(model, "abc", max_new_tokens=12)
        assert token_ids(models.tokenizer(model), got)[:4] == plain[:4]
        assert model.original_model.generation_config is settings
    finally:
        settings.eos_token_id, settings.repetition_penalty = 0, None


@pytest.mark.filterwarnings("ignore:HookedTransformer.*is deprecated")
@pytest.mark.parametrize("family", ["gpt2", "llama", "lens gpt2"])
def test_draws_are_seeded_and_torchs_state_is_left_alone(any_model, family):
    model = any_model(family)
    before = torch.get_rng_state()
    first = generate(model, PROMPTS, max_new_tokens=12, top_k=20, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert generate(model, PROMPTS, max_new_tokens=12, top_k=20, seed=1) == first
    assert generate(model, PROMPTS, max_new_tokens=12, top_k=20, seed=2) != first
    greedy = generate(model, PROMPTS, max_new_tokens=12)
    assert greedy != first
    assert generate(model, PROMPTS, max_new_tokens=12, top_k=1, seed=3) == greedy
    cold = generate(model, PROMPTS, max_new_tokens=12, top_k=20, temperature=1e-4)
    assert cold == greedy


@pytest.mark.filterwarnings("ignore:HookedTransformer.*is deprecated")
@pytest.mark.parametrize("family", ["gpt2", "opt", "lens gpt2"])
def test_sample_draws_exactly_so_many_of_the_likeliest_and_never_the_end(any_model, family):
    model, end = any_model(family), 0
    start = torch.tensor([[0], [0], [5], [end]])  # 0 is start, end and padding token at once.
    drawn = sample(model, start, 10, top_k=4, seed=3)
    assert torch.equal(drawn, sample(model, start, 10, top_k=4, seed=3))
    assert not torch.equal(drawn, sample(model, start, 10, top_k=4, seed=4))
    assert drawn.shape == (4, 11)
    assert torch.equal(drawn[:, :1], start)
    assert (drawn[:, 1:] != end).all()
    logits = runs.logits_of(model, drawn).clone()
    logits[..., end] = -torch.inf
    likeliest = logits[:, :-1].topk(4).indices
    assert (likeliest == drawn[:, 1:, None]).any(-1).all()
    assert not torch.equal(drawn[0], drawn[1]), "rows are drawn one by one"
    assert sample(model, start, 3, top_k=10_000, seed=0).shape == (4, 4)


@pytest.mark.filterwarnings("ignore:HookedTransformer.*is deprecated")
@pytest.mark.parametrize("family", ["gptj", "lens gptj"])
def test_a_model_that_wants_to_end_the_text_is_not_let(any_model, family):
    model = any_model(family)
    ids = token_ids(models.tokenizer(model), PROMPTS[2])
    assert len(slow_greedy(model, ids, 12, 0)) < len(ids) + 12, "it wants to"
    drawn = sample(model, torch.tensor([ids]), 12, top_k=1, seed=0)[0].tolist()
    assert len(drawn) == len(ids) + 12
    assert 0 not in drawn


def test_the_share_of_draws_is_the_models_probability(family_model):
    """20 000 draws of one token from the top 3 against the softmax over them, within four standard errors."""
    model = family_model("gpt2")
    start = torch.full((20_000, 1), 7)
    drawn = sample(model, start, 1, top_k=3, seed=0)[:, 1]
    logits = runs.logits_of(model, start[:1])[0, -1].clone()
    logits[0] = -torch.inf
    values, tokens = logits.topk(3)
    for prob, token in zip(values.softmax(0), tokens, strict=True):
        error = 4 * (prob * (1 - prob) / 20_000) ** 0.5
        assert abs((drawn == token).float().mean() - prob) <= error


def test_the_tokenizer_rule_holds(family_model, monkeypatch):
    """No BOS for GPT-2, one for Llama, and `prepend_bos` overrules."""
    seen: list[list[int]] = []
    own = generation._by_hugging_face
    monkeypatch.setattr(
        generation, "_by_hugging_face", lambda m, rows, *rest: seen.append(rows[0]) or own(m, rows, *rest)
    )  # fmt: skip
    for family, prepend, starts in [
        ("gpt2", None, False),
        ("gpt2", True, True),
        ("llama", None, True),
        ("llama", False, False),
    ]:
        generate(family_model(family), "abc", max_new_tokens=1, prepend_bos=prepend)
        assert (seen[-1][0] == 0, len(seen[-1])) == (starts, 3 + starts)


def test_the_prompt_comes_back_as_it_was_given(atlas):
    prompt = "The capital of  France is Zoë’s ,  "
    assert generate(atlas, prompt, max_new_tokens=3).startswith(prompt)


@pytest.mark.filterwarnings("ignore:HookedTransformer.*is deprecated")
@pytest.mark.parametrize(("family", "whole"), [("gpt2", 64), ("llama", 32), ("lens gpt2", 32)])
def test_texts_of_one_length_are_cut_there_and_else_as_they_would_be_alone(
    any_model, family, whole
):
    model = any_model(family)
    tokenizer, end = models.tokenizer(model), models.tokenizer(model).eos_token_id
    texts = generate(model, PROMPTS, max_tokens=whole)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = token_ids(tokenizer, prompt)
        slow = slow_greedy(model, ids, whole - len(ids), end)
        assert text == prompt + tokenizer.decode(slow[len(ids) :])
    assert max(len(token_ids(tokenizer, text)) for text in texts) == whole, "as long as it may be"
    one = len(token_ids(tokenizer, PROMPTS[2])) + 1
    assert len(token_ids(tokenizer, generate(model, PROMPTS[2], max_tokens=3))) <= one


def test_what_cannot_be_generated_is_refused_in_one_line(family_model):
    model = family_model("gpt2")
    fits = "a" * 60
    assert len(generate(model, fits, max_new_tokens=4)) <= 64
    with pytest.raises(PromptTooLong, match=r"60 tokens, which with 5 new ones .* 64 positions"):
        generate(model, [fits, "b"], max_new_tokens=5)
    with pytest.raises(PromptTooLong, match="at most 63 new tokens"):
        sample(model, torch.tensor([[1]]), 64, top_k=5, seed=0)
    for empty in ("", "  "):
        with pytest.raises(FactError, match="is empty"):
            generate(model, ["abc", empty])
    with pytest.raises(FactError, match="not valid text"):
        generate(model, "\ud800")
    for bad in ({"max_new_tokens": 0}, {"max_tokens": 0}, {"top_k": -1}, {"temperature": 0.0}):
        with pytest.raises(PlanError, match="above 0"):
            generate(model, "abc", **bad)
    assert generate(model, []) == []
