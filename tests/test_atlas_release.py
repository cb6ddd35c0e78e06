"""What a release measures is what it writes, wherever a document has a block for it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import average_runs
import pandas as pd
import pytest

from factlens import atlas_blocks, atlas_release
from factlens.atlas import CHECKPOINT
from factlens.atlas_blocks import BLOCK, BLOCKS, Measured, fill, filled
from factlens.averages import average
from factlens.errors import OutputError, RunError
from factlens.evaluation import evaluate, table

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / name for name in atlas_release.DOCUMENTS]


@pytest.fixture(scope="module")
def measured(atlas, tmp_path_factory):
    """A release of few facts and records, with every study."""
    from factlens import counterfact, rome
    from factlens.sweeps import sweep

    folder = tmp_path_factory.mktemp("release")
    average(atlas, average_runs.facts(), out=folder / "average", n=8, samples=1, part=4)
    records = counterfact(atlas, only=["language"])
    frames = [
        evaluate(atlas, editor, records.test[:3], label=name, config=config)
        for name, editor, config in (
            ("none", None, None),
            ("C = identity", rome, {"moment": "identity"}),
            ("rome", rome, {}),
        )
    ]
    for name in ("edits", "layers", "clamps"):
        (folder / name).mkdir()
    table(pd.concat(frames)).to_csv(folder / "edits/table.csv", index=False)
    grid = {"layer": [0, 1], "max_norm_ratio": [1.5]}
    swept = sweep(atlas, rome, records.tune[:2], grid)
    for name in ("layers", "clamps"):
        swept.to_csv(folder / name / "sweep.csv", index=False)
    atlas_release._records(folder / "records.csv")
    return Measured(folder, json.loads((CHECKPOINT / "report.json").read_text(encoding="utf-8")))


def test_every_block_of_the_documents_is_written_by_someone_and_every_writer_is_asked():
    found = {m["name"] for path in DOCUMENTS for m in BLOCK.finditer(path.read_text("utf-8"))}
    assert found == set(BLOCKS)
    for path in DOCUMENTS:
        text = path.read_text("utf-8")
        assert text.count("<!-- atlas: ") == text.count("<!-- end -->")


@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_has_the_form_that_its_document_has(measured, name):
    """A table has the header that stands there now, so that a release changes numbers and nothing else."""
    written = BLOCKS[name](measured)
    (there, *_) = [
        match[0].split("\n", 1)[1]
        for path in DOCUMENTS
        for match in BLOCK.finditer(path.read_text("utf-8"))
        if match["name"] == name
    ]
    heads = [
        [
            line
            for line, rule in zip(text.split("\n"), text.split("\n")[1:], strict=False)
            if set(rule) <= set("|-:") and rule
        ]
        for text in (written, there)
    ]
    assert heads[0] == heads[1]
    assert "nan" not in written.replace("dominan", "")


def test_what_stands_in_the_known_block_is_the_report_of_the_shipped_checkpoint(measured):
    text = (ROOT / "docs/atlas.md").read_text("utf-8")
    (there,) = [m[0] for m in BLOCK.finditer(text) if m["name"] == "known"]
    assert atlas_blocks.known(measured) in there


def test_the_edits_block_says_what_the_table_says(measured):
    found = measured.table("edits/table.csv").set_index("editor")
    line = next(
        line for line in atlas_blocks.edits(measured).split("\n") if line.startswith("| ROME |")
    )
    _, _, s, efficacy, *_ = (cell.strip() for cell in line.split("|"))
    assert s == f"{found.loc['rome', 'S']:.1f}"
    assert float(efficacy.split(" ")[0]) == pytest.approx(found.loc["rome", "ES"], abs=0.05)


def test_only_what_is_in_a_block_is_replaced():
    text = "a\n<!-- atlas: one -->\nold\nold\n<!-- end -->\nb\n<!-- atlas: two -->\n<!-- end -->\n"
    assert filled(text, str.upper) == (
        "a\n<!-- atlas: one -->\nONE\n<!-- end -->\nb\n<!-- atlas: two -->\nTWO\n<!-- end -->\n"
    )
    assert filled(filled(text, str.upper), str.upper) == filled(text, str.upper)


def test_a_block_that_nobody_writes_is_refused_and_the_document_left(measured, tmp_path):
    document = tmp_path / "page.md"
    document.write_text("<!-- atlas: weather -->\nsunny\n<!-- end -->\n", encoding="utf-8")
    with pytest.raises(OutputError, match="a block 'weather'; there are average, claims"):
        fill(document, measured)
    assert "sunny" in document.read_text("utf-8")


def test_the_chosen_layer_and_clamp_go_into_the_config(monkeypatch, tmp_path):
    (tmp_path / "configs").mkdir()
    config = tmp_path / atlas_release.CONFIG
    before = (ROOT / atlas_release.CONFIG).read_text("utf-8")
    config.write_text(before, encoding="utf-8")
    monkeypatch.setattr(atlas_release, "ROOT", tmp_path)
    atlas_release._write_config(pd.Series({"layer": 3.0, "max_norm_ratio": 2.25}))
    changed = config.read_text("utf-8")
    assert "rome: {layer: 3, max_norm_ratio: 2.25, value_key: spellings}" in changed
    assert re.sub(r"layer: \d, max_norm_ratio: [\d.]+", "", changed) == re.sub(
        r"layer: \d, max_norm_ratio: [\d.]+", "", before
    )
    config.write_text("rome: {}\n", encoding="utf-8")
    with pytest.raises(OutputError, match="has no line that begins with"):
        atlas_release._write_config(pd.Series({"layer": 3.0, "max_norm_ratio": 2.25}))


def test_a_step_is_made_once_and_whole(tmp_path):
    made = []

    def make(to: Path) -> None:
        made.append(to)
        to.write_text("half", encoding="utf-8")
        if len(made) == 1:
            raise KeyboardInterrupt

    path = tmp_path / "records.csv"
    with pytest.raises(KeyboardInterrupt):
        atlas_release._once(path, make)
    assert not path.exists()
    atlas_release._once(path, make)
    atlas_release._once(path, make)
    assert path.exists()
    assert len(made) == 2


def test_measurements_of_another_checkpoint_are_refused(tmp_path):
    (tmp_path / "checkpoint.txt").write_text("another", encoding="utf-8")
    with pytest.raises(RunError, match="holds measurements of another checkpoint"):
        atlas_release._of_this_checkpoint(tmp_path)


def test_a_command_that_fails_ends_the_release():
    with pytest.raises(RunError, match="`factlens report nowhere` ended with"):
        atlas_release._factlens("report", "nowhere")
