"""Whatever goes wrong with one record, one worker or the machine: the others are evaluated, and nothing finished is lost."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import evaluation_workers
import pandas as pd
import pytest
from evaluation_workers import RECORDS, nudge, record
from typer.testing import CliRunner

import factlens
from factlens import load_model, row_files
from factlens.benchmarks import counterfact, zsre
from factlens.benchmarks.counterfact import write_records
from factlens.benchmarks.draws import is_tuned
from factlens.benchmarks.record_files import Unusable
from factlens.cli import app
from factlens.counterfact_scores import SCORES
from factlens.editors import fine_tuning
from factlens.errors import FactFileError, OutputError, WorkersError
from factlens.evaluation import evaluate, table
from factlens.evaluation_runs import RECORDS as ROWS
from factlens.evaluation_runs import TABLE, Contestant, evaluate_run
from factlens.executors import ATTEMPTS, InProcess, OnRay

HERE = Path(__file__).parent
TESTED = [each for each in RECORDS if not is_tuned(each.subject)]


@pytest.fixture(scope="module")
def folder(family_folder) -> Path:
    return family_folder("gpt2")


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> pd.DataFrame:
    """The rows of a run that nothing stopped."""
    return evaluation_workers.run(model, tmp_path_factory.mktemp("whole"))


def hashes(out: Path) -> dict[str, str]:
    """The finished parts."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.glob("parts/*.parquet"))
    }


def rows_of(out: Path) -> pd.DataFrame:
    return pd.read_parquet(out / ROWS)


def command(*arguments: object):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


# -- one record ------------------------------------------------------------------------------------


def without(row: dict, *way: str) -> dict:
    """The row without the value at the end of the way."""
    changed = json.loads(json.dumps(row))
    place = changed
    for step in way[:-1]:
        place = place[step]
    del place[way[-1]]
    return changed


def malformed() -> list[tuple[object, int, str]]:
    """Rows of which no record can be made, the number that each has in the frame, and its reason."""
    row = {**TESTED[1].to_json(), "case_id": 77}
    rewrite = row["requested_rewrite"]
    absent = {**row, "requested_rewrite": {**rewrite, "prompt": "It is in"}}
    half = {**row, "paraphrase_prompts": ["So \ud83d is in"]}
    return [
        (without(row, "requested_rewrite", "target_new"), 77, "no target_new; it has"),
        (absent, 77, "the prompt 'It is in' has no {} for its subject"),
        (without(row, "requested_rewrite", "subject"), 77, "no subject; it has"),
        ({**row, "requested_rewrite": {**rewrite, "subject": " "}}, 77, "subject is empty"),
        (half, 77, r"paraphrase_prompts[0] is not valid text: 'So \ud83d is in'"),
        (without(row, "case_id"), -7, "no case_id; it has"),
        ({**row, "case_id": 10**30}, -8, "case_id must fit 64 bits, and has 100"),
        ("a word", -9, "'a word' is no record of named values"),
    ]


def test_a_malformed_row_of_a_file_is_a_row_with_its_reason_and_the_others_are_evaluated(
    folder, tmp_path
):
    bad = malformed()
    listed = [TESTED[0].to_json(), *(row for row, *_ in bad), TESTED[2].to_json()]
    (tmp_path / "records.json").write_text(json.dumps(listed))
    given = ["--model", folder, "--records", tmp_path / "records.json", "--editor", "ft"]
    given += ["--no-control", "--out", tmp_path / "run"]
    done = command(*given)
    assert done.exit_code == 0, done.output
    frame = rows_of(tmp_path / "run")
    ends = TESTED[0].case_id, TESTED[2].case_id
    assert list(frame["case_id"]) == [ends[0], *(number for _, number, _ in bad), ends[1]]
    for number, (_, _, reason) in enumerate(bad, 1):
        assert frame["reason"][number].startswith(f"record {number}")
        assert reason in frame["reason"][number]
    assert frame[["ES", "KL"]].notna().all(axis=1).tolist() == (frame["reason"] == "").tolist()
    assert "ft: 8 records have no scores, such as 77: record 1" in " ".join(done.stdout.split())
    (row,) = pd.read_csv(tmp_path / "run" / TABLE).to_dict("records")
    assert (row["n"], row["failed"]) == (2, 8)
    parts = hashes(tmp_path / "run")
    strict = command(*given, "--strict")
    assert (strict.exit_code, strict.stdout) == (1, done.stdout)
    assert hashes(tmp_path / "run") == parts, "what is done is done, also what failed"


def test_rows_of_zsre_whose_subject_is_absent_keep_their_benchmark(model, tmp_path):
    fine = {
        **dict.fromkeys(zsre.KEYS, ""),
        "subject": "Ida",
        "src": "Where is Ida?",
        "rephrase": "Ida is in?",
        "answers": ["ab"],
        "loc": "Who is it",
        "loc_ans": "cd",
    }
    path = tmp_path / "zsre.json"
    path.write_text(json.dumps([fine, {**fine, "src": "Where is it?"}]))
    records = zsre.read_rows(path)
    assert records[1] == Unusable("zsre", -2, "Ida", "", records[1].reason)
    assert "subject 'Ida' does not occur in src 'Where is it?'" in records[1].reason
    # Alone too, as in a part of its own, the row has zsRE's columns.
    found = [evaluate(model, nudge, some) for some in (records, records[1:])]
    assert list(found[0].columns) == list(found[1].columns)
    assert found[1]["protocol"][0] == found[0]["protocol"][0]
    assert found[0]["specificity"].notna().tolist() == [True, False]
    assert zsre.read_records(path, on_bad_row=lambda said: None) == records[:1]
    with pytest.raises(FactFileError, match=r"zsre\.json, record 1: subject 'Ida'"):
        zsre.read_records(path)
    path.write_text(json.dumps([{**fine, "src": "Where is it?"}]))
    with pytest.raises(FactFileError, match=r"no records that can be used \(record 0: subject"):
        zsre.read_rows(path)


@pytest.mark.parametrize("mode", ["independent", "sequential", "batch"])
def test_rows_that_are_none_fail_in_every_mode(model, mode):
    bad = Unusable("counterfact", 5, "Ida", "", "record 5: nothing")
    frame = evaluate(model, nudge if mode != "batch" else None, [bad, RECORDS[0]], mode=mode)
    assert list(frame["reason"]) == ["record 5: nothing", ""]
    assert frame[list(SCORES)].iloc[0].isna().all()


ODD = {
    "a subject of spaces": {"subject": "  "},
    "signs of many bytes": {"subject": "Ида 🏔", "prompt": "{} 🇫🇷"},
    "nothing but the subject": {"prompt": "{}"},
    "lines": {"subject": "a\nb\x00c", "neighborhood_prompts": ("\n", "\t \x07")},
    "too long": {"neighborhood_prompts": ("long " * 40,)},
    "no room for the object": {"prompt": f"{{}}{'x' * 62}"},
    "an object of spaces": {"target_new": counterfact.Target(" ", "")},
    "no paraphrases": {"paraphrase_prompts": ()},
    "one prompt many times": {"paraphrase_prompts": ("So",) * 90},
    "the same object": {"target_new": counterfact.Target("cd", "")},
}


def test_odd_records_do_not_take_the_others_with_them(model):
    odd = [replace(record(100 + n), **changes) for n, changes in enumerate(ODD.values())]
    for editor in (None, fine_tuning.ft):
        alone = evaluate(model, editor, RECORDS[:2])
        frame = evaluate(model, editor, [RECORDS[0], *odd, RECORDS[1]])
        assert len(frame) == len(odd) + 2
        assert frame.loc[frame["reason"] == "", "ES"].notna().all()
        assert frame.loc[frame["reason"] != "", list(SCORES)].isna().all(axis=None)
        kept = frame.iloc[[0, -1]].reset_index(drop=True)
        pd.testing.assert_frame_equal(kept, alone, atol=1e-5)
        reasons = dict(zip(ODD, frame["reason"][1:-1], strict=True))
        assert reasons["too long"].startswith("PromptTooLong: ")
        assert reasons["no room for the object"].startswith("PromptTooLong: ")
        assert reasons["an object of spaces"].startswith("FactError: ")
        assert reasons["no paraphrases"] == "no paraphrase prompts"
        assert reasons["lines"].startswith("FactError: the prompt '\\n' has no tokens")
        assert reasons["signs of many bytes"] == ""


# -- the editor ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_editor_that_raises_at_record_137_loses_that_record_alone(model, tmp_path):
    records, tried = [record(number) for number in range(140)], []

    def fragile(model, rewrite, config=None):
        tried.append(rewrite.id)
        if rewrite.id == "137":
            raise IndexError("a slip of somebody's own")
        return nudge(model, rewrite)

    editors = [Contestant("fragile", fragile)]
    frame = evaluate_run(model, editors, records, out=tmp_path)
    failed = frame[frame["reason"] != ""]
    assert dict(zip(failed["case_id"], failed["reason"], strict=True)) == {
        137: "IndexError: a slip of somebody's own"
    }
    assert frame.loc[frame["case_id"] != 137, "ES"].notna().all()
    (row,) = table(frame).to_dict("records")
    assert (row["n"], row["failed"]) == (139, 1)
    count = len(tried)
    pd.testing.assert_frame_equal(evaluate_run(model, editors, records, out=tmp_path), frame)
    assert len(tried) == count, "nothing is done again"


@pytest.mark.parametrize("nothing", [None, "an edit", [], 3.0])
def test_an_editor_that_gives_no_edit_has_failed(model, nothing):
    for mode in ("independent", "sequential", "batch"):
        frame = evaluate(model, lambda *given: nothing, RECORDS[:2], mode=mode)
        assert set(frame["reason"]) == {
            f"EditError: the editor gave {type(nothing).__name__}, and no Edit"
        }
        assert frame["ES"].isna().all(), "the unedited model is not measured in its place"


def test_where_every_record_fails_there_is_a_table_all_the_same(model, tmp_path):
    def useless(model, rewrite, config=None):
        raise ZeroDivisionError("always")

    frame = evaluate_run(model, [Contestant("useless", useless)], RECORDS[:3], out=tmp_path)
    assert set(frame["reason"]) == {"ZeroDivisionError: always"}
    (row,) = pd.read_csv(tmp_path / TABLE).to_dict("records")
    assert (row["n"], row["failed"]) == (0, 3)
    assert pd.isna(row["S"])


# -- stopped ---------------------------------------------------------------------------------------


def test_ctrl_c_says_how_to_go_on_and_keeps_what_is_finished(folder, tmp_path, monkeypatch):
    write_records(TESTED[:3], tmp_path / "r.json")
    given = ["--model", folder, "--records", tmp_path / "r.json", "--editor", "ft", "--editor"]
    given += ["ft-l", "--no-control"]
    whole = command(*given, "--out", tmp_path / "whole")
    assert whole.exit_code == 0, whole.output

    def stopped(*given, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fine_tuning, "ft_l", stopped)
        patch.setattr(stopped, "__module__", fine_tuning.__name__, raising=False)
        patch.setattr(stopped, "__name__", "ft_l")
        first = command(*given, "--out", tmp_path / "run")
    assert first.exit_code == 130
    assert f"interrupted; the same command goes on from {tmp_path / 'run'}" in " ".join(
        first.stderr.split()
    )
    kept = hashes(tmp_path / "run")
    assert len(kept) >= 1
    assert not (tmp_path / "run" / ROWS).exists()
    again = command(*given, "--out", tmp_path / "run")
    assert (again.exit_code, again.stdout) == (0, whole.stdout.replace("whole", "run"))
    assert kept.items() <= hashes(tmp_path / "run").items()
    pd.testing.assert_frame_equal(rows_of(tmp_path / "run"), rows_of(tmp_path / "whole"))


def test_a_full_disk_stops_the_run_in_one_line_and_keeps_what_is_done(
    model, whole, tmp_path, monkeypatch
):
    written, full = row_files.pq.write_table, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def until_full(data, path, *more, **options):
        if len(hashes(tmp_path)) == 4:
            Path(path).write_bytes(b"half")
            raise full
        written(data, path, *more, **options)

    with monkeypatch.context() as patch:
        patch.setattr(row_files.pq, "write_table", until_full)
        with pytest.raises(OutputError, match="No space left on device") as caught:
            evaluation_workers.run(model, tmp_path)
    assert "\n" not in str(caught.value)
    kept = hashes(tmp_path)
    assert len(kept) == 4
    assert list(tmp_path.glob("parts/.*")) == [], "nothing half-written stays"

    def unwritable(frame, path, *more, **options):
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(pd.DataFrame, "to_parquet", unwritable)
        with pytest.raises(OutputError, match=rf"{ROWS}: No space left"):
            evaluation_workers.run(model, tmp_path)
    done = hashes(tmp_path)
    assert kept.items() <= done.items()
    assert len(done) == 10
    pd.testing.assert_frame_equal(evaluation_workers.run(model, tmp_path), whole)
    assert hashes(tmp_path) == done


# -- killed ----------------------------------------------------------------------------------------


def go_on(model, out: Path, fatal_write: int | None) -> None:
    """One process at the run; with `fatal_write` it is killed inside that write, half the bytes on the disk."""
    written, writes = row_files.pq.write_table, []

    def half_a_file(data, path, *more, **options):
        written(data, path, *more, **options)
        writes.append(path)
        if len(writes) == fatal_write:
            content = Path(path).read_bytes()
            Path(path).write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    row_files.pq.write_table = half_a_file
    evaluation_workers.run(model, out, config={"seconds": 0.02})
    os._exit(0)


def test_a_process_that_is_killed_again_and_again_loses_nothing_finished(model, whole, tmp_path):
    """Wherever it was once some parts were there, and inside a write. Forked, so that the model is loaded once."""
    context, before = multiprocessing.get_context("fork"), {}
    for how, at in (("parts", 2), ("write", 2), ("parts", 7)):
        given = (model, tmp_path, at if how == "write" else None)
        process = context.Process(target=go_on, args=given)
        process.start()
        if how == "parts":
            while process.is_alive() and len(hashes(tmp_path)) < at:
                time.sleep(0.002)
            process.kill()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, "the run ended before it was killed"
        now = hashes(tmp_path)
        assert before.items() <= now.items(), "a finished part was lost or changed"
        before = now
    assert 7 <= len(before) < 10
    resumed = evaluation_workers.run(model, tmp_path, config={"seconds": 0.02})
    assert before.items() <= hashes(tmp_path).items()
    pd.testing.assert_frame_equal(resumed, whole)


class FakeRay:
    """As much of Ray as the loop over parts sees; workers die where `fatal` says so."""

    class exceptions:
        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            pass

    def __init__(self, fatal: Callable[[int, int], bool]) -> None:
        self.fatal, self.tries, self.born = fatal, {}, 0

    def remote(self, asked, item):
        self.tries[item] = self.tries.get(item, 0) + 1
        return (item, self.tries[item])

    def wait(self, running, num_returns):
        return running[:1], running[1:]

    def get(self, ended):
        if self.fatal(*ended):
            raise self.exceptions.RayError("the worker died\nby signal 9")
        return ended[0] * 10


def work(model, item):
    raise AssertionError("the fake does it")


def pool(ray: FakeRay, workers: int) -> OnRay:
    class Pool(OnRay):
        def __init__(self) -> None:
            self.ray, self.actors = ray, [self._new() for _ in range(workers)]

        def _new(self):
            ray.born += 1
            actor = type("Actor", (), {})()
            actor.do = ray
            return actor

    return Pool()


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_part_whose_worker_dies_is_done_by_another(workers):
    ray = FakeRay(lambda item, tried: item == 2 and tried < ATTEMPTS)
    found = dict(pool(ray, workers).map(work, range(5)))
    assert found == {number: 10 * number for number in range(5)}
    assert ray.born == workers + ATTEMPTS - 1


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_part_that_kills_every_worker_does_not_keep_the_others_from_being_done(workers):
    ray, found = FakeRay(lambda item, tried: item == 0), {}
    with pytest.raises(WorkersError, match=r"1 of 5 parts lost .* 3 times \(by signal 9\)"):
        found.update(pool(ray, workers).map(work, range(5)))
    assert found == {number: 10 * number for number in range(1, 5)}
    assert ray.tries[0] == ATTEMPTS


def test_where_no_worker_lives_the_run_stops_before_it_has_tried_everything():
    ray = FakeRay(lambda item, tried: True)
    with pytest.raises(WorkersError, match="2 of 50 parts"):
        list(pool(ray, 2).map(work, range(50)))
    assert len(ray.tries) <= 4


def ray_run(folder: Path, out: Path, *words: str):
    environment = {
        **os.environ,
        "PYTHONPATH": f"{Path(factlens.__file__).parents[1]}{os.pathsep}{HERE}",
        "OMP_NUM_THREADS": "1",
    }
    said = [sys.executable, HERE / "evaluation_workers.py", folder, out, "2", *words]
    return subprocess.run(
        [*map(str, said)], env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_ray_workers_give_the_same_rows_though_one_is_killed(folder, whole, tmp_path):
    pytest.importorskip("ray")
    done = ray_run(folder, tmp_path, "kill")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "worker replaced"
    pd.testing.assert_frame_equal(rows_of(tmp_path), whole, atol=1e-5)


@pytest.mark.slow
def test_on_ray_a_record_that_kills_every_worker_leaves_the_other_parts_done(
    folder, model, whole, tmp_path
):
    pytest.importorskip("ray")
    done = ray_run(folder, tmp_path, "deadly")
    assert done.returncode == 1
    assert "1 of 10 parts lost their worker 3 times" in done.stderr
    kept = hashes(tmp_path)
    assert len(kept) == 9
    config = {"seconds": evaluation_workers.SLOW}

    def healed(*given):
        return nudge(*given)

    # As the run's configuration names what killed.
    healed.__module__, healed.__name__ = "__main__", "deadly"
    found = evaluation_workers.run(InProcess(model), tmp_path, healed, config)
    assert kept.items() <= hashes(tmp_path).items()
    pd.testing.assert_frame_equal(found, whole, atol=1e-5)


@pytest.mark.slow
def test_ctrl_c_of_a_process_keeps_what_is_finished(folder, tmp_path):
    write_records([record(n) for n in range(200)], tmp_path / "records.json")
    said = [sys.executable, "-m", "factlens.cli", "evaluate", "--model", folder, "--editor", "ft"]
    said += ["--records", tmp_path / "records.json", "--n", 100, "--no-control"]
    said += ["--out", tmp_path / "run"]
    environment = {**os.environ, "PYTHONPATH": str(Path(factlens.__file__).parents[1])}
    running = subprocess.Popen(
        [*map(str, said)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        # Ignored where the tests themselves were started in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while running.poll() is None and len(hashes(tmp_path / "run")) < 2:
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    _, told = running.communicate(timeout=120)
    assert running.returncode == 130, told
    assert "the same command goes on" in told
    kept = hashes(tmp_path / "run")
    assert 2 <= len(kept) < 7
    again = command(*said[4:])
    assert again.exit_code == 0, again.output
    assert kept.items() <= hashes(tmp_path / "run").items()
    assert (rows_of(tmp_path / "run")["reason"] == "").all()
