"""Evaluations in a folder: stopped and gone on with they are what they would have been at once, wherever their parts are done."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import pandas as pd
import pytest
import yaml
from test_evaluation import push
from typer.testing import CliRunner

from factlens import load_model, models
from factlens.averages import read_run
from factlens.benchmarks import zsre
from factlens.benchmarks.atlas_counterfact import counterfact
from factlens.benchmarks.counterfact import Record, Target, write_records
from factlens.benchmarks.draws import is_tuned
from factlens.benchmarks.references import References
from factlens.changes import Dense
from factlens.cli import app
from factlens.edits import Edit, apply_permanently, info_for
from factlens.errors import PlanError, RunError
from factlens.evaluation import evaluate, table
from factlens.evaluation_runs import RECORDS, TABLE, Contestant, evaluate_run
from factlens.executors import InProcess
from factlens.row_files import Rows
from factlens.text_metrics import fit_tfidf

CONTESTANTS = [Contestant("none", None), Contestant("push", push, {"size": 20.0})]


@pytest.fixture(scope="module")
def records():
    return counterfact(only=["sport", "instrument"]).records[:3]


@pytest.fixture(scope="module")
def whole(atlas, records, tmp_path_factory) -> pd.DataFrame:
    """The rows of a run that nothing stopped."""
    return evaluate_run(atlas, CONTESTANTS, records, out=tmp_path_factory.mktemp("whole"), batch=2)


class Elsewhere:
    """Workers of another process: nothing but what can be sent reaches them, and the last part comes first."""

    workers = 2

    def __init__(self, model) -> None:
        self.here = InProcess(model)

    def call(self, work, item):
        return next(self.map(work, [item]))[1]

    def map(self, work, items):
        for number, sent in reversed(
            list(enumerate(map(pickle.dumps, [(work, i) for i in items])))
        ):
            yield number, self.here.call(*pickle.loads(sent))

    def close(self) -> None:
        pass


def test_a_run_is_the_evaluation_of_each_editor_with_its_table(atlas, records, whole, tmp_path):
    told = []
    frame = evaluate_run(
        atlas, CONTESTANTS, records, out=tmp_path, progress=lambda *each: told.append(each)
    )
    alone = [
        evaluate(atlas, each.editor, records, config=each.config, label=each.label)
        for each in CONTESTANTS
    ]
    pd.testing.assert_frame_equal(frame, pd.concat(alone, ignore_index=True), atol=1e-5)
    pd.testing.assert_frame_equal(frame, whole, atol=1e-5)  # Whatever the parts.
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / RECORDS), frame)
    assert list(pd.read_csv(tmp_path / TABLE)["ES"]) == list(table(frame)["ES"])
    assert told[1] == (2, 6, "none")
    assert told[-1] == (6, 6, "push")
    with pytest.raises(RunError, match="holds no traces but scores of edits"):
        read_run(tmp_path)


def test_what_was_stopped_goes_on_and_gives_the_same(atlas, records, whole, tmp_path):
    asked = []

    def stopping(model, rewrite, config=None):
        asked.append(rewrite.id)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return push(model, rewrite, config)

    stopping.__module__, stopping.__name__ = push.__module__, push.__name__
    some = [CONTESTANTS[0], replace(CONTESTANTS[1], editor=stopping)]
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(atlas, some, records, out=tmp_path, batch=2)
    assert not (tmp_path / RECORDS).exists()
    frame = evaluate_run(atlas, some, records, out=tmp_path, batch=2)
    pd.testing.assert_frame_equal(frame, whole)
    ids = [str(record.case_id) for record in records]
    assert asked == [*ids, ids[2]], "what was finished is not done again"
    # Nor is anything once all is finished; but what was damaged is.
    evaluate_run(atlas, some, records, out=tmp_path, batch=2)
    assert len(asked) == 4
    part = sorted((tmp_path / "parts").glob("*.parquet"))[-1]
    part.write_bytes(part.read_bytes()[:100])
    pd.testing.assert_frame_equal(evaluate_run(atlas, some, records, out=tmp_path, batch=2), whole)
    assert asked[4:] == [ids[2]]


def test_parts_may_be_done_elsewhere_and_in_any_order(atlas, records, whole, tmp_path):
    frame = evaluate_run(Elsewhere(atlas), CONTESTANTS, records, out=tmp_path, batch=2)
    pd.testing.assert_frame_equal(frame, whole, atol=1e-5)
    (session,) = yaml.safe_load((tmp_path / "run.yaml").read_text("utf-8"))["sessions"]
    assert session["workers"] == 2


def test_a_folder_belongs_to_one_configuration(atlas, records, tmp_path):
    first = {"contestants": CONTESTANTS[:1], "records": records[:1], "out": tmp_path}
    evaluate_run(atlas, **first)
    texts = References({}, fit_tfidf(["aa"]))
    for changed, words in (
        ({"mode": "batch"}, r"measured\.mode was 'independent', now 'batch'"),
        ({"records": records[:2]}, r"records\.asked was 1, now 2"),
        ({"contestants": CONTESTANTS}, r"editors\.push was None"),
        ({"generations": 5}, r"measured\.generations was None, now 5"),
        ({"references": texts}, r"measured\.references was 'bundled'"),
    ):
        with pytest.raises(RunError, match=words):
            evaluate_run(atlas, **{**first, **changed})
    for bad in ([], [*CONTESTANTS, CONTESTANTS[0]]):
        with pytest.raises(PlanError, match="a name each"):
            evaluate_run(atlas, **{**first, "contestants": bad})


def test_an_editor_that_leaves_its_edit_in_the_model_is_found_out(family_folder, tmp_path):
    model = load_model(family_folder("gpt2"))
    record = Record(
        0, 0, "{} is", "r", Target("x", ""), Target("y", ""), "A", ("A was",), ("B is",), (), ()
    )

    def leaving(model, rewrite, config=None):
        name = models.W_out_name(0)
        change = Dense(0.01 * models.weight(model, name).detach().clone())
        edit = Edit({name: change}, info_for(model, "leaving", {}, [rewrite]))
        apply_permanently(model, edit)
        return edit

    with pytest.raises(RunError, match="an editor left its edit"):
        evaluate_run(model, [Contestant("leaving", leaving)], [record], out=tmp_path)


def test_rows_are_read_back_or_refused(tmp_path):
    path = tmp_path / "part.parquet"
    Rows(pd.DataFrame({"ES": [1.0]}), {"chunk": "x"}).save(path)
    found = Rows.load(path)
    assert (list(found.frame["ES"]), found.about) == ([1.0], {"chunk": "x"})
    pd.DataFrame({"ES": [1.0]}).to_parquet(tmp_path / "other.parquet")
    (tmp_path / "none.parquet").write_bytes(b"PAR1")
    for name in ("other.parquet", "none.parquet", "nowhere.parquet"):
        with pytest.raises(RunError, match="holds no rows"):
            Rows.load(tmp_path / name)


# --- the command ------------------------------------------------------------------------------


def run(*arguments: object):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_the_command_goes_on_and_is_strict_if_it_is_asked_to_be(records, tmp_path):
    some = [record for record in records if not is_tuned(record.subject)][:2]
    some[1] = replace(some[1], neighborhood_prompts=())
    write_records(some, tmp_path / "records.json")
    given = ["--records", tmp_path / "records.json", "--editor", "ft", "--no-control"]
    given += ["--mode", "sequential", "--every", 1, "--generate", 20, "--out", tmp_path / "run"]
    first = run(*given)
    assert first.exit_code == 0, first.output
    lines = " ".join(first.stdout.split())
    assert f"such as {some[1].case_id}: no neighbourhood prompts" in lines
    assert "mean-token-nll/teacher-forced/sequential/1" in lines
    assert "GE" in lines
    frame = pd.read_parquet(tmp_path / "run" / RECORDS)
    assert list(frame["measured_after"]) == [1, 1, 1]
    assert list(frame["reason"]) == ["", "", "no neighbourhood prompts"]
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/parts").iterdir()}
    again = run(*given, "--strict")
    assert again.exit_code == 1
    assert again.stdout == first.stdout
    assert {path: path.stat().st_mtime_ns for path in parts} == parts
    other = run(*given[:-2], "--every", 2, "--out", tmp_path / "run")
    assert other.exit_code == 2
    assert "measured.every was 1, now 2" in other.stderr


def test_the_command_evaluates_zsre(records, tmp_path):
    questions = [
        {
            **dict.fromkeys(zsre.KEYS, ""),
            "subject": record.subject,
            "src": record.rewrite.prompt,
            "rephrase": record.paraphrase_prompts[0],
            "answers": [record.target_new.text],
            "loc": record.neighborhood_prompts[0],
            "loc_ans": record.target_true.text,
        }
        for record in records
        if not is_tuned(record.subject)
    ]
    (tmp_path / "zsre.json").write_text(json.dumps(questions[:1]))
    given = ["--benchmark", "zsre", "--records", tmp_path / "zsre.json", "--editor", "ft"]
    done = run(*given, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    frame = pd.read_parquet(tmp_path / "run" / RECORDS)
    assert list(frame["editor"]) == ["none", "ft"]
    assert frame["efficacy"][1] > frame["efficacy"][0]
    assert "token-argmax/teacher-forced/independent/1" in done.stdout


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--benchmark", "wikidata"], "no benchmark 'wikidata'; there are counterfact, zsre"),
        (["--benchmark", "zsre", "--generate", 5], "leave out --generate"),
        (["--snippets", "texts.json"], "give --generate too"),
        (["--snippets", "texts.json", "--generate", 5], "cannot read texts.json"),
    ],
)
def test_what_does_not_go_together_is_one_line(given, words, tmp_path):
    refused = run(*given, "--out", tmp_path)
    assert refused.exit_code == 2
    assert words in " ".join(refused.stderr.split())
