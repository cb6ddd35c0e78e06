"""`factlens paper`: its commands in order, going on where it stopped, and the report of what they left."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import average_runs
import pandas as pd
import pytest
from typer.testing import CliRunner

from factlens import counterfact, rome
from factlens.averages import average
from factlens.benchmarks.atlas_zsre import zsre
from factlens.cli import app
from factlens.commands import papering
from factlens.editors import checkpoints
from factlens.editors.fine_tuning import ft
from factlens.errors import EditError, EditorError, PlanError, RunError
from factlens.evaluation import evaluate
from factlens.layer_sweeps import layer_sweep
from factlens.paper_pages import paper_page
from factlens.paper_results import Results, side_by_side
from factlens.tracing import trace

QUICKLY = {"moment": "identity", "steps": 3}
"""Settings of edits whose quality does not matter."""
CONTESTANTS = {"none": (None, None), "rome": (rome, QUICKLY), "ft": (ft, {"steps": 3})}


@pytest.fixture(scope="module")
def records(atlas) -> tuple:
    return counterfact(atlas, only=["native_language"]).test[:3]


@pytest.fixture(scope="module")
def folder(atlas, records, tmp_path_factory):
    """What the command leaves, of few facts and records."""
    made = tmp_path_factory.mktemp("paper")
    facts = average_runs.facts()
    (made / "figure-1").mkdir()
    trace(atlas, facts[:1], samples=1).save(made / "figure-1/trace.parquet")
    average(atlas, facts, out=made / "average", n=4, samples=1, variants="none")
    asked = zsre(only=["native_language"]).test[:3]
    parts = (("counterfact", records, None), ("texts", records[:1], 40), ("zsre", asked, None))
    for name, some, tokens in parts:
        (made / name).mkdir()
        frames = [
            evaluate(atlas, editor, some, label=label, config=config, generations=tokens)
            for label, (editor, config) in CONTESTANTS.items()
        ]
        pd.concat(frames).to_parquet(made / name / "records.parquet")
    (made / "figure-5").mkdir()
    swept = layer_sweep(
        atlas, records[:2], layers=[0, 1, 2], tokens=["subject-last"], config=QUICKLY
    )
    swept.to_parquet(made / "figure-5/records.parquet")
    side_by_side(atlas, CONTESTANTS, records[:1], prompts=1).to_csv(
        made / "figure-6.csv", index=False
    )
    pd.DataFrame({"item": ["records"], "total": [3], "per_relation": [3.0]}).to_csv(
        made / "table-3.csv", index=False
    )
    return made


# -- the report ------------------------------------------------------------------------------------


def test_the_report_has_every_figure_and_table(folder):
    page = paper_page(Results(folder))
    for words in (
        "One fact (Figure 1)",
        "Average indirect effects (Figure 2)",
        "With 95 % intervals (Figure 7)",
        "The claims of Section 2",
        "Quantitative editing results on CounterFact (ROME, Table 2)",
        "GPT-2 XL (paper)",
        "The claims of Section 3",
        "FT bleeds over",
        "zsRE editing results (ROME, Table 1)",
        "MEND-zsRE",
        "(Table 3)",
        "at every layer and token (Figure 5)",
        "What edited models write (Figure 6)",
    ):
        assert words in page, words
    assert page.count('id="figure-') >= 4


def test_texts_of_a_few_records_stand_beside_the_scores_of_all(folder, records):
    rows = Results(folder).counterfact
    assert len(rows) == len(CONTESTANTS) * len(records)
    written = rows[rows["GE"].notna()]
    assert set(written["case_id"]) == {records[0].case_id}
    assert set(written["editor"]) == set(CONTESTANTS)


def test_text_from_data_is_escaped(folder, tmp_path):
    made = tmp_path / "paper"
    made.mkdir()
    for each in folder.iterdir():
        (made / each.name).symlink_to(each)
    (made / "figure-6.csv").unlink()
    texts = pd.read_csv(folder / "figure-6.csv").assign(text="<script>alert(1)</script>")
    texts.to_csv(made / "figure-6.csv", index=False)
    page = paper_page(Results(made))
    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_what_is_not_there_yet_is_named(tmp_path):
    with pytest.raises(RunError, match=r"figure-5/records.parquet is not there yet; `factlens pap"):
        _ = Results(tmp_path).swept


# -- Figure 6 --------------------------------------------------------------------------------------


def test_editors_write_about_the_same_facts_with_the_same_draws(atlas, records):
    logits = atlas(atlas.to_tokens("France", prepend_bos=False))
    found = side_by_side(atlas, {**CONTESTANTS, "again": (None, None)}, records[:1])
    assert bool((atlas(atlas.to_tokens("France", prepend_bos=False)) == logits).all())
    by_editor = {name: list(group["text"]) for name, group in found.groupby("editor")}
    assert by_editor["none"] == by_editor["again"]
    assert by_editor["rome"] != by_editor["none"]
    assert set(found["prompt"]) <= set(records[0].generation_prompts)
    assert (found["new_fact"] == f"{records[0].rewrite.prompt} {records[0].target_new.text}.").all()


def test_an_edit_that_fails_has_its_reason_and_the_others_write(atlas, records):
    def raising(model, rewrite, config=None):
        raise EditError("not this one")

    found = side_by_side(atlas, {"none": (None, None), "bad": (raising, None)}, records[:1])
    of = found.groupby("editor")["text"]
    assert set(of.get_group("bad")) == {" (EditError: not this one)"}
    assert "EditError" not in "".join(of.get_group("none"))


def test_a_record_without_generation_prompts_is_refused(atlas, records):
    with pytest.raises(PlanError, match="has no generation prompts"):
        side_by_side(atlas, CONTESTANTS, [replace(records[0], generation_prompts=())])


# -- the command -----------------------------------------------------------------------------------


def invoke(*words: object):
    return CliRunner().invoke(app, ["paper", *map(str, words)])


@pytest.fixture
def ran(monkeypatch, folder):
    """The commands that it ran; each leaves what the real one leaves."""
    commands: list[list[str]] = []

    def run(words):
        said = [*map(str, words)]
        commands.append(said)
        out = Path(said[said.index("--out") + 1])
        out.parent.mkdir(parents=True, exist_ok=True)
        if not out.exists():
            out.symlink_to(folder / out.name)

    def written(model, records, names, numbers, out):
        for name in ("table-3.csv", "figure-6.csv"):
            (out / name).write_bytes((folder / name).read_bytes())

    monkeypatch.setattr(papering, "run_command", run)
    monkeypatch.setattr(papering, "_records_and_texts", written)
    monkeypatch.setattr(checkpoints, "trained_for", lambda model, method, data: None)
    return commands


def values(words: list[str], option: str) -> list[str]:
    """What an option was given, each time."""
    return [words[at + 1] for at, word in enumerate(words) if word == option]


def test_it_runs_every_experiment_and_ends_in_a_report(ran, tmp_path):
    done = invoke("--quick", "--out", tmp_path / "paper")
    assert done.exit_code == 0, done.output
    assert [words[0] for words in ran] == ["trace", "average", *["evaluate"] * 3, "sweep"]
    table, texts, questions = ran[2:5]
    for words in (table, texts):
        assert values(words, "--editor") == [*papering.COMPARED]
    assert values(questions, "--editor") == [*papering.COMPARED_ZSRE]
    assert values(questions, "--benchmark") == ["zsre"]
    assert table[table.index("--n") + 1] == "12"
    assert texts[texts.index("--generate") + 1] == "100"
    assert "Table 2" in (tmp_path / "paper/report.html").read_text("utf-8")


def test_it_goes_on_and_does_not_mix_two_plans(ran, tmp_path):
    invoke("--quick", "--out", tmp_path / "paper")
    before = len(ran)
    assert invoke("--quick", "--out", tmp_path / "paper").exit_code == 0
    # What resumes by itself is asked again; the trace and the sweep are there.
    assert [words[0] for words in ran[before:]] == ["average", *["evaluate"] * 3]
    other = invoke("--out", tmp_path / "paper")
    assert other.exit_code == 2
    assert "holds measurements of another facts, records, texts, layers" in other.stderr


def test_a_file_of_questions_takes_the_place_of_the_bundled_ones(ran, tmp_path):
    mine = tmp_path / "zsre.json"
    mine.write_text("[]", "utf-8")
    done = invoke("--quick", "--zsre", mine, "--out", tmp_path / "paper")
    assert done.exit_code == 0, done.output
    (asked,) = [words for words in ran if "--benchmark" in words]
    assert values(asked, "--records") == [str(mine)]
    plan = json.loads((tmp_path / "paper/plan.json").read_text("utf-8"))
    assert plan["zsre file"] == str(mine)


@pytest.mark.parametrize("option", ["--facts", "--records", "--zsre"])
def test_a_missing_file_is_refused_before_anything_is_measured(ran, tmp_path, option):
    done = invoke("--quick", option, tmp_path / "missing.json", "--out", tmp_path / "paper")
    assert done.exit_code == 2
    assert f"the {option[2:]} file {tmp_path / 'missing.json'} is not there" in done.stderr
    assert not ran
    assert not (tmp_path / "paper").exists()


def test_editors_that_are_not_trained_for_the_model_are_left_out_and_named(
    ran, tmp_path, monkeypatch
):
    def trained_for(model, method, data):
        if method.name == "ke":
            raise EditorError("there is no trained ke; `factlens train-editor ke` trains one")

    monkeypatch.setattr(checkpoints, "trained_for", trained_for)
    done = invoke("--quick", "--out", tmp_path / "paper")
    assert done.exit_code == 0, done.output
    assert values(ran[2], "--editor") == [n for n in papering.COMPARED if not n.startswith("ke")]
    assert "left out: there is no trained ke; `factlens train-editor ke` trains one" in done.stderr


def test_an_unknown_editor_is_one_line(tmp_path):
    done = invoke("--editor", "rom", "--out", tmp_path)
    assert done.exit_code == 2
    assert "no editor 'rom'; there are rome, ft" in done.stderr
    assert len(done.stderr.strip().split("\n")) == 1
