"""What a release measures is what it writes, wherever a document has a block for it."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from functools import partial
from pathlib import Path

import average_runs
import pandas as pd
import pytest
import tuning_rows
from typer.testing import CliRunner

from factlens import atlas_blocks, atlas_release
from factlens.atlas import CHECKPOINT
from factlens.atlas_blocks import BLOCK, BLOCKS, Measured, filled
from factlens.averages import average
from factlens.benchmarks import atlas_counterfact
from factlens.benchmarks.atlas_zsre import zsre
from factlens.errors import OutputError, RunError
from factlens.evaluation import evaluate, table
from factlens.fingerprints import fingerprint
from factlens.layer_sweeps import layer_sweep
from factlens.terminal import as_markdown

ROOT = Path(__file__).parents[1]
QUICKLY = {"moment": "identity", "steps": 4}
"""Settings of edits whose quality does not matter."""
DOCUMENTS = [ROOT / name for name in atlas_release.DOCUMENTS]


def invoke(*words: object):
    return CliRunner().invoke(atlas_release.app, [*map(str, words)])


def heads(text: str) -> list[str]:
    """The headers of all Markdown tables in a text."""
    lines = text.split("\n")
    return [
        line
        for line, rule in itertools.pairwise(lines)
        if rule.startswith("|--") and set(rule) <= set("|-:")
    ]


FINGERPRINT = atlas_release._fingerprint


@pytest.fixture(autouse=True, scope="module")
def marked():
    """The checkpoint's mark without loading it each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atlas_release, "_fingerprint", lambda: "this checkpoint")
        yield


def test_the_mark_is_the_fingerprint_of_the_bundled_model(atlas):
    assert FINGERPRINT() == fingerprint(atlas)


@pytest.fixture(scope="module")
def folder(atlas, tmp_path_factory):
    """What `measure` leaves, of few facts, records and studies."""
    from factlens import counterfact, rome
    from factlens.sweeps import sweep

    made = tmp_path_factory.mktemp("release")
    atlas_release._begin(made, atlas_release.NUMBERS)
    some = ["replace", "attribution patching"]
    traced = made / "paper/average"
    average(atlas, average_runs.facts(), out=traced, n=4, samples=1, part=2, variants=some)
    records = counterfact(atlas, only=["language"])
    frames = [
        evaluate(atlas, editor, records.test[:2], label=name, config=config)
        for name, editor, config in (
            ("none", None, None),
            ("C = identity", rome, QUICKLY),
            ("rome", rome, QUICKLY),
        )
    ]
    asked = zsre(only=["native_language"]).test[:2]
    for name, some in (("texts", records.test[:1]), ("zsre", asked)):
        written = [
            evaluate(
                *(atlas, editor, some),
                label=label,
                config=QUICKLY if editor else None,
                generations=20 if name == "texts" else None,
            )
            for label, editor in (("none", None), ("rome", rome))
        ]
        (made / "paper" / name).mkdir()
        pd.concat(written).to_parquet(made / f"paper/{name}/records.parquet")
    (made / "paper/figure-5").mkdir()
    by_layer = layer_sweep(
        atlas, records.test[:1], layers=range(4), tokens=["subject-last"], config=QUICKLY
    )
    by_layer.to_parquet(made / "paper/figure-5/records.parquet")
    (made / "paper/counterfact").mkdir()
    pd.concat(frames).to_parquet(made / "paper/counterfact/records.parquet")
    for name in ("edits", "layers", "clamps", "tuning"):
        (made / name).mkdir()
    (made / "edits/step.json").write_text('{"command": "evaluate --n 3", "seconds": 90}')
    (made / "tuning/step.json").write_text('{"command": "tune --n 3", "seconds": 90}')
    chosen = [
        tuning_rows.table("ft", [{"S": 50.0}, {"S": 60.0, "layer": 3, "learning_rate": 5e-05}]),
        tuning_rows.table("kn", [{"S": 20.0}, {"S": 10.0}]),
        tuning_rows.table("rome", [{"S": 80.0}, {"S": 90.0, "layer": 1, "max_norm_ratio": 2.33}]),
    ]
    pd.concat(chosen).to_csv(made / "tuning/tuning.csv", index=False)
    table(pd.concat(frames)).to_csv(made / "edits/table.csv", index=False)
    grid = {"layer": [0, 1], "max_norm_ratio": [1.5]}
    swept = sweep(atlas, rome, records.tune[:2], grid, config=QUICKLY)
    for name in ("layers", "clamps"):
        swept.to_csv(made / name / "sweep.csv", index=False)
    with pytest.MonkeyPatch.context() as patch:
        # Asking all facts takes half a minute.
        patch.setattr(atlas_counterfact, "counterfact", partial(counterfact, only=["language"]))
        atlas_release._count_records(made / "records.csv")
    shutil.copy(CHECKPOINT / "report.json", made)
    ends = {f"{name}{end}": 0.1 for name in ("state", "beyond") for end in ("", "_low", "_high")}
    kinds = pd.DataFrame([{"group": "people", "facts": 3, "layer": 2, **ends}])
    kinds.to_csv(made / "kinds.csv", index=False)
    return made


@pytest.fixture(scope="module")
def measured(folder):
    return Measured(folder)


@pytest.fixture
def checkout(monkeypatch, tmp_path):
    """A copy of what `write` writes to."""
    root = tmp_path / "checkout"
    written = (atlas_release.CONFIG, atlas_release.REPORT, atlas_release.CARD)
    for name in (*atlas_release.DOCUMENTS, *atlas_release.FIGURES, *written):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    config = root / atlas_release.CONFIG  # Of editors that are not tuned here it has no numbers.
    config.write_text(config.read_text("utf-8").partition("fine_tuning:")[0], "utf-8")
    monkeypatch.setattr(atlas_release, "ROOT", root)
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


# -- blocks ----------------------------------------------------------------------------------------


def test_every_block_of_the_documents_is_written_by_someone_and_every_writer_is_asked():
    found = {m["name"] for path in DOCUMENTS for m in BLOCK.finditer(path.read_text("utf-8"))}
    assert found == set(BLOCKS)


@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_has_the_form_that_its_document_has(measured, name):
    """The headers are those that stand there now, so that a release changes numbers and nothing else."""
    written = BLOCKS[name](measured)
    (there, *_) = [
        match["text"]
        for path in DOCUMENTS
        for match in BLOCK.finditer(path.read_text("utf-8"))
        if match["name"] == name
    ]
    if name == "average":
        numbers = re.compile(r" with \d+ workers|[\d.]+ ?")
        assert numbers.sub("", written) == numbers.sub("", there.strip())
    else:
        assert heads(written) == heads(there) != []
    assert not re.search(r"\bnan\b", written)


def test_what_stands_in_the_known_block_is_the_report_of_the_shipped_checkpoint(measured):
    text = (ROOT / "docs/atlas.md").read_text("utf-8")
    (there,) = [m["text"] for m in BLOCK.finditer(text) if m["name"] == "known"]
    assert atlas_blocks.known(measured) == there.strip()


def test_the_edits_block_says_what_the_table_says(measured):
    found = measured.table("edits/table.csv").set_index("editor")
    lines = atlas_blocks.edits(measured).split("\n")
    line = next(line for line in lines if line.startswith("| ROME |"))
    _, _, s, efficacy, *_ = (cell.strip() for cell in line.split("|"))
    assert s == f"{found.loc['rome', 'S']:.1f}"
    assert float(efficacy.split(" ")[0]) == pytest.approx(found.loc["rome", "ES"], abs=0.05)
    assert "(`factlens evaluate --n 3`, 1.5 minutes" in lines[0]


def test_the_tuning_block_says_what_was_taken_and_what_it_gained(measured):
    first, _, _, _, *lines = atlas_blocks.tuning(measured).split("\n")
    assert "(`factlens tune --n 3`, 1.5 minutes" in first
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [(row[0], row[1], row[2], row[-1]) for row in cells] == [
        ("FT", "layer 3, learning_rate 5e-05", "60.0 ±2.0", "50.0 ±2.0"),
        ("KN", "the default", "20.0 ±2.0", "20.0 ±2.0"),
        ("ROME", "layer 1, max_norm_ratio 2.33", "90.0 ±2.0", "80.0 ±2.0"),
    ]


def test_the_best_setting_of_a_sweep_stands_in_bold(measured):
    layer, clamp = atlas_release.chosen(measured.folder / "layers")
    lines = atlas_blocks.layers(measured).split("\n")
    assert [line for line in lines if "**" in line] == [
        line for line in lines if line.startswith(f"| **{layer}** | **{clamp:g}** |")
    ]


def test_only_what_is_in_a_block_is_replaced():
    text = "a\n<!-- atlas: claims -->\nold\nold\n<!-- end -->\nb\n<!-- atlas: known -->\n<!-- end -->\n"
    once = filled(text, str.upper)
    assert once == (
        "a\n<!-- atlas: claims -->\nCLAIMS\n<!-- end -->\nb\n<!-- atlas: known -->\nKNOWN\n<!-- end -->\n"
    )
    assert filled(once, str.upper) == once


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<!-- atlas: weather -->\nsunny\n<!-- end -->\n", "nobody writes a block 'weather'"),
        ("<!-- atlas: claims -->\nnever ends\n", "a block begins with"),
        ("<!-- atlas: claims -->\n<!-- atlas: known -->\n<!-- end -->\n", "a block begins with"),
        ("<!-- atlas: claims, known -->\n<!-- end -->\n", "a block begins with"),
    ],
)
def test_a_document_with_a_bad_block_is_refused(measured, tmp_path, text, why):
    (tmp_path / "page.md").write_text(text, encoding="utf-8")
    with pytest.raises(OutputError, match=why):
        atlas_blocks.with_blocks(tmp_path / "page.md", measured)


# -- measuring -------------------------------------------------------------------------------------


@pytest.fixture
def ran(monkeypatch):
    """The commands that a `measure` ran; each leaves the table that the real one leaves."""
    commands: list[list[str]] = []

    def run(words):
        said = [*map(str, words)]
        commands.append(said)
        out = Path(said[said.index("--out") + 1])
        out.mkdir(parents=True, exist_ok=True)
        rows = [{"layer": 1, "max_norm_ratio": 3.0, "S": 90.0, "retention": 50.0}]
        rows.append({"layer": 0, "max_norm_ratio": 1.5, "S": 80.0, "retention": 60.0})
        if said[0] == "tune":
            rows[0] |= {"editor": "rome", "taken": False}
            rows[1] |= {"editor": "rome", "taken": True}
        name = {"sweep": "sweep.csv", "tune": "tuning.csv"}.get(said[0], "table.csv")
        pd.DataFrame(rows * 2).to_csv(out / name, index=False)

    monkeypatch.setattr(atlas_release, "run_command", run)
    for name in ("_count_records", "_report"):
        monkeypatch.setattr(atlas_release, name, lambda to: to.write_text("\n"))
    monkeypatch.setattr(atlas_release, "_kinds", lambda to, averaged: to.write_text("\n"))
    return commands


def test_measuring_takes_what_was_chosen_on_and_changes_nothing_else(ran, checkout, tmp_path):
    before = contents(checkout)
    assert invoke("measure", "--quick", "--out", tmp_path / "out").exit_code == 0
    tuning, layers, clamps, edits, paper = ran
    assert tuning[:3] == ["tune", "--n", "1"]
    assert "--layer" not in layers
    assert clamps[:3] == ["sweep", "--layer", "1"]
    assert edits[:7] == ["evaluate", "--n", "4", "--layer", "0", "--clamp", "1.5"]
    assert paper[:2] == ["paper", "--quick"]
    assert contents(checkout) == before


def test_measuring_again_runs_what_is_not_finished(ran, tmp_path):
    invoke("measure", "--out", tmp_path)
    done = len(ran)
    pd.read_csv(tmp_path / "edits/table.csv").head(2).to_csv(tmp_path / "edits/table.csv")
    invoke("measure", "--out", tmp_path)
    # `paper` goes on by itself.
    assert [words[0] for words in ran[done:]] == ["evaluate", "paper"]


def test_a_look_is_not_taken_for_the_whole(ran, tmp_path):
    invoke("measure", "--quick", "--out", tmp_path)
    done = invoke("measure", "--out", tmp_path)
    assert done.exit_code == 2
    assert "measurements of another tuning, layers, clamps, edits" in done.stderr
    assert len(ran) == 5
    done = invoke("write", "--out", tmp_path)
    assert done.exit_code == 2
    assert "holds a look at few records" in done.stderr


def test_measurements_of_another_checkpoint_are_refused(folder, checkout, tmp_path):
    plan = json.loads((folder / "plan.json").read_text("utf-8")) | {"checkpoint": "another"}
    (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    for command in (["measure"], ["write"]):
        done = invoke(*command, "--out", tmp_path)
        assert done.exit_code == 2
        assert "measurements of another checkpoint" in done.stderr


def test_a_command_that_fails_ends_the_release():
    with pytest.raises(RunError, match="`factlens report nowhere` ended with"):
        atlas_release.run_command(["report", "nowhere"])


# -- writing ---------------------------------------------------------------------------------------


@pytest.fixture
def no_images(monkeypatch):
    """Figures as empty files: drawing them needs a browser."""
    monkeypatch.setattr(
        "factlens.images.save", lambda figure, path: (path.write_bytes(b""), path)[1]
    )


def test_everything_is_written(folder, checkout, no_images):
    done = invoke("write", "--out", folder)
    assert done.exit_code == 0, done.output
    config = (checkout / atlas_release.CONFIG).read_text("utf-8")
    assert "rome: {layer: 1, max_norm_ratio: 2.33, value_key: spellings}\n" in config
    assert "\n  ft: {layer: 3, learning_rate: 0.00005}\n" in config
    assert "\nknowledge_neurons: {threshold: 0.2, erase: 2, write: 1}\n" in config
    assert "\nrome_source: chosen by factlens tune, " in config
    table = (checkout / atlas_release.TUNING).read_bytes()
    assert table == (folder / atlas_release.TUNED).read_bytes()
    readme = (checkout / "README.md").read_text("utf-8")
    assert "(`factlens evaluate --n 3`, 1.5 minutes" in readme
    outside = [BLOCK.sub("", text) for text in (readme, (ROOT / "README.md").read_text("utf-8"))]
    assert outside[0] == outside[1]
    assert (checkout / atlas_release.FIGURES[0]).read_bytes() == b""


def test_a_write_that_fails_leaves_everything_as_it_was(folder, checkout, monkeypatch):
    def no_browser(figure, path):
        raise OutputError("no browser")

    monkeypatch.setattr("factlens.images.save", no_browser)
    before = contents(checkout)
    assert invoke("write", "--out", folder).exit_code == 2
    assert contents(checkout) == before


@pytest.mark.parametrize(
    "missing",
    [
        "plan.json",
        "tuning/tuning.csv",
        "edits/table.csv",
        "clamps/sweep.csv",
        "report.json",
        "paper/average",
        "paper/zsre",
    ],
)
def test_what_was_not_measured_is_not_written(folder, checkout, tmp_path, missing):
    part = tmp_path / "part"
    shutil.copytree(folder, part)
    shutil.rmtree(part / missing) if (part / missing).is_dir() else (part / missing).unlink()
    before = contents(checkout)
    done = invoke("write", "--out", part)
    assert done.exit_code == 2
    assert len(done.stderr.strip().split("\n")) == 1
    assert contents(checkout) == before


# -- tables ----------------------------------------------------------------------------------------


def test_a_markdown_table_has_numbers_to_the_right_and_escapes_the_rest():
    table = pd.DataFrame(
        {
            "a|b": ["x|y", "two\nlines"],
            "n": [1.5, float("nan")],
            "±": ["**3** ±1", "36 878"],
            "none": [None, ""],
            "words": ["3 of 4", "-"],
        }
    )
    assert as_markdown(table).split("\n") == [
        "| a\\|b | n | ± | none | words |",
        "|---|---:|---:|---|---|",
        "| x\\|y | 1.5 | **3** ±1 | | 3 of 4 |",
        "| two lines | | 36 878 | | - |",
    ]
    assert as_markdown(table.head(0)).split("\n")[1] == "|---|---|---|---|---|"
