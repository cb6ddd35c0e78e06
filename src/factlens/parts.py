"""A run's parts: cut from its facts, done where they are missing, put together in the order of the facts."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from factlens.errors import OutputError, RunError, TraceFileError
from factlens.executors import Executor
from factlens.facts import Fact
from factlens.store import Store
from factlens.studies import Chunk, Study, do_chunk
from factlens.traces import Trace, common_info, concat

CHUNK = 8
"""Facts in a part."""

RunProgress = Callable[[int, int, str], None]
"""Told (parts done, parts in all, the study at work)."""


def digest(facts: Sequence[Fact], *more: str) -> str:
    """sha256 over facts, and over what else is to be told apart."""
    return hashlib.sha256(json.dumps([*more, *map(asdict, facts)]).encode()).hexdigest()


def cut(
    plan: Sequence[Study],
    facts: Sequence[Fact],
    lengths: Sequence[int],
    part: int,
    base: Mapping[str, Any],
) -> list[Chunk]:
    """Every part of a run, study by study. Facts of one length stand together, since they share passes."""
    made = []
    for study in plan:
        count = len(facts) if study.whole else min(part, len(facts))
        order = np.argsort(lengths[:count], kind="stable").tolist()
        for begin in range(0, count, CHUNK):
            numbers = tuple(order[begin : begin + CHUNK])
            made.append(Chunk(study, numbers, tuple(facts[n] for n in numbers), base))
    return made


def do_missing(
    store: Store,
    executor: Executor,
    chunks: Sequence[Chunk],
    fingerprint: str,
    progress: RunProgress,
) -> bool:
    """Do what is not done, and keep each part when it is finished; whether there was anything to do.

    Raises:
        RunError: a worker has another model than the run.
        OutputError: the disk is full, or the directory cannot be written. Earlier parts stay.
    """
    todo = [number for number, chunk in enumerate(chunks) if not _is_done(store, number, chunk)]
    done = len(chunks) - len(todo)
    if todo:
        progress(done, len(chunks), chunks[todo[0]].study.name)
    for place, trace in executor.map(do_chunk, [chunks[number] for number in todo]):
        number = todo[place]
        if len(trace) and trace.info["fingerprint"] != fingerprint:
            raise RunError(
                f"a worker loaded another model than the run's (fingerprint {trace.info['fingerprint'][:12]}, not "
                f"{fingerprint[:12]}); give every machine the same folder"
            )
        trace.info["chunk"] = _name(chunks[number])
        store.write(number, trace)
        done += 1
        progress(done, len(chunks), chunks[number].study.name)
    return bool(todo)


def _name(chunk: Chunk) -> str:
    """What a part must be of to be taken for this chunk's."""
    return digest(chunk.facts, chunk.study.name)


def _is_done(store: Store, number: int, chunk: Chunk) -> bool:
    found = store.read(number)
    return found is not None and found.info.get("chunk") == _name(chunk)


def file_of(study: str) -> str:
    """The file that holds a study's facts together."""
    return "frame.parquet" if study == "main" else f"{study.replace(' ', '-')}.parquet"


def put_together(
    store: Store, chunks: Sequence[Chunk], settings: Mapping[str, Any], *, again: bool
) -> None:
    """One file for each study, facts in the order of the draw, whatever order they were done in.

    Files that are there and whole stay, unless `again`.
    """
    by_study: dict[str, list[int]] = {}
    for number, chunk in enumerate(chunks):
        by_study.setdefault(chunk.study.name, []).append(number)
    for name, numbers in by_study.items():
        path = store.folder / file_of(name)
        if not again and _is_whole(path):
            continue
        parts = []
        for number in numbers:
            found = store.read(number)
            if found is None:
                raise OutputError(
                    f"{store.part(number)} cannot be read back; run the same command again"
                )
            parts.append(found)
        whole = _in_order(parts)
        if whole.info.get("noise_level") == settings["noise_level"]:
            # Workers are given the level as a number, so that it does not depend on the chunk.
            whole.info["noise_source"] = settings["noise_source"]
        whole.save(path)


def _is_whole(path: Path) -> bool:
    try:
        Trace.load(path)
    except TraceFileError:
        return False
    return True


def _in_order(parts: Sequence[Trace]) -> Trace:
    """All parts as one trace, by the facts' numbers in the run."""
    filled = [each for each in parts if len(each)]
    skipped = tuple(skip for each in parts for skip in each.skipped)
    if not filled:
        return replace(parts[0], skipped=skipped)
    whole = concat(filled)
    numbers = [number for each in filled for number in each.info["numbers"]]
    order = np.argsort(numbers).tolist()
    place = {old: new for new, old in enumerate(order)}
    frame = whole.frame.assign(fact=whole.frame["fact"].map(place))
    info = {
        **{key: value for key, value in whole.info.items() if key != "chunk"},
        "numbers": sorted(numbers),
        **common_info(filled),
        "seconds": round(sum(each.info["seconds"] for each in filled), 3),
    }
    return replace(
        whole,
        frame=frame.sort_values("fact", kind="stable", ignore_index=True),
        facts=tuple(whole.facts[old] for old in order),
        answers=tuple(whole.answers[old] for old in order),
        subjects=tuple(whole.subjects[old] for old in order),
        lengths=tuple(whole.lengths[old] for old in order),
        info=info,
        skipped=skipped,
    )
