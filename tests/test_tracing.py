"""The verb `trace`: warnings, errors, settings, several facts, other sites, and what it records."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from factlens import Fact, FactWarning, Trace, fingerprint, models, runs, trace
from factlens.corruption import draw, fact_seed, measure_level, noise_level, spread
from factlens.errors import (
    FactError,
    ModelUnsupported,
    PlanError,
    PromptTooLong,
    SubjectNotFound,
    TraceFileError,
)
from factlens.facts import bundled_subjects
from factlens.patches import corrupt
from factlens.plots import heatmap
from factlens.traces import concat

PROMPT, SUBJECT = "The Space Needle is located in the city of", "The Space Needle"
FACT = Fact(PROMPT, SUBJECT, "Seattle")
COLUMNS = [
    "fact",
    "kind",
    "window",
    "severed",
    "layer",
    "position",
    "token",
    "role",
    "sample_sd",
    "prob_clean",
    "prob_corrupted",
    "prob_restored",
    "effect",
]


@pytest.fixture(scope="module")
def traced(atlas) -> Trace:
    return trace(atlas, FACT, samples=4)


def test_the_frame_has_its_columns_and_every_cell_once(traced):
    frame = traced.frame
    tokens, layers = frame["position"].nunique(), 8
    assert list(frame.columns) == COLUMNS
    assert not frame.duplicated(["kind", "window", "severed", "layer", "position"]).any()
    assert len(frame) == tokens * (3 * layers + 1)
    assert frame["effect"].equals(frame["prob_restored"] - frame["prob_corrupted"])
    assert (traced.engine, traced.prefix_reuse, traced.fallback_reason) == ("one-pass", True, None)


def test_atlas_says_seattle_and_its_last_state_is_the_answer(traced):
    assert traced.answers[0].strip() == "Seattle"
    total = traced.totals().iloc[0]
    assert total["total_effect"] > 0.5
    top = traced.strongest(1).iloc[0]
    assert (top["layer"], top["role"]) == (7, "last")
    assert top["prob_restored"] == pytest.approx(total["clean"], abs=1e-6)


def test_the_same_command_gives_the_same_bits_and_another_seed_does_not(atlas, traced):
    again = trace(atlas, FACT, samples=4)
    pd.testing.assert_frame_equal(again.frame, traced.frame, check_exact=True)
    other = trace(atlas, FACT, samples=4, seed=1)
    assert not other.frame["prob_corrupted"].equals(traced.frame["prob_corrupted"])


def test_a_fact_has_the_same_numbers_alone_and_among_others(atlas, traced):
    others = [Fact("The capital of France is", "France", "Paris"), FACT]
    both = trace(atlas, others, samples=4)
    assert len(both) == 2
    pd.testing.assert_frame_equal(both.select(1).frame, traced.frame, atol=1e-6)


def test_bare_strings_are_facts(atlas, traced):
    bare = trace(atlas, PROMPT, subject=SUBJECT, samples=4)
    pd.testing.assert_frame_equal(bare.frame, traced.frame)


def test_what_ran_is_recorded(atlas, traced):
    info = traced.info
    assert info["model"] == "atlas"
    assert info["fingerprint"] == fingerprint(atlas)
    assert info["processing"] == "none"
    assert info["config"] == "atlas"
    assert info["noise_level"] == pytest.approx(measure_level(atlas, bundled_subjects()))
    assert "3 sigma" in info["noise_source"]
    assert {"torch", "transformer-lens"} <= set(info["versions"])


# -- metrics, sites, noise -----------------------------------------------------------------------------


def test_other_metrics_stand_beside_the_probability(atlas, traced):
    logs = trace(atlas, FACT, samples=4, metric="logprob")
    assert {"logprob_clean", "logprob_corrupted", "logprob_restored"} <= set(logs.frame)
    assert np.allclose(logs.frame["prob_restored"], traced.frame["prob_restored"], atol=1e-6)
    assert np.allclose(np.exp(logs.frame["logprob_clean"]), logs.frame["prob_clean"], atol=1e-5)
    margins = trace(atlas, FACT, samples=4, metric="logit_diff", foil="Paris")
    assert margins.frame["logit_diff_clean"].iloc[0] > margins.frame["logit_diff_corrupted"].iloc[0]
    with pytest.raises(PlanError, match="foil"):
        trace(atlas, FACT, metric="logit_diff")


def test_kl_from_the_clean_run_is_that_of_torch_and_falls_when_restored(atlas):
    found = trace(atlas, FACT, samples=1, kinds="state", metric="kl")
    begin, end = found.subjects[0]
    noise = draw(
        "gaussian", found.info["noise_level"], (1, end - begin, 128), fact_seed(0, PROMPT, SUBJECT)
    )
    ids = torch.tensor([models.tokenizer(atlas)(PROMPT)["input_ids"]])
    corruption = corrupt(spread(noise, found.subjects[0], ids.shape[1], clean_rows=0))
    clean, corrupted = (
        runs.logits_of(atlas, ids, hooks)[0, -1].log_softmax(-1) for hooks in ([], corruption)
    )
    expected = torch.nn.functional.kl_div(corrupted, clean, reduction="sum", log_target=True).item()
    assert found.frame["kl_corrupted"].iloc[0] == pytest.approx(expected, rel=1e-4)
    assert found.frame["kl_clean"].iloc[0] == pytest.approx(0, abs=1e-5)
    top = found.strongest(1).iloc[0]
    assert (top["layer"], top["role"]) == (7, "last")
    assert top["effect"] == pytest.approx(expected, rel=1e-4)
    assert found.totals()["total_effect"].iloc[0] == pytest.approx(expected, rel=1e-4)
    figure = heatmap(found)
    assert figure.data[1].reversescale
    assert figure.data[1].zmax == pytest.approx(expected, rel=1e-4)
    plain = trace(atlas, FACT, samples=1, kinds="state", metric="kl", engine="plain")
    assert np.allclose(plain.frame["kl_restored"], found.frame["kl_restored"], atol=1e-4)


def test_a_whole_object_is_the_product_over_its_tokens(atlas):
    fact = Fact("The capital of Belarus is", "Belarus", "Minsk")
    from factlens.tokens import answer_ids, token_ids

    tokenizer = models.tokenizer(atlas)
    ids = answer_ids(tokenizer, fact.prompt, "Minsk")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FactWarning)
        whole = trace(atlas, fact, samples=2, kinds="state", answer="whole")
    tokens = torch.tensor([token_ids(tokenizer, fact.prompt) + ids])
    logprobs = runs.logits_of(atlas, tokens)[0].log_softmax(-1)
    start = tokens.shape[1] - len(ids) - 1
    expected = sum(logprobs[start + at, each].item() for at, each in enumerate(ids))
    assert whole.frame["prob_clean"].iloc[0] == pytest.approx(np.exp(expected), rel=1e-4)
    plain = trace_quietly(atlas, fact, samples=2, kinds="state", answer="whole", engine="plain")
    assert np.allclose(plain.frame["prob_restored"], whole.frame["prob_restored"], atol=1e-5)


def trace_quietly(*args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FactWarning)
        return trace(*args, **options)


def test_any_hook_point_is_traced_through_the_plain_engine(atlas):
    heads = trace(atlas, FACT, samples=1, sites="blocks.{l}.attn.hook_z")
    assert heads.engine == "plain"
    assert "no one-pass form" in str(heads.fallback_reason)
    assert set(heads.frame["head"]) == {0, 1, 2, 3}
    middle = trace(atlas, FACT, samples=1, sites="blocks.{l}.hook_resid_post")
    states = trace(atlas, FACT, samples=1, kinds="state", include_embedding=False)
    keys = ["layer", "position"]
    a, b = (t.frame.sort_values(keys)["prob_restored"].to_numpy() for t in (middle, states))
    assert np.allclose(a, b, atol=1e-6)


def test_sites_that_do_not_exist_or_have_no_positions_are_refused(atlas):
    with pytest.raises(PlanError, match="no hook point"):
        trace(atlas, FACT, sites="blocks.{l}.hook_nothing")
    with pytest.raises(PlanError, match="one value per position"):
        trace(atlas, FACT, sites="blocks.{l}.attn.hook_pattern")


def test_symmetric_replacement_swaps_the_subjects_embeddings(atlas):
    fact = Fact("The capital of France is", "France", "Paris")
    swapped = trace(atlas, fact, noise="swap:Italy", kinds="state")
    other = runs.logits_of(
        atlas, torch.tensor([models.tokenizer(atlas)("The capital of Italy is")["input_ids"]])
    )
    answer = models.tokenizer(atlas)(" Paris")["input_ids"][0]
    expected = other[0, -1].softmax(-1)[answer].item()
    assert swapped.frame["prob_corrupted"].iloc[0] == pytest.approx(expected, abs=1e-6)
    assert swapped.info["samples"] == 1
    with pytest.raises(FactError, match="same length"):
        trace(atlas, FACT, noise="swap:the Democratic Republic of the Congo")


def test_noise_rules_have_their_scale_and_their_seed():
    shape = (200, 3, 50)
    for rule, sd in (("gaussian", 0.5), ("rome", 0.5), ("uniform", 0.5 / np.sqrt(3))):
        assert draw(rule, 0.5, shape, 7).std().item() == pytest.approx(sd, rel=0.02)
    assert torch.equal(draw("gaussian", 1.0, shape, 7), draw("gaussian", 1.0, shape, 7))
    assert not torch.equal(draw("gaussian", 1.0, shape, 7), draw("gaussian", 1.0, shape, 8))
    assert fact_seed(0, "a", "b") == fact_seed(0, "a", "b") != fact_seed(0, "ab", "")
    with pytest.raises(PlanError, match="no noise rule"):
        draw("pink", 1.0, shape, 0)


def test_the_level_is_three_sigma_over_all_subject_embeddings(oracle_model):
    subjects = ["Megan Rapinoe", "Paris", "Megan Rapinoe"]
    tokenizer = models.tokenizer(oracle_model)
    ids = [i for s in subjects for i in tokenizer(s)["input_ids"]]
    expected = 3 * oracle_model.W_E[ids].double().std().item()
    assert measure_level(oracle_model, subjects) == pytest.approx(expected, rel=1e-9)
    assert noise_level(oracle_model, "facts", subjects).value == pytest.approx(expected, rel=1e-9)
    assert noise_level(oracle_model, 0.25).source == "given"
    for wrong in (-1.0, "lots"):
        with pytest.raises(PlanError):
            noise_level(oracle_model, wrong)


def test_a_configured_level_is_used_with_its_source(family_folder, monkeypatch):
    model = models.load_model(family_folder("gpt2"))
    monkeypatch.setitem(models._names, model, "gpt2-xl")
    level = noise_level(model)
    assert level.value == 0.1346
    assert "configs/gpt2-xl.yaml" in level.source


# -- warnings and errors -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fact", "words"),
    [
        (Fact("Paris or Paris is in", "Paris"), "occurs 2 times"),
        (Fact("Paris", "Paris"), "ends with its subject"),
        (Fact(PROMPT, SUBJECT, "Paris"), "not with 'Paris'"),
    ],
)
def test_what_is_odd_is_said_once_and_traced(atlas, fact, words):
    with pytest.warns(FactWarning, match=words) as caught:
        found = trace(atlas, fact, samples=1, kinds="state")
    assert len([each for each in caught if words in str(each.message)]) == 1
    assert len(found.frame)


def test_a_prompt_that_is_its_subject_warns_once(atlas):
    with pytest.warns(FactWarning) as caught:
        trace(atlas, Fact("Paris", "Paris"), samples=1, kinds="state")
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"facts": ""}, FactError, "empty"),
        ({"subject": "Eiffel Tower"}, SubjectNotFound, "does not occur"),
        (
            {"facts": "Paris is " + "very " * 200, "subject": "Paris"},
            PromptTooLong,
            "128 positions",
        ),
        ({"kinds": "neuron"}, PlanError, "state, mlp, attn"),
        ({"window": 0}, PlanError, "number of layers"),
        ({"severed": "head"}, PlanError, "none, mlp, attn, both"),
        ({"metric": "bits"}, PlanError, "prob, logprob"),
        ({"engine": "fast"}, PlanError, "auto"),
        ({"samples": 0}, PlanError, "at least one"),
        ({"noise": "pink"}, PlanError, "gaussian"),
        ({"answer": "whole"}, FactError, "object"),
        ({"facts": []}, FactError, "no facts"),
        ({"facts": iter(["a", "b"]), "subject": None}, FactError, "is no Fact"),
        ({"facts": [FACT]}, FactError, "bring their own"),
        ({"severed": []}, PlanError, "nothing to trace"),
        ({"noise_level": float("inf")}, PlanError, "from 0 up"),
        ({"sites": "blocks.{layer}.hook_mlp_out"}, PlanError, "must say {l}"),
        ({"facts": "Paris \ud800 is", "subject": "Paris"}, FactError, "not valid text"),
    ],
)
def test_bad_requests_are_refused_in_one_line(atlas, options, error, words):
    given = {"facts": PROMPT, "subject": SUBJECT, **options}
    with pytest.raises(error, match=words) as caught:
        trace(atlas, given.pop("facts"), **given)
    assert "\n" not in str(caught.value)


def test_a_prompt_needs_a_subject_and_a_model_needs_hooks(atlas):
    with pytest.raises(FactError, match="without a subject"):
        trace(atlas, PROMPT)
    with pytest.raises(ModelUnsupported, match="load_model"):
        trace(torch.nn.Linear(2, 2), FACT)


def test_of_several_facts_the_unusable_are_skipped_with_their_reason(atlas):
    some = [FACT, Fact(PROMPT, SUBJECT, "Paris"), Fact("Rome is", "Oslo")]
    found = trace(atlas, some, samples=1, kinds="state")
    assert len(found) == 1
    assert [reason.split(" ")[0] for _, reason in found.skipped] == ["the", "subject"]
    with pytest.raises(FactError, match="none of 2"):
        trace(atlas, some[1:], samples=1)


# -- a Trace is kept whole -----------------------------------------------------------------------------


def test_a_saved_trace_comes_back_whole(traced, tmp_path):
    again = Trace.load(traced.save(tmp_path / "t.parquet"))
    pd.testing.assert_frame_equal(again.frame, traced.frame, check_exact=True)
    assert (again.facts, again.answers, again.subjects) == (
        traced.facts,
        traced.answers,
        traced.subjects,
    )
    assert again.info == traced.info
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]


def test_a_damaged_or_foreign_file_is_refused(traced, tmp_path):
    path = traced.save(tmp_path / "t.parquet")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TraceFileError, match="damaged"):
        Trace.load(path)
    pd.DataFrame({"a": [1]}).to_parquet(path)
    with pytest.raises(TraceFileError, match="no trace"):
        Trace.load(path)
    with pytest.raises(TraceFileError, match="there is no trace"):
        Trace.load(tmp_path / "nothing.parquet")


def test_comparing_gives_the_difference_cell_by_cell(atlas, traced):
    other = trace(atlas, FACT, samples=4, seed=1)
    both = traced.compare(other)
    assert len(both) == len(traced.frame)
    assert np.allclose(both["difference"], both["effect_other"] - both["effect"])
    assert both["difference"].abs().max() > 0
    assert traced.compare(traced)["difference"].abs().max() == 0
    with pytest.raises(FactError, match="different units"):
        traced.compare(trace(atlas, FACT, samples=1, kinds="state", metric="logprob"))
    with pytest.raises(FactError, match="share no cell"):
        traced.compare(trace(atlas, FACT, samples=1, kinds="state", severed="mlp"))


def test_traces_are_put_together_and_taken_apart(traced):
    both = concat([traced, traced])
    assert len(both) == 2
    pd.testing.assert_frame_equal(both.select(1).frame, traced.frame)
    with pytest.raises(FactError, match="no fact 2"):
        both.select(2)
    with pytest.raises(FactError):
        concat([])
