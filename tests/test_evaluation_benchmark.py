"""The benchmark's straightforward loop has `evaluate`'s scores, what differs is found, and its table is whole."""

from __future__ import annotations

import contextlib
import functools
import math
import re
from dataclasses import replace

import pandas as pd
import pytest
import torch
from test_evaluation import push
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from factlens import counterfact_scores, evaluation_benchmark, models, plain_evaluation
from factlens.atlas import CHECKPOINT
from factlens.benchmarks.atlas_counterfact import counterfact
from factlens.benchmarks.references import bundled_references
from factlens.counterfact_scores import SCORES, TEXT_SCORES
from factlens.evaluation_benchmark import AGREE, Row, difference, ours
from factlens.plain_evaluation import Plain, straightforward
from factlens.scoring import Texts

TOKENS = 24
CLOSE = 1e-4


@pytest.fixture(scope="module")
def plain(atlas) -> Plain:
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    return Plain(model.eval(), models.tokenizer(atlas))


@pytest.fixture(scope="module")
def records():
    """With other sentences of the subject's, and with the relation's asked the other way round."""
    found = counterfact(only=["sport", "field", "landmark_city"]).records
    return [replace(each, generation_prompts=each.generation_prompts[:2]) for each in found[:3]]


@pytest.fixture(scope="module")
def edits(atlas, records):
    return {str(each.case_id): push(atlas, each.rewrite, {"size": 15.0}) for each in records}


@pytest.fixture(scope="module")
def measured(atlas, records, edits) -> pd.DataFrame:
    return ours(atlas, records, edits, TOKENS)


def loop(plain, records, edits) -> pd.DataFrame:
    return straightforward(plain, records, edits, Texts(TOKENS, bundled_references()))


def test_both_ways_have_the_same_scores(plain, records, edits, measured):
    before = {name: each.clone() for name, each in plain.model.state_dict().items()}
    found = loop(plain, records, edits)
    assert set(found) == {*SCORES, *TEXT_SCORES, "n_other", "KL"}
    gap, score = difference(measured, found)
    assert gap < CLOSE, score
    assert found["KL"].min() > 100 * CLOSE, "the edits do something"
    assert found["GE"].notna().all()
    after = plain.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def another_edit(monkeypatch):
    monkeypatch.setattr(plain_evaluation, "_edited", lambda *given: contextlib.nullcontext())


def other_paragraphs(monkeypatch):
    monkeypatch.setattr(plain_evaluation, "unrelated", lambda names: ("Paris is a city.",))


def no_end(monkeypatch):
    monkeypatch.setattr(plain_evaluation, "_written", lambda plain, prompt, new: " and" * new)


@pytest.mark.parametrize(
    ("plant", "scores"),
    [
        (another_edit, {"KL", "EM", "PM", "NM"}),
        (other_paragraphs, {"KL"}),
        (no_end, {"GE", "RS"}),
    ],
)
def test_a_planted_error_is_found(plain, records, edits, measured, monkeypatch, plant, scores):
    plant(monkeypatch)
    found = loop(plain, records[:1], edits)
    gaps = {name: difference(measured[:1], found[[name]])[0] for name in found}
    assert {name for name, gap in gaps.items() if gap > AGREE} >= scores
    assert difference(measured[:1], found)[0] == max(gaps.values())


def test_a_score_that_one_way_lacks_is_infinitely_far():
    one = pd.DataFrame({"ES": [1.0, 0.5], "RS": [math.nan, 0.2], "more": ["a", "b"]})
    assert difference(one, one[["ES", "RS"]]) == (0.0, "ES")
    assert difference(one, pd.DataFrame({"ES": [1.0, 0.75], "RS": [math.nan, 0.2]})) == (0.25, "ES")
    assert difference(one, pd.DataFrame({"ES": [1.0, 0.5], "RS": [0.1, 0.2]})) == (math.inf, "RS")


def test_a_row_says_rates_and_ratios():
    row = Row("tiny", True, 4, 24.0, 3.0, 8.0, 5.0, 2e-6, "KL")
    assert (row.ratio, row.whole_ratio) == (8.0, 4.0)
    shown = evaluation_benchmark.show(row)
    assert "| 10.0 | 80.0 | **8.0x** | 7.5 | 30.0 | **4.0x** | 2e-06 (KL) |" in shown
    assert shown.count("|") == evaluation_benchmark.HEADER.count("|")


@pytest.fixture
def quick(atlas, plain, monkeypatch):
    """The command, on the models that are loaded and with a cheap editor."""
    few = functools.partial(counterfact, only=["sport"])
    for name, value in (
        ("build", lambda *given: (atlas, plain.model)),
        ("counterfact", few),
        ("rome", lambda model, one, config: push(model, one)),
        ("RECORDS", {"atlas": (1, 1)}),
        ("LENGTH", 14),
    ):
        monkeypatch.setattr(evaluation_benchmark, name, value)
    app = evaluation_benchmark.typer.Typer()
    app.command()(evaluation_benchmark.main)
    return lambda: CliRunner().invoke(app, ["--quick", "--device", "cpu"])


def test_the_table_is_printed_whole(quick):
    told = quick()
    assert told.exit_code == 0, told.output
    lines = [line for line in told.stdout.splitlines() if line.startswith("|")]
    assert [line.count("|") for line in lines] == [11] * 4
    assert re.search(r"\| atlas \| none \| 1 \| .*\d\.\dx", lines[2])
    assert "10 of 14 tokens | 1 |" in lines[3]
    assert "differ" not in told.stdout.splitlines()[-1]
    assert counterfact_scores.TOP_K == 5, "what was greedy for the comparison draws again"


def test_ways_that_differ_are_told_and_end_with_1(quick, monkeypatch):
    row = Row("atlas", False, 4, 24.0, 3.0, 8.0, 5.0, 2 * AGREE, "KL")
    monkeypatch.setattr(evaluation_benchmark, "measure", lambda *given, **more: row)
    told = quick()
    assert told.exit_code == 1
    assert told.stdout.splitlines()[-1] == "the two ways differ by more than 0.001"


def test_a_shape_that_is_not_there_is_refused():
    app = evaluation_benchmark.typer.Typer()
    app.command()(evaluation_benchmark.main)
    refused = CliRunner().invoke(app, ["--shape", "gpt5"])
    assert refused.exit_code == 2
    assert "gpt2-small" in refused.output
