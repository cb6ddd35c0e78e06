"""What a model knows is what its greedy continuation spells, asked in batches or one by one."""

from __future__ import annotations

import pytest
import torch

from factlens import Fact, bundled_facts, known_facts, models, runs
from factlens.errors import FactError, PlanError
from factlens.knowledge import ask
from factlens.tokens import answer_ids, token_ids


def spells(model, fact: Fact, *, single_only: bool = False) -> bool:
    """Greedy decoding, one token and one forward pass at a time."""
    tokenizer = models.tokenizer(model)
    ids = token_ids(tokenizer, fact.prompt)
    wanted = answer_ids(tokenizer, fact.prompt, str(fact.object))
    if single_only and len(wanted) > 1:
        return False
    for each in wanted:
        said = int(runs.logits_of(model, torch.tensor([ids]))[0, -1].argmax())
        if said != each:
            return False
        ids = [*ids, said]
    return True


@pytest.fixture(scope="module")
def some() -> list[Fact]:
    return bundled_facts()[::1400]


@pytest.mark.parametrize("rule", ["whole", "first-token"])
def test_batched_asking_equals_greedy_decoding_one_by_one(atlas, some, rule):
    found = ask(atlas, some, known=rule)
    expected = [spells(atlas, fact, single_only=rule == "first-token") for fact in some]
    assert found.frame["known"].tolist() == expected
    assert 0 < sum(expected) < len(expected), "both answers must occur"


def test_wrong_objects_are_not_known(atlas, some):
    wrong = [Fact(f.prompt, f.subject, "Paris" if f.object != "Paris" else "Oslo") for f in some]
    share = ask(atlas, wrong).frame["known"].mean()
    assert share < 0.1 < 0.5 < ask(atlas, some).frame["known"].mean()


def test_reasons_are_counted_and_relations_summed(atlas):
    facts = [
        Fact("The capital of France is", "France", "Paris", "capital"),
        Fact("The capital of France is", "France", "Oslo", "capital"),
        Fact("The capital of France is", "Norway", "Oslo", "capital"),
        Fact("The capital of France is", "France"),
    ]
    told = []
    found = ask(atlas, facts, progress=lambda done, total: told.append((done, total)))
    assert found.facts == (facts[0],)
    assert found.skipped == {
        "object not ranked first": 1,
        "SubjectNotFound": 1,
        "no object given": 1,
    }
    assert found.by_relation().set_index("relation").loc["capital"].tolist() == [3, 1, 1 / 3]
    assert told[-1] == (4, 4)
    assert known_facts(atlas, facts) == [facts[0]]
    with pytest.raises(FactError, match="knows none of the 1"):
        known_facts(atlas, facts[1:2])
    with pytest.raises(PlanError, match="whole, first-token"):
        ask(atlas, facts, known="half")
