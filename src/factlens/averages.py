"""A thousand facts as one run: asked, traced in every study, kept part by part, put together (ROME, Section 2)."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from factlens import models
from factlens.corruption import WITHOUT_LEVEL, noise_level
from factlens.errors import FactError, OutputError, PlanError, RunError
from factlens.executors import Executor, InProcess
from factlens.facts import COLUMNS, Fact, bundled_facts
from factlens.files import written_whole
from factlens.fingerprints import provenance
from factlens.knowledge import RULES, Knowledge, ask
from factlens.models import Model
from factlens.store import Store, existing_store, locked, open_store
from factlens.studies import Chunk, Study, chosen, do_chunk, studies
from factlens.traces import Trace, concat

CHUNK = 8
"""Facts in a part."""
PART = 100
"""Facts of each study that does not take all."""

RunProgress = Callable[[int, int, str], None]
"""Told (parts done, parts in all, the study at work)."""


def _no_progress(done: int, total: int, study: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Run:
    """A finished run, as it lies in its directory."""

    folder: Path
    config: Mapping[str, Any]
    """What the results depend on."""
    about: Mapping[str, Any]
    """Model, versions, device; rows of the fact file that could not be used."""
    knowledge: pd.DataFrame
    """The facts asked: `prompt, subject, object, relation, id, known, reason, tokens, chosen`."""
    traces: Mapping[str, Trace]
    """By study; "main" first. The methods that are no tracing have `attribution` instead of `effect`."""
    wall_clock: Sequence[float]
    """Seconds of each time the command was run."""

    @property
    def main(self) -> Trace:
        """The trace of all facts: states, MLP windows and attention windows."""
        return self.traces["main"]


def average(
    model: Model | Executor,
    facts: Iterable[Fact] | None = None,
    *,
    out: str | Path,
    n: int = 1000,
    variants: str | Sequence[str] = "all",
    part: int = PART,
    window: int | None = None,
    noise: str = "gaussian",
    noise_level: float | str | None = None,
    samples: int | None = None,
    known: str = "whole",
    seed: int = 0,
    prepend_bos: bool | None = None,
    engine: str = "auto",
    bad_rows: Sequence[str] = (),
    progress: RunProgress = _no_progress,
) -> Run:
    """Trace up to `n` facts that the model knows, in every study, and keep each finished part in `out`.

    The same call goes on where an earlier one stopped, however it stopped. Noise belongs to each fact, so neither the
    order, nor the number of workers, nor where a run was interrupted changes a number by more than 1e-6.

    Args:
        model: a hooked model, or an `executors.OnRay` for several workers.
        facts: to choose from; None for the bundled ones, each in one sentence that atlas was not trained on.
        out: the run's directory.
        n: how many known facts, drawn at random (by `seed`) if there are more.
        variants: names of further studies (`studies.studies`), "all", or "none" for the paper's main figures alone.
        part: facts of each study that does not take all, the first of the draw.
        window: width of MLP and attention windows; None for the model's own.
        noise: as in `trace`, as are `noise_level`, `samples`, `prepend_bos`, `engine`.
        known: which facts the model knows: "whole" or "first-token" (`knowledge.known_facts`).
        seed: of the draw of facts and of the noise.
        bad_rows: what was wrong with rows of the fact file that were left out; kept with the run.
        progress: told (parts done, parts in all, study).

    Raises:
        RunError: `out` holds a run with another configuration, or another process is at work on it.
        FactError: the model knows none of the facts.
        PlanError: an unknown study, noise rule or number of facts.
        OutputError: `out` cannot be written, or the disk is full. What was finished is kept.
    """
    if n < 1 or part < 1:
        raise PlanError(f"n and part are numbers of facts from 1 up, not {n} and {part}")
    if known not in RULES:
        raise PlanError(f"no rule {known!r} for known facts; there are {', '.join(RULES)}")
    begun, out = time.perf_counter(), Path(out)
    executor = InProcess(model) if isinstance(model, models.Model) else model
    wanted = list(dict.fromkeys(_bundled() if facts is None else facts))
    if not wanted:
        raise FactError("no facts to trace")
    with locked(out):
        asked = {"noise": noise, "noise_level": noise_level, "subjects": _subjects(wanted)}
        found = executor.call(_describe, asked)
        base = {
            "window": window if window is not None else found["window"],
            "noise": noise,
            "noise_level": found["noise_level"],
            "samples": samples if samples is not None else found["samples"],
            "seed": seed,
            "prepend_bos": prepend_bos,
            "engine": engine,
        }
        every = studies(window=base["window"], depth=found["layers"], base=base)
        plan = chosen(variants, every)
        config = {
            "model": {key: found["about"][key] for key in ("model", "fingerprint", "dtype")},
            "facts": {"asked": len(wanted), "sha256": _digest(wanted)},
            "draw": {"n": n, "part": part, "known": known, "chunk": CHUNK},
            "trace": {**base, "noise_source": found["noise_source"]},
            "studies": {study.name: {"method": study.method, **study.options} for study in plan},
        }
        store = open_store(out, config, {**found["about"], "bad_rows": list(bad_rows)})
        table = _knowledge(store, executor, wanted, n, seed, (known, prepend_bos))
        worked = _do(store, executor, _chunks(plan, table, part, base), progress)
        _put_together(store, plan, table, part)
        if worked:
            store.add_wall_clock(time.perf_counter() - begun)
    return read_run(out)


def read_run(folder: str | Path) -> Run:
    """A finished run, without its model.

    Raises:
        RunError: no run is there, or it is not finished.
        TraceFileError: one of its files is damaged.
    """
    store = existing_store(folder)
    content = store.config()
    paths = {name: store.folder / _file(name) for name in content["config"]["studies"]}
    if missing := [name for name, path in paths.items() if not path.exists()]:
        raise RunError(
            f"the run in {folder} is not finished ({', '.join(missing)} to come); the command that began it goes on"
        )
    return Run(
        folder=store.folder,
        config=content["config"],
        about=content["about"],
        knowledge=_read_knowledge(store),
        traces={name: Trace.load(path) for name, path in paths.items()},
        wall_clock=content["wall_clock"],
    )


def _bundled() -> list[Fact]:
    return bundled_facts("held", one_per_fact=True)


def _subjects(facts: Sequence[Fact]) -> list[str]:
    return [fact.subject for fact in facts]


def _digest(facts: Sequence[Fact]) -> str:
    return hashlib.sha256(json.dumps([asdict(fact) for fact in facts]).encode()).hexdigest()


def _describe(model: Model, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What a run must know of the model before it begins; done where the model is."""
    defaults = models.trace_defaults(model)
    found = {
        "about": provenance(model),
        "layers": models.n_layers(model),
        "window": defaults.window,
        "samples": defaults.samples,
        "noise_level": None,
        "noise_source": "not used",
    }
    if asked["noise"].split(":")[0] not in WITHOUT_LEVEL:
        level = noise_level(model, asked["noise_level"], asked["subjects"])
        found |= {"noise_level": level.value, "noise_source": level.source}
    return found


# -- the facts -------------------------------------------------------------------------------------


def _knowledge(
    store: Store,
    executor: Executor,
    facts: Sequence[Fact],
    n: int,
    seed: int,
    rule: tuple[str, bool | None],
) -> pd.DataFrame:
    """Which facts the model knows and which `n` of them are traced; asked once, then read from the run."""
    path = store.folder / "facts.parquet"
    if path.exists():
        return _read_knowledge(store)
    known: Knowledge = executor.call(_ask, (list(facts), *rule))
    table = known.frame.assign(id=[fact.id for fact in facts])
    rows = np.flatnonzero(table["known"].to_numpy(dtype=bool))
    if not len(rows):
        raise FactError(
            f"the model knows none of the {len(facts)} facts ({known.skipped}); give other facts"
        )
    draw = np.random.default_rng(seed).permutation(rows)[:n]
    order = np.full(len(table), -1)
    order[draw] = np.arange(len(draw))
    table = table.assign(chosen=order)
    with written_whole(path) as partial:
        table.to_parquet(partial)
    return table


def _ask(model: Model, asked: tuple[list[Fact], str, bool | None]) -> Knowledge:
    facts, rule, prepend_bos = asked
    return ask(model, facts, known=rule, prepend_bos=prepend_bos)


def _read_knowledge(store: Store) -> pd.DataFrame:
    path = store.folder / "facts.parquet"
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        line = str(error).split("\n")[0][:120]
        raise RunError(
            f"cannot read {path} ({line}); remove it to have the facts asked again"
        ) from None


def _facts(table: pd.DataFrame) -> list[Fact]:
    """The facts to trace, in the order of the draw."""
    rows = table[table["chosen"] >= 0].sort_values("chosen")
    cells = rows[list(COLUMNS)].astype(object).where(rows[list(COLUMNS)].notna(), None)
    return [Fact(*row) for row in cells.itertuples(index=False)]


# -- the work --------------------------------------------------------------------------------------


def _chunks(
    plan: Sequence[Study], table: pd.DataFrame, part: int, base: Mapping[str, Any]
) -> list[Chunk]:
    """Every part of the run. Facts of one length stand together, since they share passes."""
    facts = _facts(table)
    lengths = table[table["chosen"] >= 0].sort_values("chosen")["tokens"].to_numpy()
    made = []
    for study in plan:
        count = len(facts) if study.whole else min(part, len(facts))
        order = np.argsort(lengths[:count], kind="stable").tolist()
        for begin in range(0, count, CHUNK):
            numbers = tuple(order[begin : begin + CHUNK])
            made.append(Chunk(study, numbers, tuple(facts[n] for n in numbers), base))
    return made


def _do(store: Store, executor: Executor, chunks: Sequence[Chunk], progress: RunProgress) -> bool:
    """Do what is not done, and keep each part when it is finished; whether there was anything to do."""
    todo = [number for number in range(len(chunks)) if store.read(number) is None]
    done = len(chunks) - len(todo)
    if todo:
        progress(done, len(chunks), chunks[todo[0]].study.name)
    for place, trace in executor.map(do_chunk, [chunks[number] for number in todo]):
        store.write(todo[place], trace)
        done += 1
        progress(done, len(chunks), chunks[todo[place]].study.name)
    return bool(todo)


def _file(study: str) -> str:
    return "frame.parquet" if study == "main" else f"{study.replace(' ', '-')}.parquet"


def _put_together(store: Store, plan: Sequence[Study], table: pd.DataFrame, part: int) -> None:
    """One file for each study, facts in the order of the draw, whatever order they were done in."""
    at = 0
    for study in plan:
        count = int((table["chosen"] >= 0).sum())
        count = count if study.whole else min(part, count)
        numbers = range(at, at := at + -(-count // CHUNK))
        if (path := store.folder / _file(study.name)).exists():
            continue
        parts = []
        for number in numbers:
            found = store.read(number)
            if found is None:
                raise OutputError(
                    f"{store.part(number)} cannot be read back; run the same command again"
                )
            parts.append(found)
        _in_order(parts).save(path)


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
    engines = {each.info["engine"] for each in filled}
    reasons = [each.info["fallback_reason"] for each in filled if each.info["fallback_reason"]]
    info = {
        **whole.info,
        "numbers": sorted(numbers),
        "engine": engines.pop() if len(engines) == 1 else "mixed",
        "prefix_reuse": all(each.info["prefix_reuse"] for each in filled),
        "fallback_reason": reasons[0] if reasons else None,
        "samples": max(each.info["samples"] for each in filled),
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
