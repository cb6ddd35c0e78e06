"""Settings compared on the same records, what is taken of them, and the two commands."""

from __future__ import annotations

import pandas as pd
import pytest
from typer.testing import CliRunner

from factlens.cli import app
from factlens.editors.rome import rome
from factlens.errors import PlanError
from factlens.evaluation import evaluate, table
from factlens.sweeps import best, sweep

EDITORS = ["none", "C = identity", "rome"]
QUICK = {"contexts": ("{}",), "steps": 6, "moment": "identity", "learning_rate": 1.0}


def run(*arguments: object):
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.fixture(scope="module")
def records(atlas):
    from factlens import counterfact

    return counterfact(atlas, part="tune", first=3)


@pytest.mark.slow
def test_each_row_is_the_evaluation_with_its_settings(atlas, records):
    chosen, told = records.tune[:3], []
    swept = sweep(
        atlas,
        rome,
        chosen,
        {"layer": [1, 6], "max_norm_ratio": [2.0]},
        config=QUICK,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told[-1] == (6, 6)
    assert set(swept["layer"]) == {1, 6}
    assert list(swept["S"]) == sorted(swept["S"], reverse=True)
    for _, row in swept.iterrows():
        alone = evaluate(
            atlas, rome, chosen, config={**QUICK, "layer": row["layer"], "max_norm_ratio": 2.0}
        )
        assert row["S"] == pytest.approx(table(alone)["S"].iloc[0])
    assert swept["EM"].nunique() == 2  # The settings matter.


def test_the_best_keeps_most_within_a_point_of_the_highest():
    swept = pd.DataFrame(
        {"layer": [0, 1, 2, 3], "S": [96.0, 95.5, 94.0, 95.1], "retention": [10, 40, 90, 35.0]}
    )
    assert best(swept, slack=1.0)["layer"] == 1
    assert best(swept)["layer"] == 0
    assert best(swept, slack=5.0)["layer"] == 2


def test_a_sweep_of_nothing_is_refused(atlas, records):
    with pytest.raises(PlanError, match="at least one value"):
        sweep(atlas, rome, records.tune[:1], {"layer": []})
    with pytest.raises(PlanError, match="needs records"):
        sweep(atlas, rome, [], {"layer": [1]})


@pytest.mark.slow
def test_evaluate_prints_the_table_with_its_controls(tmp_path):
    out = run("evaluate", "--n", 3, "--layer", 1, "--clamp", 4, "--out", tmp_path / "e")
    assert out.exit_code == 0, out.output
    lines = out.stdout.splitlines()
    rows = [line.strip().split("  ")[0] for line in lines]
    assert [row for row in rows if row in EDITORS] == EDITORS
    assert "mean-token-nll/teacher-forced/independent/1" in out.stdout
    frame = pd.read_parquet(tmp_path / "e" / "records.parquet")
    assert len(frame) == 9
    scores = table(frame).set_index("editor")
    assert scores.loc["none", "ES"] < 50 < scores.loc["rome", "ES"]


def test_sweep_marks_one_and_writes_a_file(tmp_path):
    out = run("sweep", "--n", 2, "--layer", 1, "--layer", 6, "--clamp", 4, "--out", tmp_path / "s")
    assert out.exit_code == 0, out.output
    assert sum(line.startswith("*") for line in out.stdout.splitlines()) == 1
    assert len(pd.read_csv(tmp_path / "s" / "sweep.csv")) == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("evaluate", "--n", 2, "--layer", 99), "8 layers, 0 to 7"),
        (("evaluate", "--n", 2, "--records", "nothing.json"), "nothing.json"),
        (("evaluate", "--n", 2, "--clamp", "-1"), "max_norm_ratio"),
        pytest.param(
            ("evaluate", "--n", 2, "--skip", 99999), "99999 are left out", marks=pytest.mark.slow
        ),
        (("sweep", "--n", 2, "--config", "nothing.yaml"), "nothing.yaml"),
    ],
)
def test_bad_input_is_one_line(arguments, says, tmp_path):
    out = run(*arguments, "--out", tmp_path / "x")
    assert out.exit_code == 2
    (line,) = [each for each in out.stderr.splitlines() if each.startswith("factlens:")]
    assert says in line
    assert out.stderr.strip().endswith(line)
