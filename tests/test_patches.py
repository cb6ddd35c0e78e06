"""Patches compose by `+`, mutate nothing, and obey the laws of causal tracing when used by hand."""

from __future__ import annotations

import pytest
import torch
from builders import FAMILIES
from hypothesis import given
from hypothesis import strategies as st

from factlens import models, patches, runs
from factlens.corruption import spread
from factlens.tokens import tokenize

PROMPT, SUBJECT = "x abcd eft", "abcd"
SITES = ["hook_embed"] + [
    f"blocks.{layer}.hook_{name}"
    for layer in range(4)
    for name in ("resid_post", "mlp_out", "attn_out")
]


class Runs:
    """Clean and corrupted pair of one prompt, with their caches."""

    def __init__(self, model):
        self.model = model
        self.prompt = tokenize(models.tokenizer(model), PROMPT, SUBJECT)
        self.length = self.prompt.ids.shape[1]
        width = self.prompt.subject[1] - self.prompt.subject[0]
        noise = torch.randn(2, width, 32, generator=torch.Generator().manual_seed(5))
        self.noise = spread(noise.double(), self.prompt.subject, self.length, clean_rows=0)
        self.tokens = self.prompt.ids.expand(2, -1)
        self.clean_logits, self.clean = runs.run_with_cache(model, self.tokens, SITES)
        corruption = patches.corrupt(self.noise)
        self.bad_logits, self.corrupted = runs.run_with_cache(model, self.tokens, SITES, corruption)

    def run(self, hooks):
        corruption = patches.corrupt(self.noise)
        return runs.logits_of(self.model, self.tokens, corruption + hooks)[:, -1].softmax(-1)

    def where(self, marked: bool):
        return torch.full((2, self.length), marked)

    @property
    def clean_probs(self):
        return self.clean_logits[:, -1].softmax(-1)

    @property
    def corrupted_probs(self):
        return self.bad_logits[:, -1].softmax(-1)


@pytest.fixture(params=FAMILIES)
def pair(request, family_model):
    return Runs(family_model(request.param))


def close(found, expected):
    return bool((found - expected).abs().max() < 1e-6)


def test_corruption_changes_the_answer(pair):
    assert not close(pair.corrupted_probs, pair.clean_probs), (
        "or none of the laws below says anything"
    )


def test_restoring_everything_is_the_clean_run(pair):
    everywhere, nowhere = pair.where(True), pair.where(False)
    for layer in (-1, 0, 2):
        assert close(pair.run(patches.restore(layer, pair.clean, everywhere)), pair.clean_probs)
        assert close(pair.run(patches.restore(layer, pair.clean, nowhere)), pair.corrupted_probs)


def test_severing_without_restoring_is_the_corrupted_run(pair):
    everywhere = pair.where(True)
    for sever in (patches.sever_mlp, patches.sever_attn):
        assert close(pair.run(sever(pair.corrupted, everywhere)), pair.corrupted_probs)
        assert not close(pair.run(sever(pair.clean, everywhere)), pair.corrupted_probs)


def test_the_last_patch_at_a_site_wins(pair):
    everywhere = pair.where(True)
    restore = patches.restore_window("mlp", range(4), pair.clean, everywhere)
    sever = patches.sever_mlp(pair.corrupted, everywhere)
    assert close(pair.run(restore + sever), pair.corrupted_probs)
    assert not close(pair.run(sever + restore), pair.corrupted_probs)


def test_a_severed_restoration_by_hand_is_the_plain_engines_cell(family_model):
    from factlens.tracing import trace

    model = family_model("gpt2")
    traced = trace(
        model, PROMPT, subject=SUBJECT, samples=2, noise_level=1.0, severed="mlp", engine="plain"
    )
    cell = traced.frame.query("kind == 'state' and layer == 1 and position == 5").iloc[0]
    from factlens.corruption import draw, fact_seed

    pair = Runs(model)
    noise = draw("gaussian", 1.0, (2, 4, 32), fact_seed(0, PROMPT, SUBJECT))
    pair.noise = spread(noise, pair.prompt.subject, pair.length, clean_rows=0)
    corruption = patches.corrupt(pair.noise)
    _, pair.corrupted = runs.run_with_cache(model, pair.tokens, SITES, corruption)
    last = pair.where(False)
    last[:, 5] = True
    hooks = patches.sever_mlp(pair.corrupted, last) + patches.restore(1, pair.clean, last)
    answer = int(pair.clean_logits[0, -1].argmax())
    by_hand = pair.run(hooks)[:, answer].mean().item()
    assert by_hand == pytest.approx(cell["prob_restored"], abs=1e-6)
    assert abs(by_hand - cell["prob_corrupted"]) > 1e-3


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**16))
def test_no_patch_changes_what_it_is_given(rows, positions, width, seed):
    generator = torch.Generator().manual_seed(seed)
    act, source = torch.randn(2, rows, positions, width, generator=generator)
    where = torch.rand(rows, positions, generator=generator) < 0.5
    before = act.clone()
    out = patches.substitute(source, where)(act)
    noisy = patches.add_noise(source.double())(act)
    assert torch.equal(act, before)
    assert torch.equal(out[where], source[where])
    assert torch.equal(out[~where], act[~where])
    assert torch.equal(noisy, (act.double() + source.double()).float())
    assert noisy.dtype == act.dtype


@given(st.integers(2, 4), st.integers(0, 3), st.integers(0, 2**16))
def test_one_head_is_replaced_and_no_other(heads, head, seed):
    head %= heads
    generator = torch.Generator().manual_seed(seed)
    act, source = torch.randn(2, 2, 3, heads, 2, generator=generator)
    where = torch.tensor([[True, False, True], [False, False, True]])
    out = patches.substitute_head(source, where, head)(act)
    changed = (out != act).any(dim=-1)
    expected = torch.zeros(2, 3, heads, dtype=torch.bool)
    expected[..., head] = where
    assert torch.equal(changed, expected)
