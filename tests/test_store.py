"""A run directory: begun, gone on with, refused, locked; parts whole or not there."""

from __future__ import annotations

import multiprocessing

import pandas as pd
import pytest

from factlens.errors import OutputError, RunError
from factlens.facts import Fact
from factlens.store import existing_store, locked, open_store
from factlens.traces import Trace

CONFIG = {"model": {"fingerprint": "abc"}, "draw": {"n": 10}, "studies": ("main",)}


def small_trace(number: int) -> Trace:
    frame = pd.DataFrame({"fact": [0], "kind": ["state"], "effect": [0.5 + number]})
    return Trace(frame, (Fact("a b", "a"),), ("c",), ((0, 1),), (2,), {"seconds": 1.0})


def test_the_same_configuration_goes_on_and_another_is_refused_with_what_differs(tmp_path):
    store = open_store(tmp_path / "run", CONFIG, {"versions": {"torch": "1"}})
    store.write(3, small_trace(3))
    again = open_store(tmp_path / "run", CONFIG, {"versions": {"torch": "2"}})
    assert again.read(3).frame["effect"].tolist() == [3.5]
    assert again.config()["about"] == {"versions": {"torch": "1"}}
    with pytest.raises(RunError, match=r"draw\.n was 10, now 11.*--out"):
        open_store(tmp_path / "run", {**CONFIG, "draw": {"n": 11}}, {})
    with pytest.raises(RunError, match=r"extra was None, now 1"):
        open_store(tmp_path / "run", {**CONFIG, "extra": 1}, {})


def test_a_part_that_is_not_there_is_none_and_a_damaged_one_is_set_aside(tmp_path):
    store = open_store(tmp_path, CONFIG, {})
    assert store.read(0) is None
    store.write(0, small_trace(0))
    whole = store.part(0).read_bytes()
    for suffix, damaged in (
        (".damaged", whole[: len(whole) // 2]),
        (".damaged1", b""),
        (".damaged2", b"PAR1 nonsense PAR1"),
    ):
        store.part(0).write_bytes(damaged)
        assert store.read(0) is None
        assert not store.part(0).exists()
        assert store.part(0).with_suffix(suffix).read_bytes() == damaged
    store.write(0, small_trace(0))
    assert store.read(0) is not None


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="there is no run in"):
        existing_store(tmp_path)
    (tmp_path / "run.yaml").write_text("a: [")
    with pytest.raises(RunError, match="cannot read"):
        existing_store(tmp_path)
    (tmp_path / "run.yaml").write_text("format: other/7")
    with pytest.raises(RunError, match="no run of this version"):
        existing_store(tmp_path)
    (tmp_path / "other" / "parts").mkdir(parents=True)
    with pytest.raises(RunError, match=r"holds parts but no run\.yaml"):
        open_store(tmp_path / "other", CONFIG, {})
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot"):
        open_store(tmp_path / "file" / "run", CONFIG, {})


def hold(folder, held, done):
    with locked(folder):
        held.set()
        done.wait(20)


def test_a_second_process_is_told_and_a_killed_one_leaves_no_lock(tmp_path):
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, held, done))
    other.start()
    assert held.wait(20)
    with pytest.raises(RunError, match="another process is at work"), locked(tmp_path):
        pass
    other.kill()
    other.join()
    with locked(tmp_path):
        pass


def test_every_session_is_noted(tmp_path):
    store = open_store(tmp_path, CONFIG, {})
    store.add_session(1.24, {"device": "cpu"})
    store.add_session(2.0, {"device": "cuda"})
    sessions = store.config()["sessions"]
    assert [(each["seconds"], each["device"]) for each in sessions] == [(1.2, "cpu"), (2.0, "cuda")]


def test_a_run_that_was_stopped_before_it_had_anything_may_begin_anew(tmp_path):
    open_store(tmp_path, CONFIG, {})
    changed = {**CONFIG, "draw": {"n": 11}}
    assert open_store(tmp_path, changed, {}).config()["config"]["draw"] == {"n": 11}


def test_what_cannot_be_opened_is_not_taken_for_damaged(tmp_path):
    store = open_store(tmp_path, CONFIG, {})
    store.part(0).mkdir()
    with pytest.raises(RunError, match="cannot read"):
        store.read(0)


def test_of_many_differences_the_first_are_named(tmp_path):
    many = {f"layer {number}": number for number in range(9)}
    store = open_store(tmp_path, many, {})
    store.part(0).write_bytes(b"something")
    other = {name: number + 1 for name, number in many.items()}
    with pytest.raises(RunError, match=r"layer 2 was 2, now 3; and 6 more\. Use another") as caught:
        open_store(tmp_path, other, {})
    assert "layer 3" not in str(caught.value)
