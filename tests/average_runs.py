"""A small run of `average` in a process of its own, which tests kill, or spread over Ray workers.

    python average_runs.py OUT [WORKERS] [kill]

`kill` sends SIGKILL to one worker once some parts are there. A run that ends writes nothing but its folder.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

from factlens import averages, parts
from factlens.executors import InProcess, ModelSource, OnRay
from factlens.facts import bundled_facts

OPTIONS = {"n": 20, "samples": 2, "variants": "none", "seed": 1}
parts.CHUNK = 2


def facts():
    """A few, so that asking which are known takes no time."""
    return bundled_facts("held", one_per_fact=True)[::150]


def run(executor, out):
    return averages.average(executor, facts(), out=out, **OPTIONS)


def finished(out: Path) -> int:
    return len(list(Path(out).glob("parts/*.parquet")))


def kill_one(executor: OnRay, out: Path) -> None:
    victim = executor.ray.get(executor.actors[0].pid.remote())
    while finished(out) < 4:
        time.sleep(0.01)
    os.kill(victim, signal.SIGKILL)


def main() -> None:
    out, workers = Path(sys.argv[1]), int(sys.argv[2])
    source = ModelSource(device="cpu")
    executor = OnRay(source, workers) if workers > 1 else InProcess(source.load())
    if "kill" in sys.argv:
        threading.Thread(target=kill_one, args=(executor, out), daemon=True).start()
    before = [] if workers == 1 else [executor.ray.get(a.pid.remote()) for a in executor.actors]
    run(executor, out)
    after = [] if workers == 1 else [executor.ray.get(a.pid.remote()) for a in executor.actors]
    executor.close()
    print("worker replaced" if before != after else "same workers")


if __name__ == "__main__":
    main()
