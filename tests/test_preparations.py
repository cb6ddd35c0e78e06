"""What `trace` asks of an engine: roles, several metrics, foils, corruption by other names, several facts together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from factlens import Fact, models, runs, trace
from factlens.corruption import noise_for, noise_level
from factlens.errors import FactError, NothingTraced, PlanError
from factlens.facts import bundled_facts
from factlens.patches import corrupt
from factlens.replacements import swap
from factlens.tokens import tokenize
from factlens.traces import Trace

FACT = Fact("The capital of France is", "France", "Paris", "capital")
FACTS = [
    FACT,
    Fact("The capital of Italy is", "Italy", "Rome", "capital"),
    Fact("The Space Needle is located in the city of", "The Space Needle", "Seattle"),
    Fact("The mother tongue of Charles Darwin is", "Charles Darwin", "English"),
]


def ids_of(model, text):
    return torch.tensor([models.tokenizer(model)(text)["input_ids"]])


def test_facts_traced_together_are_each_traced_alone(atlas):
    together = trace(atlas, FACTS, samples=3)
    assert [fact.subject for fact in together.facts] == [fact.subject for fact in FACTS]
    for number, fact in enumerate(FACTS):
        alone = trace(atlas, fact, samples=3)
        found = together.select(number).frame
        assert found["token"].tolist() == alone.frame["token"].tolist()
        np.testing.assert_allclose(found["prob_restored"], alone.frame["prob_restored"], atol=1e-6)
    assert together.totals()["clean"].nunique() == len(FACTS)


def test_progress_counts_up_to_all_of_it_also_past_skipped_facts(atlas):
    told = []
    facts = [*FACTS, Fact("The capital of Spain is", "Spain", "Lima"), Fact("No such", "subject")]
    traced = trace(
        atlas, facts, kinds="state", samples=1, progress=lambda *each: told.append(each[:2])
    )
    assert len(traced.skipped) == 2
    assert [prompt for prompt, _ in traced.skipped] == ["The capital of Spain is", "No such"]
    assert told[-1][0] == told[-1][1]
    shares = [done / total for done, total in told]
    assert shares == sorted(shares)


def test_when_nothing_can_be_traced_every_reason_is_kept(atlas):
    with pytest.raises(NothingTraced, match="none of 2 facts") as caught:
        trace(atlas, [Fact("a b", "c"), Fact("d e", "f")])
    assert [prompt for prompt, _ in caught.value.skipped] == ["a b", "d e"]


def test_roles_cut_the_plan_and_nothing_else(atlas, tmp_path):
    whole = trace(atlas, FACT, samples=2, severed=("none", "mlp"), kinds="state").frame
    part = trace(
        atlas, FACT, samples=2, severed=("none", "mlp"), kinds="state", roles="last subject"
    )
    expected = whole[whole["role"] == "last subject"]
    assert len(part.frame) == len(expected) == 2 * 9
    np.testing.assert_allclose(part.frame["effect"], expected["effect"], atol=1e-6)
    assert not part.totals()["last_is_subject"].any()
    assert Trace.load(part.save(tmp_path / "part.parquet")).lengths == part.lengths
    with pytest.raises(PlanError, match="no role 'middle'; there are"):
        trace(atlas, FACT, roles="middle")
    with pytest.raises(FactError, match="has the role middle subject"):
        trace(atlas, FACT, roles="middle subject")


def test_several_metrics_are_columns_and_the_first_is_the_effect(atlas):
    traced = trace(atlas, FACT, kinds="state", samples=2, metric=("logprob", "kl", "prob"))
    frame = traced.frame
    gain = frame["logprob_restored"] - frame["logprob_corrupted"]
    np.testing.assert_allclose(frame["effect"], gain)
    assert {"prob_clean", "kl_restored"} <= set(frame.columns)
    alone = trace(atlas, FACT, kinds="state", samples=2, metric="kl").frame
    np.testing.assert_allclose(frame["kl_restored"], alone["kl_restored"], atol=1e-5)
    with pytest.raises(PlanError, match="no metric 'score'"):
        trace(atlas, FACT, metric=("prob", "score"))


def test_the_automatic_foil_is_what_the_corrupted_runs_say_most(atlas):
    traced = trace(atlas, FACT, kinds="state", samples=4, metric="logit_diff", foil="auto")
    prompt = tokenize(models.tokenizer(atlas), FACT.prompt, FACT.subject)
    noise = noise_for(
        atlas,
        prompt.ids,
        prompt.subject,
        FACT,
        rule="gaussian",
        level=noise_level(atlas).value,
        samples=4,
        seed=0,
    )
    full = torch.zeros(4, prompt.ids.shape[1], noise.shape[2], dtype=torch.float64)
    full[:, prompt.subject[0] : prompt.subject[1]] = noise
    logits = runs.logits_of(atlas, prompt.ids.repeat(4, 1), corrupt(full))[:, -1]
    answer = ids_of(atlas, " Paris")[0, 0]
    probs = logits.softmax(-1).mean(0)
    probs[answer] = 0
    expected = (logits[:, answer] - logits[:, probs.argmax()]).mean().item()
    assert traced.frame["logit_diff_corrupted"].iloc[0] == pytest.approx(expected, abs=1e-4)
    assert trace(atlas, FACT, kinds="state", samples=4, metric="logit_diff", foil="London").frame[
        "logit_diff_corrupted"
    ].iloc[0] != pytest.approx(expected, abs=1e-4)
    with pytest.raises(PlanError, match="foil='auto'"):
        trace(atlas, FACT, metric="logit_diff")


def test_swapping_takes_other_subjects_of_the_relation_with_other_objects(atlas):
    fact = next(
        f
        for f in bundled_facts("held", one_per_fact=True)
        if f.subject == "France" and f.object == "Paris"
    )
    prompt = tokenize(models.tokenizer(atlas), fact.prompt, fact.subject)
    noise = swap(atlas, prompt.ids, prompt.subject, fact, 5, seed=1)
    begin, end = prompt.subject
    own = runs.token_embeddings(atlas, prompt.ids)[0, begin:end].double()
    table = atlas.W_E.double()
    countries = {
        f.subject: f.object
        for f in bundled_facts("held", one_per_fact=True)
        if f.relation == fact.relation
    }
    swapped = []
    for sample in noise:
        tokens = torch.cdist(own + sample, table).argmin(dim=1)
        swapped.append(models.tokenizer(atlas).decode(tokens).strip())
    assert len(set(swapped)) == 5
    assert all(name in countries and countries[name] != "Paris" for name in swapped)
    traced = trace(atlas, fact, noise="swap", kinds="state", samples=3)
    assert traced.info["noise_source"].startswith("not used")
    assert traced.info["samples"] == 3


def test_a_subject_longer_than_any_other_cannot_be_swapped(atlas):
    name = "Xyzzy Quux Plugh Wibble Wobble Zork Frobozz Grue Gnusto Rezrov Yomin"
    with pytest.raises(FactError, match="no bundled subject has"):
        trace(atlas, f"{name} was born in", subject=name, noise="swap")


def test_replaced_tokens_are_tokens_of_names_and_leave_nothing_of_the_subject(atlas):
    prompt = tokenize(models.tokenizer(atlas), FACTS[2].prompt, FACTS[2].subject)
    options = {"rule": "replace", "level": 0.0, "samples": 6}
    noise = noise_for(atlas, prompt.ids, prompt.subject, FACTS[2], seed=0, **options)
    begin, end = prompt.subject
    own = runs.token_embeddings(atlas, prompt.ids)[0, begin:end].double()
    distances = torch.cdist((own + noise).flatten(0, 1), atlas.W_E.double()).min(dim=1)
    assert distances.values.max() < 1e-5, "each is the embedding of some token"
    assert len(set(distances.indices.tolist())) > 6
    again = noise_for(atlas, prompt.ids, prompt.subject, FACTS[2], seed=0, **options)
    other = noise_for(atlas, prompt.ids, prompt.subject, FACTS[2], seed=1, **options)
    assert torch.equal(noise, again)
    assert not torch.equal(noise, other)


def test_levels_may_be_multiples_of_the_models_own(atlas):
    own = noise_level(atlas)
    twice = noise_level(atlas, "2x")
    assert twice.value == pytest.approx(2 * own.value)
    assert twice.source == f"2x of {own.source}"
    with pytest.raises(PlanError, match="a multiple such as"):
        noise_level(atlas, "twice")


def test_direct_effects_are_named_and_are_not_the_indirect_ones(atlas):
    direct = trace(atlas, FACT, kinds="state", samples=2, effect="direct")
    indirect = trace(atlas, FACT, kinds="state", samples=2)
    assert (direct.info["effect"], indirect.info["effect"]) == ("direct", "indirect")
    last = direct.frame[(direct.frame["role"] == "last") & (direct.frame["layer"] == 7)]
    assert last["effect"].iloc[0] == pytest.approx(0.0, abs=1e-6)
    assert (direct.frame["effect"] - indirect.frame["effect"]).abs().max() > 0.1
    plain = trace(atlas, FACT, kinds="state", samples=2, effect="direct", engine="plain")
    np.testing.assert_allclose(plain.frame["effect"], direct.frame["effect"], atol=1e-5)
    with pytest.raises(PlanError, match="no effect 'total'"):
        trace(atlas, FACT, effect="total")
