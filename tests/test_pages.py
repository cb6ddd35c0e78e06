"""Figures show what the frame holds; the page is self-contained, and text from data stays text."""

from __future__ import annotations

import json
import shutil
import subprocess

import numpy as np
import pytest

from factlens import Fact, plots, reports, trace
from factlens.errors import OutputError, PlanError

FACT = Fact("The Space Needle is located in the city of", "The Space Needle", "Seattle")
EVIL = "<script>document.title='owned'</script><b>bold</b> Paris is in"


@pytest.fixture(scope="module")
def traced(atlas):
    return trace(atlas, FACT, samples=2, severed=("none", "mlp"), window=(1, 3))


def test_a_heatmap_holds_the_frames_values(traced):
    figure = plots.heatmap(traced)
    grids = [each for each in figure.data if each.showscale is not False]
    assert len(grids) == 3
    for grid, kind, window in zip(grids, ("state", "mlp", "attn"), (1, 1, 1), strict=True):
        cells = traced.frame[
            (traced.frame["kind"] == kind)
            & (traced.frame["window"] == window)
            & (traced.frame["severed"] == "none")
            & (traced.frame["layer"] >= 0)
        ]
        expected = cells.pivot(index="position", columns="layer", values="prob_restored").to_numpy()
        assert np.array_equal(np.array(grid.z), expected)
        assert grid.zmin == pytest.approx(traced.frame["prob_corrupted"].iloc[0])
        assert f"{expected[0, 0]:.4f}" in grid.text[0][0]
    assert [grid.colorscale[-1][1] for grid in grids] == [
        "rgb(63,0,125)",
        "rgb(0,68,27)",
        "rgb(103,0,13)",
    ]


def test_subject_tokens_are_starred_and_the_embedding_stands_apart(traced):
    figure = plots.heatmap(traced, kinds=["state"])
    labels = list(figure.layout.yaxis.ticktext)
    begin, end = traced.subjects[0]
    assert [label.endswith("*") for label in labels] == [
        begin <= at < end for at in range(len(labels))
    ]
    embedding, blocks = figure.data
    assert max(embedding.x) < min(blocks.x)
    assert "emb" in figure.layout.xaxis.ticktext


def test_scales_are_shared_on_request_and_choices_are_checked(traced):
    own, shared = plots.heatmap(traced), plots.heatmap(traced, shared_scale=True)
    assert len({each.zmax for each in shared.data}) == 1 < len({each.zmax for each in own.data})
    cut = plots.heatmap(traced, severed="mlp", window=3)
    assert "MLPs severed" in cut.layout.title.text
    assert any("3 layers" in note.text for note in cut.layout.annotations)
    for wrong in ({"kinds": ["head"]}, {"severed": "both"}, {"window": 7}):
        with pytest.raises(PlanError, match="it has"):
            plots.heatmap(traced, **wrong)


@pytest.fixture(scope="module")
def evil_page(atlas, tmp_path_factory):
    evil = trace(atlas, Fact(EVIL, "Paris"), samples=1, kinds="state")
    path = tmp_path_factory.mktemp("page") / "evil.html"
    return reports.write_text(reports.trace_page(evil, [plots.heatmap(evil)]), path)


def test_text_from_data_is_escaped_everywhere(evil_page):
    html = evil_page.read_text(encoding="utf-8")
    assert "<script>document.title" not in html
    assert "<b>bold" not in html
    assert "&lt;script&gt;document.title" in html
    assert "src=" not in html.split("<body>")[0], "nothing is loaded from elsewhere"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
def test_the_page_opens_without_console_errors_and_shows_the_text(evil_page, tmp_path):
    shot = tmp_path / "shot.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    done = subprocess.run(
        ["chromium", *flags, "--enable-logging=stderr", f"--user-data-dir={tmp_path}/profile",
         "--virtual-time-budget=4000", "--dump-dom", f"--screenshot={shot}", evil_page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert console == []
    assert "<title>owned" not in done.stdout
    assert "heatmaplayer" in done.stdout, "plotly drew the figure"
    assert "&lt;script&gt;document.title" in done.stdout


def test_a_page_is_written_whole_or_not_at_all(tmp_path):
    with pytest.raises(OutputError, match="cannot write"):
        reports.write_text("x", tmp_path / "none" / "page.html")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        reports.write_text("x", tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_frame_of_numbers_survives_json(traced):
    assert json.loads(plots.heatmap(traced).to_json())["data"]
