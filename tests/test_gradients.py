"""Gradients obey their theorems: completeness along a path, first order in the noise; and agree with slow doubles."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from builders import FAMILIES
from conftest import ORACLE
from oracles import _output, _with, hooked

from factlens import Fact, gradients, load_model, models, runs, trace
from factlens.corruption import noise_for
from factlens.errors import FactError, PlanError, PromptTooLong
from factlens.gradients import attribution_patching, integrated_gradients, rank_correlation
from factlens.plans import window_layers

KEYS = ["fact", "kind", "window", "severed", "layer", "position"]
FACTS = [
    Fact("The Space Needle is located in the city of", "The Space Needle", "Seattle"),
    Fact("The capital of France is", "France", "Paris"),
]
RANDOM = Fact("x abcd eft", "abcd")


@pytest.fixture(scope="module")
def oracle_case():
    """A prompt and its subject that the oracle model knows."""
    arrays = np.load(ORACLE / "tracing.npz", allow_pickle=False)
    return Fact(str(arrays["c0.prompt"]), str(arrays["c0.subject"])), float(arrays["noise_level"])


@pytest.fixture(scope="module")
def oracle_trace(oracle_model, oracle_case):
    fact, level = oracle_case
    return trace(oracle_model, fact, noise="rome", noise_level=level, samples=2, window=3)


@pytest.fixture(scope="module")
def traced(atlas):
    return trace(atlas, FACTS, samples=3)


def shortfall(frame: pd.DataFrame) -> pd.Series:
    """By how much the attributions of each fact and layer miss p(clean) - p(baseline)."""
    groups = frame.groupby(["fact", "layer"])
    ends = groups[["prob_clean", "prob_baseline"]].first()
    return groups["attribution"].sum() - (ends["prob_clean"] - ends["prob_baseline"])


# -- completeness ------------------------------------------------------------------------------------


def test_a_layers_attributions_sum_to_the_total_effect_at_every_layer(atlas):
    traced = trace(atlas, FACTS, samples=3, noise_level=0.25)  # A path that 60 steps follow.
    found = integrated_gradients(atlas, traced, steps=60, samples=3)
    assert shortfall(found).abs().max() < 1e-4
    sums = found.groupby(["fact", "layer"])["attribution"].sum().unstack("layer")
    assert list(sums.columns) == list(range(-1, 8))
    effects = traced.totals()["total_effect"]
    assert effects.min() > 0.5
    np.testing.assert_allclose(sums, np.repeat(effects.to_numpy()[:, None], 9, axis=1), atol=1e-4)


def test_the_sum_converges_with_steps_on_the_oracle_model(oracle_model, oracle_trace):
    errors = {
        steps: shortfall(integrated_gradients(oracle_model, oracle_trace, steps=steps)).abs().max()
        for steps in (5, 20, 80)
    }
    assert errors[5] > 0.1, "the check must be able to fail"
    assert errors[80] < 1e-5 < errors[20] < errors[5]


def test_one_step_at_the_left_end_or_the_wrong_layer_is_not_complete(
    oracle_model, oracle_trace, monkeypatch
):
    whole = gradients.integrate

    def one_up(model, case, path, *rest):
        return whole(model, case, replace(path, layer=min(path.layer + 1, 5)), *rest)

    with monkeypatch.context() as patch:
        patch.setattr(gradients, "integrate", one_up)
        wrong = shortfall(integrated_gradients(oracle_model, oracle_trace, steps=40))
    assert wrong.drop(5, level="layer").abs().min() > 0.01
    first = (torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    monkeypatch.setattr(gradients, "nodes_of", lambda steps, zero: first)
    assert shortfall(integrated_gradients(oracle_model, oracle_trace)).abs().max() > 0.1


def test_from_zero_the_path_begins_at_states_of_zero(oracle_model, oracle_trace):
    found = integrated_gradients(oracle_model, oracle_trace, baseline="zero", steps=120)
    assert shortfall(found).abs().drop(-1, level="layer").max() < 0.02
    # Above the last block a zero state leaves the bias of the final layer norm, whatever was said before.
    hf = oracle_model.original_model
    top = hf.lm_head(hf.transformer.ln_f.bias).softmax(-1).detach()
    answer = int(
        runs.logits_of(oracle_model, tokens_of(oracle_model, oracle_trace))[0, -1].argmax()
    )
    assert found["prob_baseline"].iloc[-1] == pytest.approx(top[answer].item(), abs=1e-6)
    assert top[answer] < 0.5 < found["prob_clean"].iloc[-1]


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("zero", [False, True])
def test_the_nodes_integrate_polynomials_exactly(steps, zero):
    points, weights = gradients.nodes_of(steps, zero=zero)
    for power in range(steps if zero else 2 * steps):
        assert (weights * points**power).sum() == pytest.approx(1 / (power + 1))
    above = steps if zero else 2 * steps
    assert (weights * points**above).sum() != pytest.approx(1 / (above + 1), rel=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_complete_and_first_order(family_model, family):
    model = family_model(family)
    far = trace(model, RANDOM, samples=1, noise_level=0.05, kinds="state")
    found = integrated_gradients(model, far, steps=24)
    total = far.totals()["total_effect"].abs().iloc[0]
    assert shortfall(found).abs().max() < 0.02 * total + 1e-6
    unit = 0.001 * float(runs.token_embeddings(model, tokens_of(model, far)).std() / 0.35)
    near, nearer = (
        trace(model, RANDOM, samples=1, noise_level=level * unit, window=1) for level in (4, 1)
    )
    gaps = [relative_gap(each, attribution_patching(model, each)) for each in (near, nearer)]
    assert (gaps[1] < 0.1).all()
    assert (gaps[1] < 0.4 * gaps[0] + 2e-3).all(), "a quarter of the noise, a quarter of the gap"


def relative_gap(traced, attributed: pd.DataFrame) -> pd.Series:
    """|attribution - effect| relative to |effect|, over all cells of a kind."""
    both = traced.frame.merge(attributed[[*KEYS, "attribution"]], on=KEYS)
    assert len(both) == len(traced.frame) == len(attributed)
    gap = (both["effect"] - both["attribution"]).pow(2).groupby(both["kind"]).sum()
    return (gap / both["effect"].pow(2).groupby(both["kind"]).sum()).pow(0.5)


def test_a_window_of_several_layers_is_not_first_order_since_its_layers_answer_to_each_other(
    oracle_model, oracle_case
):
    for window, low, high in ((1, 0.0, 0.04), (3, 0.1, 0.5)):
        near = trace(oracle_model, oracle_case[0], samples=1, noise_level=0.002, window=window)
        gaps = relative_gap(near, attribution_patching(oracle_model, near))
        assert gaps["state"] < 0.04
        assert gaps[["mlp", "attn"]].between(low, high).all()


# -- a second implementation, and TransformerLens's --------------------------------------------------


def tokens_of(model, traced) -> torch.Tensor:
    return torch.tensor([models.tokenizer(model)(traced.facts[0].prompt)["input_ids"]])


class SlowGradients:
    """Derivatives by finite differences on Hugging Face's GPT-2 in double precision: no autograd, no hooks of ours."""

    def __init__(self, ids, subject, noise):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(ORACLE / "model").double().eval()
        self.ids, self.noise = ids, noise
        self.added = torch.zeros(1, ids.shape[1], noise.shape[2], dtype=torch.float64)
        self.subject = slice(*subject)
        self.clean = self.record(None)
        self.corrupted = [self.record(sample) for sample in range(len(noise))]
        self.answer = int(self.clean["logits"].argmax())

    def module(self, kind: str, layer: int):
        transformer = self.model.transformer
        if layer == -1:
            return transformer.wte
        block = transformer.h[layer]
        return {"state": block, "mlp": block.mlp, "attn": block.attn}[kind]

    def corruption(self, sample):
        added = self.added.clone()
        if sample is not None:
            added[0, self.subject] = self.noise[sample]
        return [(self.model.transformer.wte, lambda module, args, output: output + added)]

    def run(self, pairs):
        with hooked(pairs), torch.no_grad():
            return self.model(self.ids).logits[0, -1]

    def record(self, sample):
        store = {}
        pairs = self.corruption(sample)
        for kind in ("state", "mlp", "attn"):
            for layer in range(-1 if kind == "state" else 0, 6):

                def keep(module, args, output, key=(kind, layer)):
                    store[key] = _output(output).clone()

                pairs.append((self.module(kind, layer), keep))
        store["logits"] = self.run(pairs)
        return store

    def slope(self, pairs_at, width=1e-4) -> float:
        """d p(answer) / dx at 0 of the runs `pairs_at(x)`."""
        up, down = (self.run(pairs_at(x)).softmax(-1)[self.answer].item() for x in (width, -width))
        return (up - down) / (2 * width)

    def integrated(self, layer: int, position: int, points: int) -> float:
        """By the midpoint rule, all positions on the path and one of them pushed along it."""
        total = 0.0
        for corrupted in self.corrupted:
            way = self.clean["state", layer] - corrupted["state", layer]
            one = torch.zeros_like(way)
            one[0, position] = way[0, position]
            for point in range(points):
                here = corrupted["state", layer] + (point + 0.5) / points * way

                def write(x, here=here, one=one):
                    return [
                        (self.module("state", layer), lambda m, a, out: _with(out, here + x * one))
                    ]

                total += self.slope(write)
        return total / points / len(self.corrupted)

    def patched(self, kind: str, layers, position: int) -> float:
        total = 0.0
        for sample, corrupted in enumerate(self.corrupted):
            for layer in layers:
                one = torch.zeros_like(corrupted[kind, layer])
                way = self.clean[kind, layer] - corrupted[kind, layer]
                one[0, position] = way[0, position]

                def push(x, sample=sample, layer=layer, one=one):
                    pair = (
                        self.module(kind, layer),
                        lambda m, a, out: _with(out, _output(out) + x * one),
                    )
                    return [*self.corruption(sample), pair]

                total += self.slope(push)
        return total / len(self.corrupted)


@pytest.fixture(scope="module")
def slow(oracle_model, oracle_trace):
    ids, info = tokens_of(oracle_model, oracle_trace), oracle_trace.info
    noise = noise_for(
        oracle_model,
        ids,
        oracle_trace.subjects[0],
        oracle_trace.facts[0],
        rule="rome",
        level=info["noise_level"],
        samples=2,
        seed=0,
    )
    return SlowGradients(ids, oracle_trace.subjects[0], noise)


def at(frame: pd.DataFrame, kind: str, layer: int, position: int) -> float:
    keys = (frame["kind"] == kind) & (frame["layer"] == layer) & (frame["position"] == position)
    (value,) = frame.loc[keys, "attribution"]
    return value


def test_integrated_gradients_are_those_of_finite_differences(oracle_model, oracle_trace, slow):
    found = integrated_gradients(oracle_model, oracle_trace, steps=80)
    last = slow.ids.shape[1] - 1
    for layer, position in ((-1, oracle_trace.subjects[0][1] - 1), (2, last), (5, last)):
        assert at(found, "state", layer, position) == pytest.approx(
            slow.integrated(layer, position, points=100), abs=2e-4
        )
        assert abs(at(found, "state", layer, position)) > 0.05
    assert at(found, "state", 2, last) != pytest.approx(at(found, "state", 3, last), abs=2e-3), (
        "another layer is another number"
    )


def test_attribution_patching_is_that_of_finite_differences(oracle_model, oracle_trace, slow):
    found = attribution_patching(oracle_model, oracle_trace)
    begin, end = oracle_trace.subjects[0]
    seen = []
    for kind, layer, position in (
        ("state", -1, begin),
        ("state", 1, end - 1),
        ("state", 5, slow.ids.shape[1] - 1),
        ("mlp", 0, end - 1),
        ("mlp", 3, end - 1),
        ("attn", 5, slow.ids.shape[1] - 1),
    ):
        layers = [layer] if kind == "state" else window_layers(layer, 3, 6)
        seen.append(at(found, kind, layer, position))
        assert seen[-1] == pytest.approx(slow.patched(kind, layers, position), rel=1e-3, abs=1e-5)
    assert np.abs(seen).max() > 0.05


def test_transformer_lens_agrees_on_the_nodes_that_both_know(atlas):
    theirs = pytest.importorskip(
        "transformer_lens.tools.analysis.attribution_patching",
        reason="this TransformerLens has no attribution patching",
    )
    fact = Fact("The capital of France is", "France", "Paris")
    ours = attribution_patching(atlas, fact, noise="swap:Italy", window=1)
    tokenizer = models.tokenizer(atlas)
    clean, corrupt = (
        torch.tensor([tokenizer(f"The capital of {name} is")["input_ids"]])
        for name in ("France", "Italy")
    )
    answer = tokenizer(" Paris")["input_ids"][0]
    scores = theirs.attribution_patch(
        atlas, clean, corrupt, lambda logits: logits[0, -1].softmax(-1)[answer]
    ).node_scores
    sums: dict[tuple, float] = {}
    for node, score in scores.items():
        kind = {"embed": "state", "mlp_out": "mlp", "attn_head_out": "attn"}[node.kind]
        layer = -1 if node.layer is None else node.layer
        # Heads add up to attention's output, which is linear in them.
        sums[kind, layer, node.position] = sums.get((kind, layer, node.position), 0.0) + score
    shared = ours[(ours["kind"] != "state") | (ours["layer"] == -1)]
    places = shared[["kind", "layer", "position"]].itertuples(index=False, name=None)
    expected = [sums[place] for place in places]
    np.testing.assert_allclose(shared["attribution"], expected, atol=1e-6)
    assert np.abs(expected).max() > 1e-3


# -- pairing with a trace ----------------------------------------------------------------------------


def test_frames_have_the_keys_of_the_trace_and_nothing_twice(atlas, traced):
    states = integrated_gradients(atlas, traced, steps=1, samples=1)
    own = ["prob_clean", "prob_baseline", "attribution"]
    assert list(states.columns) == [*KEYS, "token", "role", *own]
    cells = attribution_patching(atlas, traced, samples=1)
    assert list(cells.columns) == [*KEYS, "token", "role", "attribution"]
    on = [*KEYS, "token", "role"]
    assert len(cells.merge(traced.frame, on=on)) == len(cells) == len(traced.frame)
    assert len(states.merge(traced.frame, on=on)) == (traced.frame["kind"] == "state").sum()
    assert states.attrs["seconds"] > 0
    assert cells.attrs["seconds"] > 0
    some = integrated_gradients(
        atlas, FACTS[0], layers=[3], include_embedding=False, samples=1, steps=1
    )
    assert set(some["layer"]) == {3}


@pytest.mark.parametrize("noise", ["gaussian", "uniform", "rome", "replace", "swap:Italy"])
def test_the_noise_is_the_traces_draw_by_draw(atlas, noise):
    fact = FACTS[1]
    tiny = trace(atlas, fact, noise=noise, samples=4, kinds="state", seed=3)
    states = integrated_gradients(atlas, tiny, steps=1, layers=[7])
    assert states["prob_clean"].iloc[0] == pytest.approx(tiny.frame["prob_clean"].iloc[0], abs=1e-5)
    assert states["prob_baseline"].iloc[0] == pytest.approx(
        tiny.frame["prob_corrupted"].iloc[0], abs=1e-5
    )
    alone = attribution_patching(atlas, fact, kinds="state", noise=noise, samples=2, seed=3)
    first = attribution_patching(atlas, tiny, samples=2)
    pd.testing.assert_frame_equal(alone, first, atol=1e-6)
    other = attribution_patching(atlas, fact, kinds="state", noise=noise, samples=2, seed=4)
    fixed = noise in ("rome", "swap:Italy")
    assert np.allclose(other["attribution"], first["attribution"], atol=1e-6) == fixed


def test_the_answer_is_the_traces(atlas):
    fact = FACTS[1]
    given = trace(atlas, fact, answer="Rome", samples=1, kinds="state")
    found = integrated_gradients(atlas, given, steps=1, layers=[7])
    assert found["prob_clean"].iloc[0] == pytest.approx(given.frame["prob_clean"].iloc[0], abs=1e-5)
    bare = Fact(fact.prompt, fact.subject)
    by_rank, by_object = (attribution_patching(atlas, each, samples=1) for each in (bare, fact))
    pd.testing.assert_frame_equal(by_rank, by_object)


def test_outside_the_subject_the_embedding_gets_nothing_and_before_it_nothing_does(atlas, traced):
    for found in (
        integrated_gradients(atlas, traced, steps=2, samples=1),
        attribution_patching(atlas, traced, samples=1),
    ):
        zero = (found["layer"] == -1) & ~found["role"].str.contains(" subject")
        before = found["role"] == "before subject"
        assert zero.any()
        assert before.any()
        assert found.loc[zero | before, "attribution"].abs().max() < 1e-7
        rest = found.loc[~(zero | before) & (found["role"] == "last subject"), "attribution"]
        assert rest.abs().max() > 1e-4


def test_how_rows_are_cut_into_passes_changes_nothing(atlas):
    whole, cut = (
        integrated_gradients(atlas, FACTS[1], samples=2, steps=3, layers=[0, 5], batch=batch)
        for batch in (64, 4)
    )
    pd.testing.assert_frame_equal(whole, cut, atol=1e-6)


def test_progress_is_told_to_the_end(atlas):
    told = []
    options = {"samples": 1, "progress": lambda done, total: told.append((done, total))}
    integrated_gradients(atlas, FACTS, steps=1, layers=[0, 1], **options)
    assert told == [(done, 6) for done in range(1, 7)]
    told.clear()
    attribution_patching(atlas, FACTS, **options)
    assert told == [(1, 2), (2, 2)]


# -- what is left as it was --------------------------------------------------------------------------


def test_parameters_get_no_gradients_and_keep_their_flags(oracle_model, oracle_trace):
    first = next(iter(oracle_model.parameters()))
    flags = [each.requires_grad for each in oracle_model.parameters()]
    assert any(flags)
    first.requires_grad_(not flags[0])
    try:
        changed = [each.requires_grad for each in oracle_model.parameters()]
        for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
            with mode:
                integrated_gradients(oracle_model, oracle_trace, steps=1, samples=1)
                attribution_patching(oracle_model, oracle_trace, samples=1)

        def stop(done, total):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            attribution_patching(oracle_model, oracle_trace, progress=stop)
        assert [each.requires_grad for each in oracle_model.parameters()] == changed
        assert all(each.grad is None for each in oracle_model.parameters())
    finally:
        first.requires_grad_(flags[0])


def test_bfloat16_stays_within_its_rounding(oracle_model, oracle_trace):
    coarse = load_model(ORACLE / "model", dtype=torch.bfloat16)
    for estimate in (integrated_gradients, attribution_patching):
        exact, found = (estimate(model, oracle_trace) for model in (oracle_model, coarse))
        near = np.corrcoef(exact["attribution"], found["attribution"])[0, 1]
        assert found["attribution"].notna().all()
        assert near > 0.95


# -- rank correlation --------------------------------------------------------------------------------


def test_an_effect_agrees_with_itself_and_not_with_its_negative(traced):
    for sign in (1, -1):
        found = rank_correlation(
            traced.frame, traced.frame.assign(attribution=sign * traced.frame["effect"])
        )
        assert found["kind"].tolist() == ["state", "mlp", "attn"]
        assert found["rho"].tolist() == pytest.approx([sign] * 3)
        assert found["n_facts"].tolist() == [2] * 3


def test_rho_is_scipys_within_a_fact_and_its_interval_normal(atlas, traced):
    spearmanr = pytest.importorskip("scipy.stats").spearmanr
    estimate = attribution_patching(atlas, traced)
    found = rank_correlation(traced.frame, estimate, by=("kind", "window")).set_index("kind")
    both = traced.frame.merge(estimate[[*KEYS, "attribution"]], on=KEYS)
    kept = both[(both["layer"] >= 0) & (both["role"] != "before subject")]
    for kind, cells in kept.groupby("kind"):
        rhos = [
            spearmanr(c["effect"], c["attribution"]).statistic for _, c in cells.groupby("fact")
        ]
        error = np.std(rhos, ddof=1) / np.sqrt(2)
        row = found.loc[kind]
        assert row["rho"] == pytest.approx(np.mean(rhos))
        assert row["se"] == pytest.approx(error)
        assert row["low"] == pytest.approx(np.mean(rhos) - 1.96 * error)
        assert row["high"] == pytest.approx(np.mean(rhos) + 1.96 * error)
        assert row["window"] == (1 if kind == "state" else traced.frame["window"].max())


def test_a_fact_without_ranks_is_not_counted(traced):
    flat = traced.frame.assign(attribution=traced.frame["effect"])
    flat.loc[flat["fact"] == 1, "attribution"] = 0.0
    found = rank_correlation(traced.frame, flat)
    assert found["n_facts"].tolist() == [1] * 3
    assert found["rho"].tolist() == pytest.approx([1] * 3)
    assert found["se"].isna().all()


# -- mistakes ----------------------------------------------------------------------------------------


def test_what_does_not_exist_is_refused(atlas, traced):
    with pytest.raises(PlanError, match="corrupted, zero"):
        integrated_gradients(atlas, traced, baseline="mean")
    with pytest.raises(PlanError, match="from 1 up"):
        integrated_gradients(atlas, traced, steps=0)
    with pytest.raises(PlanError, match="no layer 8"):
        integrated_gradients(atlas, traced, layers=[8])
    with pytest.raises(PlanError, match="no layers"):
        integrated_gradients(atlas, traced, layers=[], include_embedding=False)
    with pytest.raises(PlanError, match="at least one noise sample"):
        attribution_patching(atlas, traced, samples=0)
    with pytest.raises(PlanError, match="brings its own noise"):
        attribution_patching(atlas, traced, seed=1)
    with pytest.raises(PlanError, match="no kind 'head'"):
        attribution_patching(atlas, traced, kinds="head")
    with pytest.raises(FactError, match="is no Fact"):
        attribution_patching(atlas, iter([FACTS[0], "France"]))
    with pytest.raises(FactError, match="no facts"):
        attribution_patching(atlas, [])
    with pytest.raises(PromptTooLong):
        attribution_patching(atlas, Fact("a " * 500, "a"))
    with pytest.raises(PlanError, match="by="):
        rank_correlation(traced.frame, traced.frame.assign(attribution=0.0), by=("relation",))
    with pytest.raises(PlanError, match="share no cell"):
        rank_correlation(traced.frame, traced.frame.assign(attribution=0.0, window=99))


@pytest.mark.parametrize("options", [{"metric": "logprob"}, {"answer": "whole"}])
def test_a_trace_of_something_else_is_refused(atlas, options):
    other = trace(atlas, FACTS[1], samples=1, kinds="state", **options)
    with pytest.raises(PlanError, match="probability of one token"):
        integrated_gradients(atlas, other)
