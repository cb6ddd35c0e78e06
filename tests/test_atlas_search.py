"""Trainings side by side: run, interrupted, collected, shown."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from factlens import atlas_measures, atlas_search
from factlens.atlas.optimizers import new_optimizers
from factlens.atlas.recipes import Cycle, Recipe, as_json
from factlens.atlas.sentences import Diet
from factlens.atlas.training import Progress, new_model, train, train_tokenizer
from factlens.atlas.variants import Variant
from factlens.atlas_results import figure, read_results, shown, table, write_results
from factlens.errors import ConfigError, OutputError

TINY = Recipe(
    layers=1,
    heads=1,
    d_model=16,
    context=16,
    vocabulary=300,
    tokenizer_documents=50,
    object_repeats=0,
    cycles=(Cycle(steps=4, learning_rate=2e-3, captions=0.75),),
    captions_first=1,
    rows=2,
    warmup=1,
    save_every=2,
    optimizer="muon",
    precision="bfloat16",
)


class Killed(Exception):
    """What a killed training meets."""


@pytest.fixture
def tiny(monkeypatch):
    """Two variants that train in a moment, and no measuring."""
    every = {name: Variant(name, "", TINY) for name in ("small", "other")}
    monkeypatch.setattr(atlas_search, "variants", lambda: every)
    found = {key: RESULT[key] for key in ("known", "site", "rome")}
    monkeypatch.setattr(atlas_measures, "measured", lambda folder, recipe: found)
    return every


def invoke(*arguments):
    return CliRunner().invoke(atlas_search.app, [str(each) for each in arguments])


# --- the optimizers ---------------------------------------------------------------------------


def test_muon_takes_the_matrices_inside_the_blocks_and_adamw_everything_else():
    model = new_model(TINY, train_tokenizer(TINY))
    (adamw, _), (muon, _) = new_optimizers(TINY, model).parts
    names = {id(weight): name for name, weight in model.named_parameters()}
    taken = [names[id(w)] for group in muon.param_groups for w in group["params"]]
    left = [names[id(w)] for group in adamw.param_groups for w in group["params"]]
    assert sorted(taken) == [
        "transformer.h.0.attn.c_attn.weight",
        "transformer.h.0.attn.c_proj.weight",
        "transformer.h.0.mlp.c_fc.weight",
        "transformer.h.0.mlp.c_proj.weight",
    ]
    assert sorted(taken + left) == sorted(names.values())


def test_a_training_with_muon_that_was_killed_ends_at_the_very_same_weights(tmp_path):
    torch.set_num_threads(1)

    def kill(progress: Progress) -> None:
        if progress.step == 3:
            raise Killed

    whole = train(TINY, tmp_path / "whole").model.state_dict()
    with pytest.raises(Killed):
        train(TINY, tmp_path / "killed", on_step=kill)
    resumed = train(TINY, tmp_path / "killed").model.state_dict()
    other = train(replace(TINY, seed=1), tmp_path / "other").model.state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not all(torch.equal(whole[name], other[name]) for name in whole)


# --- the command ------------------------------------------------------------------------------


def test_one_training_writes_its_result(tiny, tmp_path):
    assert invoke("one", "small", "--seed", 3, "--out", tmp_path).exit_code == 0
    (result,) = read_results(tmp_path / "small-seed-3" / "result.json")
    assert (result["variant"], result["seed"], result["steps"]) == ("small", 3, 4)
    assert result["tokens"] == 4 * 2 * 16
    assert (tmp_path / "small-seed-3" / "model.safetensors").is_file()


def test_what_is_finished_is_not_run_again_and_what_failed_is_said(tiny, tmp_path, monkeypatch):
    ran = []

    def pretend(out, plan, threads, at_work):
        ran.append(plan[0])
        return (0 if plan[0] == "small" else 1), tmp_path / "log.txt"

    monkeypatch.setattr(atlas_search, "_in_process", pretend)
    (tmp_path / "small-seed-0").mkdir()
    written = {**RESULT, "text": atlas_search.text_digest(TINY), "recipe": as_json(TINY)}
    write_results(tmp_path / "small-seed-0" / "result.json", [written])
    done = invoke("run", "--out", tmp_path)
    assert ran == ["other"]
    assert done.exit_code == 1
    assert "other-seed-0 failed, see" in done.stderr


@pytest.mark.parametrize("what", ["text", "recipe"])
def test_a_training_of_something_else_is_not_taken_for_this_one(tiny, tmp_path, what):
    (tmp_path / "small-seed-0").mkdir()
    same = {"text": atlas_search.text_digest(TINY), "recipe": as_json(TINY)}
    other = {"text": "another", "recipe": as_json(replace(TINY, warmup=2))}
    written = {**RESULT, **same, what: other[what]}
    write_results(tmp_path / "small-seed-0" / "result.json", [written])
    done = invoke("run", "--only", "small", "--out", tmp_path)
    assert done.exit_code == 2
    assert f"holds a training of another {what}" in done.stderr


def test_an_interruption_begins_no_further_training(tiny, tmp_path, monkeypatch):
    begun = []

    def interrupted(out, plan, threads, at_work):
        begun.append(plan)
        raise KeyboardInterrupt

    monkeypatch.setattr(atlas_search, "_in_process", interrupted)
    seeds = [part for seed in range(9) for part in ("--seed", seed)]
    done = invoke("run", "--at-once", 1, *seeds, "--out", tmp_path)
    assert done.exit_code == 130
    assert len(begun) < 9


def test_a_folder_of_another_recipe_is_one_line(tiny, tmp_path, monkeypatch):
    assert invoke("one", "small", "--out", tmp_path).exit_code == 0
    longer = Variant("small", "", replace(TINY, warmup=2))
    monkeypatch.setattr(atlas_search, "variants", lambda: {"small": longer})
    done = invoke("one", "small", "--out", tmp_path)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "was made by another recipe" in done.stderr


def test_more_documents_than_all_are_refused():
    with pytest.raises(ConfigError, match=r"come to 1\.24 of the documents"):
        replace(TINY, diet=Diet(biographies=0.05, reversed=0.3))


def test_a_place_that_cannot_be_written_is_one_line(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    done = invoke("run", "--only", "small", "--out", tmp_path / "file")
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    (tmp_path / "small-seed-0").write_text("")
    done = invoke("run", "--only", "small", "--out", tmp_path)
    assert done.exit_code == 2
    assert done.stderr.strip() == f"factlens: cannot write {tmp_path}/small-seed-0: File exists"


def test_a_training_in_a_process_of_its_own_leaves_its_error_in_a_log(tmp_path):
    code, log = atlas_search._in_process(tmp_path, ("no such variant", 0, None), 1, [])
    assert code == 2
    assert "no variant 'no such variant'; there are baseline, no-landmarks" in log.read_text()


def test_an_unknown_variant_is_one_line(tiny, tmp_path):
    done = invoke("run", "--only", "large", "--out", tmp_path)
    assert done.exit_code == 2
    assert done.stderr.strip() == "factlens: no variant 'large'; there are small, other"


def test_collecting_keeps_one_result_of_each_training(tiny, tmp_path):
    to = tmp_path / "results.jsonl"
    for seed in (0, 1):
        assert invoke("one", "small", "--seed", seed, "--out", tmp_path).exit_code == 0
    for _ in range(2):
        assert invoke("collect", "--out", tmp_path, "--to", to).exit_code == 0
    assert [row["seed"] for row in read_results(to)] == [0, 1]


# --- results ----------------------------------------------------------------------------------


def layers(*means: float) -> list[list[float]]:
    return [[mean, mean - 0.01, mean + 0.01] for mean in means]


RESULT = {
    "variant": "small",
    "seed": 2,
    "steps": 10,
    "text": "a digest",
    "tokens": 2_500_000,
    "minutes": 9.6,
    "known": {"train": 0.75, "held": 0.5},
    "gains": [0.125, 0.5, 0.75],
    "site": {
        "ate": [0.6, 0.5, 0.7],
        "embedding": [0.1, 0.09, 0.11],
        "state": layers(0.2, 0.4, 0.0),
        "beyond_at_peak": [0.3, 0.2, 0.35],
        "mlp": layers(0.1, 0.25, 0.0),
        "attention": layers(0.05, 0.0, -0.1),
        "mlps_severed": layers(0.1, 0.1, 0.0),
        "attention_severed": layers(0.2, 0.38, 0.0),
        "late_attention": layers(0.0, 0.1, 0.45),
        "groups": {"open after the last token": {"beyond_at_peak": [0.33, 0.2, 0.4]}},
    },
    "rome": [
        {"layer": 0, "S": 90.0, "retention": 20.0},
        {"layer": 1, "S": 95.0, "retention": 70.0},
    ],
}


def test_the_table_reads_each_number_where_it_should():
    (row,) = table([RESULT]).to_dict("records")
    wanted = {
        "gain": 0.125,
        "site": 0.4,
        "layer": 1,
        "embedding": 0.1,
        "beyond": 0.3,
        "open": 0.33,
        "mlp": 0.25,
        "attention": 0.05,
        "mlp_cut": 0.75,
        "attention_cut": 0.05,
        "late": 0.45,
        "S": 95.0,
        "edit_layer": 1,
        "retention": 70.0,
        "tokens": 2.5,
    }
    assert {name: row[name] for name in wanted} == pytest.approx(wanted)


def test_a_training_without_facts_that_are_open_has_no_such_number():
    without = {**RESULT, "site": {**RESULT["site"], "groups": {}}}
    assert table([without])["open"].isna().all()
    assert list(shown(table([without]))["not settled by the last token"]) == [""]


def test_a_training_whose_gains_were_not_measured_has_none():
    without = {name: value for name, value in RESULT.items() if name != "gains"}
    assert list(shown(table([without]))["gain"]) == [""]


def test_missing_scores_are_no_obstacle():
    nothing = [{"layer": 0, "S": None, "retention": None}, {"layer": 1, "S": 5, "retention": None}]
    (row,) = table([{**RESULT, "rome": nothing}]).to_dict("records")
    assert (row["S"], row["edit_layer"]) == (5, 1)
    assert len(shown(table([{**RESULT, "rome": nothing}]))) == 1


def test_open_facts_that_were_traced_by_themselves_count_before_their_group():
    traced = {**RESULT, "open": {"beyond_at_peak": [0.21, 0.2, 0.22]}}
    assert list(table([RESULT, traced])["open"]) == [0.33, 0.21]


def test_a_training_that_knows_too_little_is_left_out_of_table_and_figure():
    assert len(table([RESULT, {**RESULT, "site": None}])) == 1
    assert len(figure([RESULT, {**RESULT, "site": None}]).data) == 4


def test_readers_see_the_interval_and_the_layers():
    (row,) = shown(table([RESULT])).to_dict("records")
    assert row["beyond emb (95 %)"] == "+0.300 (+0.200 to +0.350)"
    assert row["state (layer)"] == "0.400 (L1)"
    assert row["severed MLP / attention takes"] == "75% / 5%"


def test_the_figure_has_a_panel_for_each_training_and_escapes_its_name():
    drawn = figure([RESULT, {**RESULT, "variant": "<b>other"}])
    assert len(drawn.data) == 8
    assert [note.text for note in drawn.layout.annotations] == [
        "small, 2, 2.5 M",
        "&lt;b&gt;other, 2, 2.5 M",
    ]
    assert list(drawn.data[0].y) == [0.2, 0.4, 0.0]


def test_show_prints_the_table_and_saves_the_figure(tmp_path):
    write_results(tmp_path / "results.jsonl", [RESULT])
    done = invoke("show", tmp_path / "results.jsonl", "--figure", tmp_path / "search.html")
    assert done.exit_code == 0
    assert "| small | 2 | 2.5 | 10 | 75% / 50% |" in done.stdout
    assert (tmp_path / "search.html").is_file()


def test_of_two_results_of_one_training_the_later_counts(tmp_path):
    write_results(tmp_path / "results.jsonl", [RESULT, {**RESULT, "minutes": 1.0}])
    assert [row["minutes"] for row in read_results(tmp_path / "results.jsonl")] == [1.0]


def test_a_damaged_file_of_results_is_one_line(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(RESULT) + "\n{half\n", encoding="utf-8")
    with pytest.raises(OutputError, match=r"results\.jsonl, line 2: not JSON"):
        list(read_results(path))
    path.write_text("{}\n", encoding="utf-8")
    with pytest.raises(OutputError, match="no result, it has no variant, seed"):
        list(read_results(path))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(OutputError, match="not UTF-8"):
        list(read_results(path))
    done = invoke("show", tmp_path / "nothing.jsonl")
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
