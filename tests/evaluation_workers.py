"""A small evaluation in a process of its own, which tests kill, or spread over Ray workers.

    python evaluation_workers.py MODEL OUT WORKERS [kill]

`kill` sends SIGKILL to one worker once some parts are there. A run that ends says whether the workers are still the same.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from factlens import editors, models
from factlens.benchmarks.counterfact import Record, Target
from factlens.changes import RankOne
from factlens.edits import Edit, info_for
from factlens.evaluation_runs import Contestant, evaluate_run
from factlens.executors import ModelSource, OnRay

LAYER, SLOW = 1, 0.1
FATAL = "13"
"""The record that kills whoever edits it with `deadly`."""


def record(number: int, subject: str | None = None) -> Record:
    """Short enough for a model of 64 characters."""
    subject = subject or f"Mount {number}"
    return Record(
        case_id=number,
        pararel_idx=0,
        prompt="{} is in",
        relation_id="P1",
        target_new=Target("ab", ""),
        target_true=Target("cd", ""),
        subject=subject,
        paraphrase_prompts=(f"So {subject} is in",),
        neighborhood_prompts=("Ida is in",),
        attribute_prompts=(),
        generation_prompts=(),
    )


def nudge(model, rewrites, config=None) -> Edit:
    """A small change that depends on nothing but the subject."""
    (rewrite,) = editors.several(rewrites)
    time.sleep((config or {}).get("seconds", 0))
    digest = hashlib.sha256(rewrite.subject.encode()).hexdigest()
    draws = torch.Generator().manual_seed(int(digest[:8], 16))
    left, right = (torch.randn(size, generator=draws) for size in models.W_out(model, LAYER).shape)
    info = info_for(model, "nudge", {}, [rewrite])
    return Edit({models.W_out_name(LAYER): RankOne(0.1 * left, right)}, info)


def deadly(model, rewrites, config=None) -> Edit:
    """`nudge`, which no worker survives at one record."""
    if rewrites.id == FATAL:
        os._exit(1)
    return nudge(model, rewrites, config)


RECORDS = [record(number) for number in range(20)]


def run(executor, out, editor=nudge, config=None):
    return evaluate_run(executor, [Contestant("edited", editor, config)], RECORDS, out=out, batch=2)


def finished(out: Path) -> int:
    return len(list(Path(out).glob("parts/*.parquet")))


def kill_one(executor: OnRay, out: Path) -> None:
    victim = executor.ray.get(executor.actors[0].pid.remote())
    while finished(out) < 3:
        time.sleep(0.01)
    os.kill(victim, signal.SIGKILL)


def main() -> None:
    model, out, workers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    executor = OnRay(ModelSource(name=str(model), device="cpu"), workers)
    try:
        if "kill" in sys.argv:
            threading.Thread(target=kill_one, args=(executor, out), daemon=True).start()
        before = [executor.ray.get(each.pid.remote()) for each in executor.actors]
        run(executor, out, deadly if "deadly" in sys.argv else nudge, {"seconds": SLOW})
        after = [executor.ray.get(each.pid.remote()) for each in executor.actors]
        print("worker replaced" if before != after else "same workers")
    finally:
        executor.close()


if __name__ == "__main__":
    main()
