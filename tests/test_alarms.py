"""The alarm rings for what breaks the model, and not for what changes one fact of it."""

from __future__ import annotations

import pytest
import torch

from factlens import alarms, models, runs
from factlens.alarms import alarm, edit_health
from factlens.changes import Dense, LowRank, RankOne
from factlens.edits import Edit, applied
from factlens.errors import EditError, FactError
from factlens.tokens import token_ids, tokenize

PROMPT, SUBJECT = "The mother tongue of Charles Darwin is", "Charles Darwin"
LAYER = 3


def random_edit(model, ratio: float, seed: int = 0) -> Edit:
    """A random change of rank one that is `ratio` times as large as the weight."""
    weight = models.W_out(model, LAYER)
    draw = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(size, generator=draw) for size in weight.shape)
    scale = ratio * float(weight.detach().norm()) / float(left.norm() * right.norm())
    return Edit({models.W_out_name(LAYER): RankOne(left * scale, right)})


def plausible_edit(model, scale: float) -> Edit:
    """What the MLP says of one subject replaced by what it says of another, `scale` times over."""
    found = []
    for prompt, subject in ((PROMPT, SUBJECT), ("The capital of France is", "France")):
        tokens = tokenize(models.tokenizer(model), prompt, subject)
        _, stored = runs.run_with_cache(model, tokens.ids, [models.key_site(LAYER)])
        key = stored[models.key_site(LAYER)][0, tokens.subject[1] - 1].clone()
        found.append((key, key @ models.W_out(model, LAYER).detach()))
    (key, value), (_, other) = found
    return Edit({models.W_out_name(LAYER): RankOne(key * scale / (key @ key), other - value)})


@pytest.mark.parametrize(
    ("make", "scale", "rings"),
    [
        pytest.param(random_edit, 0.1, [], marks=pytest.mark.slow),
        (random_edit, 0.7, []),
        pytest.param(random_edit, 3.0, ["output", "entropy"], marks=pytest.mark.slow),
        (random_edit, 100.0, ["output", "entropy", "repetition"]),
        pytest.param(plausible_edit, 0.1, [], marks=pytest.mark.slow),
        (plausible_edit, 1.0, []),
        (plausible_edit, 100.0, ["output", "entropy", "repetition"]),
    ],
)
def test_it_rings_for_what_breaks_the_model_and_only_for_that(atlas, make, scale, rings):
    sentences = alarm(atlas, make(atlas, scale), strict=False)
    words = {"output": "times as much", "entropy": "nats", "repetition": "trigrams"}
    assert len(sentences) == len(rings)
    for measure, sentence in zip(rings, sentences, strict=True):
        assert words[measure] in sentence
        assert "\n" not in sentence


def test_the_numbers_are_their_definitions(atlas):
    edit, name = random_edit(atlas, 3.0), models.W_out_name(LAYER)
    prompts = [PROMPT, "Paris is"]
    health = edit_health(atlas, edit, prompts=prompts, strict=False).set_index("measure")
    weight = models.W_out(atlas, LAYER).detach().double()
    change = edit.changes[name].dense().double()
    assert health.loc["norm", "value"] == pytest.approx(3.0, rel=1e-5)
    assert health.loc["norm", "before"] == pytest.approx(float(weight.norm()))
    assert health.loc["norm", "after"] == pytest.approx(float((weight + change).norm()), rel=1e-5)
    site, own, moved_by = models.key_site(LAYER), 0.0, 0.0
    for prompt in prompts:
        ids = torch.tensor([token_ids(models.tokenizer(atlas), prompt)])
        for key in runs.run_with_cache(atlas, ids, [site])[1][site][0].double():
            own += float((key @ weight).square().sum())
            moved_by += float((key @ change).square().sum())
    assert health.loc["output", "value"] == pytest.approx((moved_by / own) ** 0.5, rel=1e-4)

    def entropy() -> float:
        total = 0.0
        for prompt in prompts:
            ids = torch.tensor([token_ids(models.tokenizer(atlas), prompt)])
            prob = runs.logits_of(atlas, ids)[0, -1].softmax(-1)
            total += float(torch.distributions.Categorical(prob).entropy()) / len(prompts)
        return total

    assert health.loc["entropy", "before"] == pytest.approx(entropy(), rel=1e-4)
    with applied(atlas, edit, strict=False):
        assert health.loc["entropy", "after"] == pytest.approx(entropy(), rel=1e-4)
    for measure in ("entropy", "repetition"):
        row = health.loc[measure]
        assert row["value"] == pytest.approx(row["after"] - row["before"])


@pytest.mark.parametrize(
    ("ids", "share"),
    [
        ([], 0.0),
        ([1, 2], 0.0),
        ([1, 2, 3], 0.0),
        ([1] * 12, 0.9),
        ([1, 2, 3, 1, 2, 3], 0.25),
        (list(range(30)), 0.0),
    ],
)
def test_repeated_trigrams(ids, share):
    assert alarms._repeated(ids) == pytest.approx(share)


def test_a_model_that_no_longer_computes_numbers_rings(atlas):
    """Finite weights, and logits that are not: nothing compares with NaN, and the alarm must not be silent for that."""
    weight = models.W_out(atlas, LAYER)
    edit = Edit({models.W_out_name(LAYER): Dense(torch.full(tuple(weight.shape), 1e37))})
    health = edit_health(atlas, edit, prompts=[PROMPT], strict=False)
    entropy = health.set_index("measure").loc["entropy"]
    assert entropy["after"] != entropy["after"], "no number"
    assert entropy["alarm"]
    assert any("nan" in sentence for sentence in alarm(atlas, edit, prompts=[PROMPT], strict=False))


def test_every_weight_of_an_edit_is_judged_and_short_contexts_do(family_model):
    model = family_model("llama")
    rows, columns = models.W_out(model, 1).shape
    edit = Edit(
        {
            models.W_out_name(1): LowRank(torch.zeros(rows, 2), torch.zeros(2, columns)),
            models.W_out_name(2): Dense(3.0 * models.W_out(model, 2).detach()),
        }
    )
    health = edit_health(model, edit, prompts=["a" * 60, "b"], strict=False)
    first, second = models.W_out_name(1), models.W_out_name(2)
    assert health["weight"].tolist() == [first, second, first, second, "", ""]
    assert health["value"].iloc[:4].tolist() == pytest.approx([0.0, 3.0, 0.0, 3.0])
    assert health["alarm"].iloc[:4].tolist() == [False, False, False, True]


def test_a_large_change_where_no_key_points_does_not_ring(atlas):
    """What ROME relies on, and why the norm has no limit: 50 times the weight, across the keys of all prompts."""
    site, weight = models.key_site(LAYER), models.W_out(atlas, LAYER).detach()
    ids = [torch.tensor([token_ids(models.tokenizer(atlas), each)]) for each in alarms._probes()]
    keys = torch.cat(
        [runs.run_with_cache(atlas, each, [site])[1][site][0] for each in ids]
    ).double()
    across = torch.linalg.eigh(keys.T @ keys).eigenvectors[:, 0].float()
    right = torch.full((weight.shape[1],), 50 * float(weight.norm()) / weight.shape[1] ** 0.5)
    health = edit_health(
        atlas, Edit({models.W_out_name(LAYER): RankOne(across, right)}), strict=False
    )
    assert health.set_index("measure").loc["norm", "value"] == pytest.approx(50, rel=1e-4)
    assert not health["alarm"].iloc[:3].any()


def test_what_cannot_be_judged_is_refused(atlas):
    with pytest.raises(EditError, match="does not say which model"):
        alarm(atlas, random_edit(atlas, 0.1), prompts=[PROMPT])
    with pytest.raises(EditError, match="has no weight"):
        alarm(
            atlas,
            Edit({"blocks.99.mlp.W_out": RankOne(torch.ones(2), torch.ones(2))}),
            prompts=["a"],
        )
    assert alarms._ratio(2.0, 0.0) == float("inf"), "a weight of zeros"
    with pytest.raises(FactError, match="no prompts"):
        alarm(atlas, random_edit(atlas, 0.1), prompts=[])
