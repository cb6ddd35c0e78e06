"""A run of many facts: killed, damaged, spread over workers, it ends with the same rows; and it says what it left out."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import average_runs
import numpy as np
import pytest

import factlens
from factlens import Fact, trace
from factlens.averages import average, read_run
from factlens.errors import FactError, OutputError, PlanError, RunError, WorkersError
from factlens.executors import InProcess, ModelSource, OnRay
from factlens.facts import bundled_facts
from factlens.studies import Chunk, Study, chosen, do_chunk, studies

HERE = Path(__file__).parent
PARTS = 20
"""Of `average_runs`: 20 facts in two studies, two at a time."""


@pytest.fixture(scope="module")
def whole(atlas, tmp_path_factory):
    """A run that nothing interrupted."""
    return average_runs.run(InProcess(atlas), tmp_path_factory.mktemp("whole") / "run")


def assert_same_rows(run, other):
    for name, one in run.traces.items():
        assert one.facts == other.traces[name].facts
        pairs = one.frame, other.traces[name].frame
        places = ["fact", "kind", "window", "severed", "layer", "position", "token", "role"]
        assert pairs[0][places].equals(pairs[1][places])
        for column in ("prob_clean", "prob_corrupted", "prob_restored"):
            np.testing.assert_allclose(pairs[0][column], pairs[1][column], atol=1e-6)


def test_a_run_holds_its_facts_in_order_and_equals_tracing_them(atlas, whole):
    known = whole.knowledge[whole.knowledge["chosen"] >= 0].sort_values("chosen")
    assert [fact.prompt for fact in whole.main.facts] == known["prompt"].tolist()
    assert len(whole.main) == 20
    assert list(whole.traces) == ["main", "severed"]
    facts = [whole.main.facts[3], whole.main.facts[11]]
    again = trace(atlas, facts, samples=2, seed=1, metric=("prob", "logprob"))
    for place, number in enumerate((3, 11)):
        np.testing.assert_allclose(
            again.select(place).frame["effect"],
            whole.main.select(number).frame["effect"],
            atol=1e-6,
        )
    severed = whole.traces["severed"].frame
    assert set(severed["severed"]) == {"mlp", "attn"}
    assert set(severed["role"]) == {"last subject"}


# -- killed ------------------------------------------------------------------------------------------


def go_on(executor, out, fatal_write=None):
    """One process at the run; with `fatal_write` it kills itself inside that write, half the bytes on the disk."""
    if fatal_write is not None:
        writes = []

        def half_a_file(table, path, *more, **options):
            writes.append(path)
            written(table, path, *more, **options)
            if len(writes) == fatal_write:
                content = Path(path).read_bytes()
                Path(path).write_bytes(content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)

        import factlens.traces as traces

        written = traces.pq.write_table
        traces.pq.write_table = half_a_file
    average_runs.run(executor, out)
    os._exit(0)


def hashes(out):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.glob("parts/*.parquet"))
    }


def half_written(out):
    return {(path.name, path.stat().st_mtime_ns) for path in out.glob("parts/.*.partial")}


@pytest.mark.slow
def test_killed_ten_times_it_ends_with_the_same_rows_and_untouched_parts(atlas, whole, tmp_path):
    """Seven kills at moments drawn over the whole run, three inside a write. Forked, so the model is loaded once."""
    draw, out, context = random.Random(4), tmp_path / "run", multiprocessing.get_context("fork")
    # Short of the end by what a part and a short wait take: a process that is done cannot be killed.
    moments = sorted(draw.uniform(0, PARTS - 2) for _ in range(7))
    plan = [("moment", at) for at in moments]
    for place in (2, 5, 8):
        plan.insert(place, ("write", draw.choice((1, 2))))
    before = {}
    for how, at in plan:
        old = half_written(out)
        arguments = (InProcess(atlas), out, at if how == "write" else None)
        process = context.Process(target=go_on, args=arguments)
        process.start()
        if how == "moment":
            while process.is_alive() and len(hashes(out)) < int(at):
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.05))
            process.kill()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, f"the run ended before it was killed at {at}"
        if how == "write":
            assert half_written(out) - old, "the kill did not come inside a write"
        now = hashes(out)
        assert before.items() <= now.items(), "a finished part was lost or changed"
        before = now
    assert half_written(out) == set(), "what was half written is done"
    assert 0 < len(before) < PARTS
    resumed = average_runs.run(InProcess(atlas), out)
    assert before.items() <= hashes(out).items()
    assert_same_rows(resumed, whole)


@pytest.mark.slow
def test_a_part_damaged_on_the_disk_is_done_again(atlas, whole, tmp_path):
    out = tmp_path / "run"
    average_runs.run(InProcess(atlas), out)
    (out / "frame.parquet").unlink()
    part = out / "parts" / "part-00004.parquet"
    part.write_bytes(part.read_bytes()[:-7])
    assert_same_rows(average_runs.run(InProcess(atlas), out), whole)
    assert part.with_suffix(".damaged").exists()


@pytest.mark.slow
def test_ray_workers_give_the_same_rows_though_one_is_killed(whole, tmp_path):
    pytest.importorskip("ray")
    environment = {
        **os.environ,
        "PYTHONPATH": f"{Path(factlens.__file__).parents[1]}{os.pathsep}{HERE}",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, HERE / "average_runs.py", tmp_path / "run", "2", "kill"]
    done = subprocess.run(
        [*map(str, command)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "worker replaced"
    assert_same_rows(read_run(tmp_path / "run"), whole)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_in_one_line_and_keeps_what_is_done(
    atlas, whole, tmp_path, monkeypatch
):
    import factlens.traces as traces

    out, written = tmp_path / "run", traces.pq.write_table

    def full(table, path, *more, **options):
        if len(hashes(out)) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written(table, path, *more, **options)

    monkeypatch.setattr(traces.pq, "write_table", full)
    with pytest.raises(OutputError, match="No space left on device"):
        average_runs.run(InProcess(atlas), out)
    kept = hashes(out)
    assert len(kept) == 5
    with pytest.raises(RunError, match="not finished"):
        read_run(out)
    monkeypatch.setattr(traces.pq, "write_table", written)
    assert_same_rows(average_runs.run(InProcess(atlas), out), whole)
    assert kept.items() <= hashes(out).items()


# -- what it refuses and leaves out ------------------------------------------------------------------


def test_when_no_fact_is_known_it_says_so(atlas, tmp_path):
    facts = [Fact("The capital of France is", "France", "Lima")] * 3
    with pytest.raises(
        FactError, match=r"knows none of the 1 facts \(\{'object not ranked first': 1"
    ):
        average(atlas, facts, out=tmp_path)
    with pytest.raises(FactError, match="no facts"):
        average(atlas, [], out=tmp_path)


def test_settings_that_do_not_exist_are_refused_before_anything_is_written(atlas, tmp_path):
    facts = bundled_facts("held")[:4]
    for wrong, message in (
        ({"variants": "colour"}, "no study 'colour'; there are all, none, main"),
        ({"n": 0}, "from 1 up, not 0"),
        ({"known": "vaguely"}, "no rule 'vaguely'"),
        ({"noise_level": "loud"}, "a multiple such as"),
    ):
        with pytest.raises(PlanError, match=message):
            average(atlas, facts, out=tmp_path / "none", **wrong)
        assert not (tmp_path / "none" / "run.yaml").exists()


def test_another_seed_in_the_same_folder_is_refused(atlas, whole):
    with pytest.raises(RunError, match=r"trace\.seed was 1, now 2"):
        average(
            atlas, average_runs.facts(), out=whole.folder, **{**average_runs.OPTIONS, "seed": 2}
        )


def test_studies_that_find_no_other_name_are_kept_with_their_reasons(atlas):
    name = "Xyzzy Quux Plugh Wibble Wobble Zork Frobozz Grue Gnusto Rezrov Yomin"
    fact = Fact(f"{name} was born in", name)
    found = do_chunk(
        atlas, Chunk(Study(name="swap", about="", options={"noise": "swap"}), (7,), (fact,), {})
    )
    assert len(found) == 0
    assert "no bundled subject has" in found.skipped[0][1]


def test_every_study_runs_and_is_one_call_of_trace(atlas):
    facts = tuple(trace_facts())
    base = {"window": 3, "noise_level": 0.28, "samples": 2}
    for study in studies(window=3, depth=8, base=base).values():
        found = do_chunk(atlas, Chunk(study, (0, 1), facts, base))
        assert len(found) == 2, study.name
        assert found.info["numbers"] == [0, 1]
        if study.method == "trace":
            again = trace(atlas, facts, **{**base, **study.options})
            assert again.frame.equals(found.frame), study.name
        else:
            assert found.frame["attribution"].abs().max() > 0.01


def trace_facts():
    return [
        Fact("The capital of France is", "France", "Paris", "capital"),
        Fact("The capital of Italy is", "Italy", "Rome", "capital"),
    ]


def test_studies_are_chosen_by_name():
    every = studies(window=10, depth=48, base={})
    assert [s.name for s in chosen("none", every)] == ["main", "severed"]
    assert [s.name for s in chosen(["swap"], every)] == ["main", "severed", "swap"]
    assert len(chosen("all", every)) == len(every)
    assert every["widths"].options["window"] == [1, 3, 5]
    assert every["half the noise"].options["noise_level"] == "0.5x"
    assert "widths" not in studies(window=1, depth=1, base={})


# -- executors ---------------------------------------------------------------------------------------


def test_results_come_with_the_number_of_their_item(atlas):
    found = list(InProcess(atlas).map(lambda model, item: item * model.cfg.n_layers, [1, 2]))
    assert found == [(0, 8), (1, 16)]


def test_workers_that_cannot_be_had_are_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(WorkersError, match="pip install"):
        OnRay(ModelSource(), 2)
    with pytest.raises(WorkersError, match="at least one"):
        OnRay(ModelSource(), 0)


def test_more_workers_than_there_is_room_for_are_refused_not_waited_for(monkeypatch):
    class NoRay:
        @staticmethod
        def is_initialized():
            return True

        @staticmethod
        def cluster_resources():
            return {"CPU": 8.0, "GPU": 1.0}

    monkeypatch.setattr("factlens.executors._ray", lambda: NoRay)
    with pytest.raises(WorkersError, match="4 workers need a GPU each and Ray has 1"):
        OnRay(ModelSource(), 4)
    with pytest.raises(WorkersError, match="9 workers need a CPU each and Ray has 8"):
        OnRay(ModelSource(device="cpu"), 9)
    with pytest.raises(WorkersError, match="one device of its own"):
        OnRay(ModelSource(device="cuda:1"), 2)


# -- files that were touched ---------------------------------------------------------------------------


@pytest.mark.slow
def test_parts_of_other_facts_and_damaged_frames_are_not_trusted(atlas, whole, tmp_path):
    out = tmp_path / "run"
    average_runs.run(InProcess(atlas), out)
    parts = sorted(out.glob("parts/*.parquet"))
    parts[0].write_bytes(parts[1].read_bytes())  # A whole part, of other facts.
    parts[12].write_bytes(parts[2].read_bytes())  # Of another study.
    (out / "severed.parquet").write_bytes(b"PAR1")
    assert_same_rows(average_runs.run(InProcess(atlas), out), whole)
    frame = out / "frame.parquet"
    frame.write_bytes(frame.read_bytes()[:100])
    assert_same_rows(average_runs.run(InProcess(atlas), out), whole)
    again = read_run(out)
    assert [session["workers"] for session in again.sessions] == [1, 1, 1]
    assert again.spread == ""
    two = [{**session, "workers": 2} for session in again.sessions]
    assert replace(again, sessions=two).spread == " with 2 workers"
    assert replace(again, sessions=[*two, *again.sessions]).spread == ""
    (out / "facts.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunError, match="remove it, and the facts are asked again"):
        average_runs.run(InProcess(atlas), out)


def test_a_worker_with_another_model_is_refused(atlas, tmp_path):
    class Mixed(InProcess):
        def map(self, work, items):
            for number, found in super().map(work, items):
                found.info["fingerprint"] = "0" * 64
                yield number, found

    with pytest.raises(RunError, match="a worker loaded another model"):
        average(Mixed(atlas), trace_facts(), out=tmp_path, samples=1, variants="none")
    assert list(tmp_path.glob("parts/*.parquet")) == []


def test_a_run_of_one_fact_ends_in_a_page(atlas, tmp_path):
    run = average(atlas, trace_facts(), out=tmp_path, n=1, samples=1, variants="none")
    summary = factlens.Summary(run)
    assert set(summary.claims["verdict"]) == {"not testable here"}
    assert "not testable here" in factlens.reports.run_page(summary)


def test_a_run_that_corrupts_as_a_study_does_leaves_that_study_out():
    assert "swap" not in studies(window=3, depth=8, base={"noise": "swap"})
    assert "half the noise" not in studies(window=3, depth=8, base={"noise": "swap"})
    assert "half the noise" in studies(window=3, depth=8, base={"noise": "uniform"})
    assert "uniform" not in studies(window=3, depth=8, base={"noise": "uniform"})
