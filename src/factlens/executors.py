"""A map over chunks of work, with a loaded model: in this process, or on Ray with one model for each worker.

Work is a function `(model, item) -> result`. Results come as they are finished, with the item's number.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from factlens.errors import FactlensError, WorkersError
from factlens.models import Model, load_model

Work = Callable[[Model, Any], Any]

ATTEMPTS = 3
"""How often a chunk may lose its worker before it is given up."""


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """How a worker loads the model: the arguments of `load_model`."""

    name: str = "atlas"
    device: str | None = None
    dtype: str = "float32"
    device_map: str | None = None

    def load(self) -> Model:
        """Load it here."""
        import torch

        return load_model(
            self.name,
            device=self.device,
            dtype=getattr(torch, self.dtype),
            device_map=self.device_map,
        )


@runtime_checkable
class Executor(Protocol):
    """Where work is done."""

    @property
    def workers(self) -> int:
        """How many things are done at a time."""
        ...

    def call(self, work: Work, item: Any) -> Any:
        """Do one thing, and wait for it."""
        ...

    def map(self, work: Work, items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Do `work` for every item; (number, result) as they are finished, in any order."""
        ...

    def close(self) -> None:
        """Let the workers go."""
        ...


@dataclass
class InProcess:
    """One model, here."""

    model: Model
    workers: int = field(default=1, init=False)

    def call(self, work: Work, item: Any) -> Any:
        """Do one thing."""
        return work(self.model, item)

    def map(self, work: Work, items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """One item after another, in order."""
        for number, item in enumerate(items):
            yield number, work(self.model, item)

    def close(self) -> None:
        """Nothing to let go."""


class OnRay:
    """Several processes, here or on a cluster, each with a model of its own.

    A worker that is lost (killed, out of memory, its machine gone) is started anew and its item done again, up to
    `ATTEMPTS` times. An item that loses all of them does not take the others with it: they are done first. Errors of factlens itself
    are raised here as they are.

    Args:
        source: how each worker loads the model. On a cluster factlens, and a local model folder, must be there.
        workers: how many; on GPUs one each.
        address: of a running cluster ("auto", "ray://host:10001"); None starts one on this machine.

    Raises:
        WorkersError: Ray is not installed, or cannot be reached or started.
    """

    def __init__(self, source: ModelSource, workers: int = 2, address: str | None = None) -> None:
        if workers < 1:
            raise WorkersError(f"at least one worker is needed, not {workers}")
        if source.device_map is not None or ":" in (source.device or ""):
            raise WorkersError(
                f"each worker has one device of its own; device {source.device!r} and device_map {source.device_map!r} "
                "are for a single process (workers=1)"
            )
        self.source, self.workers = source, workers
        self.actors: list[Any] = []
        self.ray = _ray()
        self._owned = not self.ray.is_initialized()
        if self._owned:
            _start(self.ray, workers, address)
        self._check_room(workers)
        self.actors = [self._new() for _ in range(workers)]

    def call(self, work: Work, item: Any) -> Any:
        """Do one thing on some worker."""
        return next(self.map(work, [item]))[1]

    def map(self, work: Work, items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Each worker has one item at a time.

        Raises:
            WorkersError: after all others, that items lost every worker; at once where the second did before any was finished.
        """
        waiting, attempts = deque(range(len(items))), [0] * len(items)
        running: dict[Any, tuple[int, int]] = {}
        idle = list(range(len(self.actors)))
        finished, lost = 0, []
        while waiting or running:
            while waiting and idle:
                number, actor = waiting.popleft(), idle.pop()
                attempts[number] += 1
                running[self.actors[actor].do.remote(work, items[number])] = (number, actor)
            (ended,), _ = self.ray.wait(list(running), num_returns=1)
            number, actor = running.pop(ended)
            idle.append(actor)
            try:
                result = self._result(ended)
            except self.ray.exceptions.RayError as error:
                self.actors[actor] = self._new()
                if attempts[number] < ATTEMPTS:
                    waiting.appendleft(number)
                else:
                    lost.append(str(error).strip().split("\n")[-1][:200])
                if len(lost) > 1 and not finished:
                    break
                continue
            finished += 1
            yield number, result
        if lost:
            raise WorkersError(
                f"{len(lost)} of {len(items)} parts lost their worker {ATTEMPTS} times ({lost[0]}); what was finished is kept. "
                "Is there memory for a model in each worker, and is factlens installed where they run?"
            )

    def _result(self, finished: Any) -> Any:
        """What the work returned; its own errors as they are, a lost worker as a `RayError`."""
        try:
            return self.ray.get(finished)
        except self.ray.exceptions.RayTaskError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, FactlensError):
                raise cause from None
            line = str(error).strip().split("\n")[-1][:200]
            raise WorkersError(f"a worker failed: {line}; what was finished is kept") from error

    def _check_room(self, workers: int) -> None:
        """Refuse more workers than the cluster can ever start: they would be waited for without end."""
        there = self.ray.cluster_resources()
        kind = "GPU" if self._gpus() else "CPU"
        if workers > (room := int(there.get(kind, 0))):
            self.close()
            raise WorkersError(
                f"{workers} workers need a {kind} each and Ray has {room}; use --workers {max(1, room)}"
                + (", or --device cpu" if kind == "GPU" else "")
            )

    def _gpus(self) -> int:
        return int(self.source.device != "cpu" and self.ray.cluster_resources().get("GPU", 0) > 0)

    def _new(self) -> Any:
        options = {"num_cpus": 1, "num_gpus": self._gpus()}
        return self.ray.remote(_Worker).options(**options).remote(self.source)

    def close(self) -> None:
        """Let the workers go, and the cluster if it was started here."""
        if self._owned:
            self.ray.shutdown()
        else:
            for actor in self.actors:
                self.ray.kill(actor)


class _Worker:
    """What runs in a worker's process."""

    def __init__(self, source: ModelSource) -> None:
        self.source = source
        self.model: Model | None = None

    def do(self, work: Work, item: Any) -> Any:
        # Loaded at the first item, where an error reaches the user as that item's.
        if self.model is None:
            self.model = self.source.load()
        return work(self.model, item)

    def pid(self) -> int:
        return os.getpid()


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # No word to anybody.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise WorkersError(
            "several workers need Ray, which is not installed: pip install 'ray>=2.40'"
        ) from None
    return ray


def _start(ray: Any, workers: int, address: str | None) -> None:
    quiet = {"logging_level": "ERROR", "log_to_driver": False}
    try:
        if address is not None:
            ray.init(address=address, **quiet)
        else:
            ray.init(num_cpus=workers, include_dashboard=False, **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        line = str(error).strip().split("\n")[0][:200]
        where = f"reach the Ray cluster at {address!r}" if address else "start Ray on this machine"
        raise WorkersError(f"cannot {where}: {line}") from None
