"""What a training is measured by, compared with the package's other ways to the same numbers."""

from collections import Counter

import pytest
import torch

from factlens import atlas_measures
from factlens.atlas import CHECKPOINT
from factlens.atlas.measuring import read_checkpoint
from factlens.atlas.recipes import Recipe
from factlens.atlas.tables import load_tables, world
from factlens.atlas_measures import (
    COLUMNS,
    KINDS_OF_TABLES,
    asked_facts,
    described,
    gains,
    groups,
    measured,
)
from factlens.atlas_results import OPEN, SETTLED
from factlens.effects import average_effects
from factlens.knowledge import known_facts
from factlens.models import tokenizer
from factlens.tracing import trace

RECIPE = Recipe()
"""The bundled model's."""


@pytest.fixture(scope="module")
def facts(atlas):
    return known_facts(atlas, asked_facts(world(), 24))


@pytest.fixture(scope="module")
def found(atlas, facts):
    given = {"samples": 4, "noise_level": "facts"}
    main = trace(atlas, facts, window=3, roles=("last subject", "last"), **given)
    cut = trace(atlas, facts, kinds="state", severed=("mlp", "attn"), roles="last subject", **given)
    return main, cut, described(main, cut, lambda fact: ["all", str(fact.relation)])


@pytest.mark.parametrize("n", [24, 200, 240, 400])
def test_facts_are_asked_once_each_of_all_relations_in_sentences_of_both_orders(n):
    asked = asked_facts(world(), n)
    assert len({(fact.relation, fact.subject.casefold()) for fact in asked}) == len(asked) == n
    first = sum(fact.prompt.startswith(fact.subject) for fact in asked)
    assert 0.2 * n < first < 0.8 * n
    if n >= 200:
        assert {fact.relation for fact in asked} == {each.name for each in world().relations}


def test_more_facts_than_there_are_are_all_of_them():
    assert len(set(asked_facts(world(), 10**6))) == sum(len(r.facts) for r in world().relations)


@pytest.mark.slow
def test_everything_is_measured_of_a_checkpoint(monkeypatch):
    monkeypatch.setattr(atlas_measures, "STATEMENTS", 200)
    monkeypatch.setattr(atlas_measures, "KEYS", 4)
    found = measured(CHECKPOINT, RECIPE, n=60, records=1)
    assert found["known"]["train"] > 0.95 > found["known"]["fresh"]
    assert found["known"]["questions"] > 0.95
    assert found["site"]["asked"] == 60
    assert found["open"]["asked"] == 30
    assert found["open"]["groups"].keys() <= {OPEN, *KINDS_OF_TABLES.values()}
    assert [row["layer"] for row in found["rome"]] == list(range(8))
    assert set(found["rome"][0]) == set(COLUMNS)
    # The first layer takes edits, and the last, where nothing can carry them on, does not.
    assert found["rome"][0]["ES"] == 100.0
    assert found["rome"][7]["ES"] == 0.0


@pytest.mark.slow
def test_the_numbers_are_those_of_averaged_effects(found):
    main, cut, numbers = found
    aie = average_effects(main)
    own = aie[(aie["role"] == "last subject") & (aie["kind"] == "state")].set_index("layer")["aie"]
    for layer, (mean, low, high) in enumerate(numbers["state"]):
        assert mean == pytest.approx(own[layer], abs=1e-5)
        assert low <= mean <= high
    assert numbers["embedding"][0] == pytest.approx(own[-1], abs=1e-5)
    for layer, (mean, _, _) in enumerate(numbers["beyond"]):
        assert mean == pytest.approx(own[layer] - own[-1], abs=1e-5)
    severed = average_effects(cut).set_index(["severed", "layer"])["aie"]
    for layer, (mean, _, _) in enumerate(numbers["mlps_severed"]):
        assert mean == pytest.approx(severed["mlp", layer], abs=1e-5)
    late = aie[(aie["role"] == "last") & (aie["kind"] == "attn")].set_index("layer")["aie"]
    assert numbers["late_attention"][4][0] == pytest.approx(late[4], abs=1e-5)


def test_the_group_of_all_facts_has_all_facts_numbers_and_small_groups_are_left_out(found):
    main, _, numbers = found
    assert list(numbers["groups"]) == ["all"]
    assert numbers["groups"]["all"]["facts"] == len(main.facts) == numbers["facts"]
    assert numbers["groups"]["all"]["beyond_at_peak"] == numbers["beyond_at_peak"]


def test_a_fact_is_open_where_others_that_end_alike_have_other_objects(atlas):
    groups_of = groups(atlas, RECIPE)
    encode = tokenizer(atlas).encode
    said = Counter()
    for fact in asked_facts(world(), 400):
        (relation,) = [each for each in world().relations if each.name == fact.relation]
        name = next(s for s, _ in relation.facts if s.casefold() == fact.subject.casefold())
        end = encode(f" {name}")[-1]
        alike = [o for s, o in relation.facts if encode(f" {s}")[-1] == end]
        share = alike.count(fact.object) / len(alike)
        kind, *settled = groups_of(fact)
        assert settled == ([SETTLED] if share == 1 else [OPEN] if share <= 0.5 else [])
        assert kind in {*KINDS_OF_TABLES.values(), "other"}
        said.update(settled)
    assert said[SETTLED] > 100
    assert said[OPEN] > 20


def test_every_table_has_a_kind():
    assert set(load_tables()) == set(KINDS_OF_TABLES)


def test_gains_are_those_of_the_norms_before_attention():
    checkpoint = read_checkpoint(CHECKPOINT)
    with torch.no_grad():
        checkpoint.model.transformer.h[2].ln_1.weight.fill_(-0.25)
    assert gains(checkpoint)[2] == 0.25
    assert len(gains(checkpoint)) == 8
    own = checkpoint.model.transformer.h[0].ln_1.weight.detach()
    assert gains(checkpoint)[0] == pytest.approx(float(own.abs().mean()), abs=1e-4)
