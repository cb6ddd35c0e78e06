"""Evaluation: numbers equal those of plain Hugging Face, one prompt at a time; the model is left as it was; failures are rows."""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from factlens import editors, models, runs
from factlens.atlas import CHECKPOINT
from factlens.benchmarks.atlas_counterfact import counterfact, other_facts
from factlens.changes import RankOne
from factlens.edits import Edit, info_for
from factlens.errors import ConfigError, EditError, PlanError
from factlens.evaluation import NONE, SCORES, evaluate, table
from factlens.facts import Fact
from factlens.metrics import PROTOCOL
from factlens.tokens import answer_ids, token_ids

COLUMNS = ["case_id", "subject", "relation_id", "editor", *SCORES, "n_other", "protocol", "reason"]
LAYER = 7
CONTROLS = 30


@pytest.fixture(scope="module")
def records():
    return counterfact(only=["sport", "instrument", "language"]).records


def push(model, rewrite, config=None) -> Edit:
    """A crude editor: at the key of the prompt's last token, the last MLP writes the target's first unembedding."""
    tokenizer = models.tokenizer(model)
    ids = torch.tensor([token_ids(tokenizer, rewrite.prompt)])
    _, stored = runs.run_with_cache(model, ids, [models.key_site(LAYER)])
    key = stored[models.key_site(LAYER)][0, -1].clone()
    target = answer_ids(tokenizer, rewrite.prompt, rewrite.target)[0]
    right = models.weight(model, "unembed.W_U")[:, target].detach().clone()
    size = (config or {"size": 40.0})["size"]
    change = RankOne(left=key / (key @ key), right=right * size / right.norm())
    name = models.W_out_name(LAYER)
    return Edit({name: change}, info_for(model, "push", {"size": size}, [rewrite]))


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


# --- independent numbers ----------------------------------------------------------------------


class Plain:
    """The checkpoint by itself, asked for one token at a time."""

    def __init__(self) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(CHECKPOINT).float().eval()
        self.tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)

    def ask(self, prompt: str, target: str) -> tuple[float, bool]:
        ids, total, first = self.tokenizer(prompt)["input_ids"], 0.0, True
        tokens = self.tokenizer(f" {target}")["input_ids"]
        with torch.inference_mode():
            for token in tokens:
                logits = self.model(torch.tensor([ids])).logits[0, -1].double()
                total -= float(logits.log_softmax(-1)[token])
                first = first and int(logits.argmax()) == token
                ids = [*ids, token]
        return total / len(tokens), first


def slow_scores(plain: Plain, edited: Plain, record) -> dict[str, float]:
    """The scores of one record, as REFERENCE 3 words them."""
    new, true = record.target_new.text, record.target_true.text
    filled = record.prompt.replace("{}", record.subject)
    groups = {
        "E": ([filled], new, true),
        "P": (record.paraphrase_prompts, new, true),
        "N": (record.neighborhood_prompts, true, new),
    }
    found: dict[str, float] = {}
    for letter, (prompts, wanted, other) in groups.items():
        wins, gaps = [], []
        for prompt in prompts:
            right, wrong = edited.ask(prompt, wanted)[0], edited.ask(prompt, other)[0]
            wins.append(wrong > right)
            gaps.append(math.exp(-right) - math.exp(-wrong))
        found[f"{letter}S"], found[f"{letter}M"] = sum(wins) / len(wins), sum(gaps) / len(gaps)
    found["target_first"] = float(edited.ask(filled, new)[1])
    known = [f for f in other_facts(record) if plain.ask(f.prompt, f.object)[1]]
    still = [edited.ask(f.prompt, f.object)[1] for f in known]
    found["n_other"] = len(known)
    found["retention"] = sum(still) / len(still) if still else math.nan
    return found


@pytest.mark.parametrize("size", [15.0, 60.0])
def test_the_numbers_are_those_of_plain_transformers_one_prompt_at_a_time(atlas, records, size):
    some = [*records[:4], next(r for r in records if not other_facts(r))]
    frame = evaluate(atlas, push, some, config={"size": size})
    plain = Plain()
    for record, (_, row) in zip(some, frame.iterrows(), strict=True):
        edited = Plain()
        change = push(atlas, record.rewrite, {"size": size}).changes[models.W_out_name(LAYER)]
        with torch.no_grad():
            edited.model.transformer.h[LAYER].mlp.c_proj.weight += change.dense()
        for name, value in slow_scores(plain, edited, record).items():
            assert row[name] == pytest.approx(value, abs=1e-5, nan_ok=True), name


# --- controls ---------------------------------------------------------------------------------


def test_the_unedited_model_fails_the_rewrite_and_keeps_the_rest(atlas, records):
    frame = evaluate(atlas, None, records[:CONTROLS])
    assert list(frame.columns) == COLUMNS
    assert (frame["editor"] == NONE).all()
    assert (frame["reason"] == "").all()
    (row,) = table(frame).to_dict("records")
    assert row["ES"] < 5
    assert row["target_first"] == 0
    assert row["PS"] < 10
    assert row["NS"] > 95
    assert row["retention"] == 100
    assert row["S"] < 10
    assert frame["EM"].mean() < -0.8
    assert frame["NM"].mean() > 0.8


def test_an_edit_that_works_is_seen_to_and_one_of_nothing_is_not(atlas, records):
    frame = evaluate(atlas, push, records[:CONTROLS])
    assert frame["target_first"].mean() > 0.9
    assert frame["ES"].mean() > 0.9
    nothing = evaluate(atlas, push, records[:CONTROLS], config={"size": 0.0})
    control = evaluate(atlas, None, records[:CONTROLS])
    pd.testing.assert_frame_equal(
        nothing.drop(columns="editor"), control.drop(columns="editor"), atol=1e-5
    )


def test_an_edit_that_breaks_the_model_loses_neighbours_and_other_facts(atlas, records):
    frame = evaluate(atlas, push, records[:20], config={"size": 3000.0})
    assert frame["NS"].mean() < 0.6
    assert frame["retention"].mean() < 0.5


# --- the model, failures, batches -------------------------------------------------------------


def test_the_model_is_left_as_it_was_to_the_bit_also_after_failures(atlas, records):
    def sometimes(model, rewrite, config=None):
        if rewrite.id == str(records[1].case_id):
            raise EditError("cannot be done")
        return push(model, rewrite)

    before, seen = state_of(atlas), []
    frame = evaluate(
        atlas,
        sometimes,
        records[:4],
        batch=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    after = state_of(atlas)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert list(frame["reason"]) == ["", "EditError: cannot be done", "", ""]
    assert frame.loc[1, list(SCORES)].isna().all()
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    (row,) = table(frame).to_dict("records")
    assert (row["n"], row["failed"]) == (3, 1)


def test_a_record_that_does_not_fit_the_model_is_a_row_with_its_reason(atlas, records):
    long = replace(records[0], paraphrase_prompts=("word " * 2000,))
    frame = evaluate(atlas, push, [long, records[1]])
    assert frame["reason"][0].startswith("PromptTooLong: ")
    assert frame["reason"][1] == ""


def test_what_every_record_would_die_of_is_raised(atlas, records):
    def misled(model, rewrite, config=None):
        raise ConfigError("no such key")

    with pytest.raises(ConfigError, match="no such key"):
        evaluate(atlas, misled, records[:3])


def test_an_edit_of_another_model_is_refused(atlas, records):
    def foreign(model, rewrite, config=None):
        edit = push(model, rewrite)
        return Edit(edit.changes, {**edit.info, "fingerprint": "0" * 64})

    frame = evaluate(atlas, foreign, records[:1])
    assert frame["reason"][0].startswith("EditError: ")


def test_nan_is_a_failure_and_no_score(atlas, records, monkeypatch):
    from factlens import metrics

    true_score = metrics.score

    def broken(model, pairs):
        scored = true_score(model, pairs)
        return replace(scored, nll=scored.nll * math.nan)

    monkeypatch.setattr(metrics, "score", broken)
    frame = evaluate(atlas, push, records[:1])
    assert "NaN" in frame["reason"][0]
    assert frame[list(SCORES)].isna().all(axis=None)


def test_other_facts_can_be_given(atlas, records):
    known = Fact("The capital of France is", "France", "Paris")
    unknown = Fact("The capital of France is", "France", "Rome")
    frame = evaluate(atlas, None, records[:2], others=lambda record: [known, unknown])
    assert list(frame["n_other"]) == [1, 1]
    assert list(frame["retention"]) == [1.0, 1.0]


def test_no_records_give_an_empty_frame(atlas):
    assert list(evaluate(atlas, None, []).columns) == COLUMNS


def test_editors_that_can_work_side_by_side_are_let_to(atlas, records):
    sizes = []

    def one(model, rewrite, config=None):
        return push(model, rewrite, config)

    def many(model, rewrites, config=None):
        sizes.append(len(rewrites))
        if any(rewrite.id == str(records[4].case_id) for rewrite in rewrites):
            raise EditError("one of them is bad")
        return [push(model, rewrite, config) for rewrite in rewrites]

    alone = evaluate(atlas, one, records[:6])
    editors.register_each(one, many)
    try:
        together = evaluate(atlas, one, records[:6], batch=3)
        edits = editors.each(one, atlas, [r.rewrite for r in records[:2]])
        editors.register_each(one, lambda model, rewrites, config: [])
        with pytest.raises(EditError, match="2 rewrites gave 0 edits"):
            editors.each(one, atlas, [r.rewrite for r in records[:2]])
    finally:
        del editors.EACH[one]
    assert sizes == [3, 3, 1, 1, 1, 2], "a bad batch is done again one by one"
    assert [edit.rewrites[0].id for edit in edits] == [str(r.case_id) for r in records[:2]]
    assert "one of them is bad" in together["reason"][4]
    pd.testing.assert_frame_equal(together.drop(index=4), alone.drop(index=4))


# --- tables -----------------------------------------------------------------------------------


def frame_of(**columns) -> pd.DataFrame:
    n = len(next(iter(columns.values())))
    rest = {name: [0.0] * n for name in SCORES}
    fixed = {"editor": ["x"] * n, "protocol": [PROTOCOL] * n, "reason": [""] * n}
    return pd.DataFrame({**rest, **fixed, **columns})


def test_a_table_in_closed_form():
    nan = math.nan
    frame = frame_of(
        ES=[1.0, 1.0, 0.0, nan],
        PS=[0.5, 0.5, 0.5, nan],
        NS=[1.0, 0.9, 0.8, nan],
        retention=[nan, 1.0, 0.0, nan],
        reason=["", "", "", "EditError: no"],
    )
    (row,) = table(frame).to_dict("records")
    assert (row["ES"], row["PS"], row["NS"]) == pytest.approx((200 / 3, 50, 90))
    assert row["S"] == pytest.approx(3 / (3 / 200 + 1 / 50 + 1 / 90))
    assert row["NS_margin"] == pytest.approx(1.96 * 10 / math.sqrt(3))
    assert row["PS_margin"] == 0
    assert (row["retention"], row["n_retention"]) == (50, 2)
    assert (row["n"], row["failed"], row["protocol"]) == (3, 1, PROTOCOL)


def test_a_table_has_a_row_for_each_editor_and_refuses_to_mix_protocols():
    frame = frame_of(ES=[1.0, 0.0, 1.0], editor=["b", "a", "b"])
    assert list(table(frame)["editor"]) == ["b", "a"]
    mixed = frame.assign(protocol=[PROTOCOL, PROTOCOL, "first-token/teacher-forced/independent/1"])
    with pytest.raises(PlanError, match=r"not of first-token/.* and mean-token-nll"):
        table(mixed)
    with pytest.raises(PlanError, match="of none"):
        table(frame.iloc[:0])
