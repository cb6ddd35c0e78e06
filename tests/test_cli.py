"""The command line as a user meets it: a result, a picture, and one clear line when something is wrong."""

from __future__ import annotations

import csv
import os
import stat

import pandas as pd
import pytest
from typer.testing import CliRunner

from factlens import Trace
from factlens.cli import app

PROMPT, SUBJECT = "The Space Needle is located in the city of", "The Space Needle"
FAST = ["--samples", "1", "--kind", "state"]


@pytest.fixture
def run(tmp_path):
    def call(*arguments, code=0):
        out = (
            []
            if "--out" in arguments or arguments[0] != "trace"
            else ["--out", str(tmp_path / "o")]
        )
        result = CliRunner().invoke(app, [*map(str, arguments), *out])
        assert result.exit_code == code, result.output + str(result.exception)
        if code:
            lines = [line for line in result.stderr.splitlines() if line.startswith("factlens:")]
            assert len(lines) == 1, result.output
        return result

    return call


def test_trace_without_arguments_shows_a_bundled_fact(run, tmp_path):
    result = run("trace", "--samples", "2")
    assert "The mother tongue of Charles Darwin is → English" in result.output
    assert "one-pass engine" in result.output
    for kind in ("state", "mlp", "attn"):
        assert kind in result.output
    names = sorted(path.name for path in (tmp_path / "o").iterdir())
    assert names == ["trace.csv", "trace.html", "trace.parquet"]
    trace = Trace.load(tmp_path / "o" / "trace.parquet")
    table = pd.read_csv(tmp_path / "o" / "trace.csv")
    assert table["prob_restored"].to_numpy() == pytest.approx(
        trace.frame["prob_restored"].to_numpy()
    )


@pytest.mark.slow
def test_trace_takes_every_choice(run, tmp_path):
    run(
        "trace", PROMPT, "-s", SUBJECT, "-k", "mlp", "-w", 1, "-w", 3, "--severed", "none", "--severed",
        "attn", "--samples", 2, "--noise", "uniform", "--noise-level", "0.3", "--metric", "logprob",
        "--engine", "plain", "--shared-scale",
    )  # fmt: skip
    trace = Trace.load(tmp_path / "o" / "trace.parquet")
    assert set(trace.frame["window"]) == {1, 3}
    assert set(trace.frame["severed"]) == {"none", "attn"}
    assert (trace.engine, trace.info["metric"], trace.info["noise_level"]) == (
        "plain",
        "logprob",
        0.3,
    )


def test_a_file_of_facts_is_traced_and_what_is_skipped_is_said(run, tmp_path):
    with (tmp_path / "f.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerows([["prompt", "subject", "object"], [PROMPT, SUBJECT, "Seattle"]])
        writer.writerow(["The capital of France is", "France", "Rome"])
    result = run("trace", "--facts", tmp_path / "f.csv", *FAST)
    assert "skipped 'The capital of France is'" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["", "-s", "x"], "is empty"),
        (["Paris is", "-s", "Rome"], "does not occur"),
        (["Paris is"], "--subject"),
        (["Paris is " + "very " * 200, "-s", "Paris"], "128 positions"),
        (["Paris is", "-s", "Paris", "--model", "no-such-model"], "neither a folder nor fetchable"),
        (["Paris is", "-s", "Paris", "--kind", "neuron"], "state, mlp, attn"),
        (["Paris is", "-s", "Paris", "--noise-level", "loud"], "a number"),
        (["Paris is", "-s", "Paris", "--dtype", "int8"], "float32"),
        (["Paris is", "-s", "Paris", "--device", "cuda"], "no CUDA"),
        (["Paris is", "-s", "Paris", "--device", "toaster"], "no device"),
        (["Paris is", "--facts", "x.csv"], "not both"),
        (["--facts", "x.csv"], "cannot read"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(run, arguments, words, tmp_path):
    result = run("trace", *arguments, code=2)
    assert words in result.stderr
    assert not (tmp_path / "o").exists()


def test_a_csv_without_a_column_is_refused(run, tmp_path):
    (tmp_path / "f.csv").write_text("prompt,object\nx,y\n")
    assert "no column subject" in run("trace", "--facts", tmp_path / "f.csv", code=2).stderr


def test_broken_model_folders_are_refused(run, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "config.json" in run("trace", "--model", tmp_path / "empty", code=2).stderr
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "gpt2"}')
    assert "no *.safetensors" in run("trace", "--model", broken, code=2).stderr
    (broken / "model.safetensors").write_bytes(b"not weights")
    assert "cannot be loaded" in run("trace", "--model", broken, code=2).stderr


def test_a_pickled_model_is_not_read(run, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    assert "no pickled weights" in run("trace", "--model", tmp_path, code=2).stderr


def test_an_output_that_cannot_be_written_is_said_before_the_work(run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = run("trace", "--out", tmp_path / "file" / "sub", code=2)
    assert "cannot write" in result.stderr
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
        assert "cannot write" in run("trace", "--out", tmp_path / "locked", code=2).stderr


def test_ctrl_c_is_one_line(run, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("factlens.tracing.trace", interrupted)
    assert "interrupted" in run("trace", code=130).stderr


def test_warnings_are_one_line_each(run):
    result = run("trace", "Paris or Paris is in", "-s", "Paris", *FAST)
    assert [line for line in result.stderr.splitlines() if line.startswith("note:")] == [
        "note: the subject 'Paris' occurs 2 times in 'Paris or Paris is in'; occurrence 0 is corrupted, "
        "subject_at= picks another"
    ]


def test_models_lists_shows_the_card_and_measures(run, monkeypatch):
    assert "gpt2-xl" in run("models").output
    assert "0.1346" in run("models", "gpt2-xl").output
    assert "Training" in run("models", "atlas").output
    assert "no config serves" in run("models", "gpt-17", code=2).stderr
    from factlens.facts import bundled_facts

    few = bundled_facts()[::4000]
    monkeypatch.setattr("factlens.facts.bundled_facts", lambda split: few)
    result = run("models", "atlas", "--measure")
    assert f"all  {len(few)}" in " ".join(result.output.split()).replace("all ", "all  ")
    assert (
        "train, held, fresh" in run("models", "atlas", "--measure", "--split", "x", code=2).stderr
    )


def test_help_teaches(run):
    assert "Examples" in run("trace", "--help").output
    assert "offline" in run("--help").output


# -- average and report ------------------------------------------------------------------------------

QUICK = ["--study", "none", "--samples", 1, "--n", 3]


def facts_file(path, rows):
    path.write_text("prompt,subject,object\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def capitals(tmp_path):
    countries = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Egypt": "Cairo"}
    rows = [f"The capital of {{}} is,{name},{city}" for name, city in countries.items()]
    return facts_file(tmp_path / "capitals.csv", rows)


def test_average_writes_a_page_and_report_writes_it_again_from_files_alone(
    run, tmp_path, capitals, monkeypatch
):
    out = tmp_path / "run"
    first = run("average", "--facts", capitals, "--out", out, *QUICK)
    assert "early site at the last" in first.output
    assert "known, and not drawn" in first.output
    page = (out / "report.html").read_text(encoding="utf-8")
    for part in ("Figure 2", "Figure 3", "Figure 7", "The claims of Section 2", "fingerprint"):
        assert part in page
    (out / "report.html").unlink()
    monkeypatch.setattr("factlens.models.load_model", None)  # Whoever loads a model fails.
    run("report", out)
    assert (out / "report.html").read_text(encoding="utf-8") == page
    assert len(pd.read_csv(out / "claims.csv")) == 9


def test_bad_rows_are_left_out_named_and_kept_in_the_report(run, tmp_path, capitals):
    text = capitals.read_text().splitlines()
    text[2:2] = ["The capital of,,Oslo", "no subject here,Norway,Oslo", "a,b,c,d,e"]
    bad = facts_file(tmp_path / "bad.csv", text[1:])
    found = run("average", "--facts", bad, "--out", tmp_path / "run", *QUICK)
    assert found.stderr.count("left out:") == 3
    assert "line 3: no subject" in found.stderr
    assert "3 row of the fact file that cannot be used" in found.output
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "spans are matched verbatim" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--study", "colour"], "no study 'colour'"),
        (["--workers", 0], "from 1 up"),
        (["--n", 0], "from 1 up"),
        (["--noise-level", "loud"], "a number"),
        (["--dtype", "int3"], "float32"),
        (["--known", "so"], "whole"),
    ],
)
def test_average_refuses_in_one_line(run, tmp_path, capitals, arguments, message):
    command = ["average", "--facts", capitals, "--out", tmp_path / "run", *QUICK]
    assert message in run(*command, *arguments, code=2).stderr


def test_a_run_that_is_not_there_or_has_other_settings_is_one_line(run, tmp_path, capitals):
    assert "there is no run in" in run("report", tmp_path / "none", code=2).stderr
    out = tmp_path / "run"
    run("average", "--facts", capitals, "--out", out, *QUICK)
    told = run("average", "--facts", capitals, "--out", out, *QUICK, "--seed", 5, code=2).stderr
    assert "trace.seed was 0, now 5" in told


def test_no_known_fact_is_one_line(run, tmp_path):
    wrong = facts_file(tmp_path / "wrong.csv", ["The capital of {} is,France,Lima"])
    told = run("average", "--facts", wrong, "--out", tmp_path / "run", code=2).stderr
    assert "knows none of the 1 facts" in told


def test_ctrl_c_says_that_the_same_command_goes_on(run, tmp_path, capitals, monkeypatch):
    def interrupted(model, chunk):
        raise KeyboardInterrupt

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("factlens.parts.do_chunk", interrupted)
        told = run("average", "--facts", capitals, "--out", out, *QUICK, code=130).output
    assert "interrupted; the same command goes on from" in told
    run("average", "--facts", capitals, "--out", out, *QUICK)
