"""A thousand facts as one run: asked, traced in every study, kept part by part, put together (ROME, Section 2)."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from factlens import models
from factlens.corruption import WITHOUT_LEVEL, noise_level
from factlens.errors import FactError, PlanError, RunError
from factlens.executors import Executor, InProcess
from factlens.facts import COLUMNS, Fact, bundled_facts
from factlens.files import written_whole
from factlens.fingerprints import provenance
from factlens.knowledge import RULES, Knowledge, ask
from factlens.models import Model
from factlens.parts import RunProgress, cut, digest, do_missing, file_of, put_together
from factlens.store import Store, existing_store, locked, open_store
from factlens.studies import chosen, studies
from factlens.traces import Trace

PART = 100
"""Facts of each study that does not take all."""


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
    sessions: Sequence[Mapping[str, Any]]
    """Each time the command was run: `seconds`, `workers`, `device`, `versions`. A killed one could not say so."""

    @property
    def seconds(self) -> float:
        """Wall-clock of all sessions."""
        return sum(float(session["seconds"]) for session in self.sessions)

    @property
    def spread(self) -> str:
        """How many workers it had, for a sentence: " with 2 workers". Empty where it was one, or not always as many."""
        counts = {session.get("workers", 1) for session in self.sessions}
        return f" with {max(counts)} workers" if len(counts) == 1 and max(counts) > 1 else ""

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
            "facts": {"asked": len(wanted), "sha256": digest(wanted)},
            "draw": {"n": n, "part": part, "known": known},
            "trace": {**base, "noise_source": found["noise_source"]},
            "studies": {study.name: {"method": study.method, **study.options} for study in plan},
        }
        store = open_store(out, config, {**found["about"], "bad_rows": list(bad_rows)})
        try:
            table = _knowledge(store, executor, wanted, n, seed, (known, prepend_bos))
            facts, lengths = _drawn(table)
            chunks = cut(plan, facts, lengths, part, base)
            worked = do_missing(store, executor, chunks, found["about"]["fingerprint"], progress)
            put_together(store, chunks, config["trace"], again=worked)
        finally:
            versions = {key: found["about"][key] for key in ("device", "python", "versions")}
            seconds = time.perf_counter() - begun
            store.add_session(seconds, {"workers": executor.workers, **versions})
    run = read_run(out)
    if not len(run.main):
        raise FactError(
            f"none of {len(facts)} known facts could be traced; the first: {run.main.skipped[0][1]}"
        )
    return run


def read_run(folder: str | Path) -> Run:
    """A finished run, without its model.

    Raises:
        RunError: no run is there, or it is not finished.
        TraceFileError: one of its files is damaged.
    """
    store = existing_store(folder)
    content = store.config()
    if "studies" not in content["config"]:
        raise RunError(f"{folder} holds no traces but scores of edits, which are in its table.csv")
    paths = {name: store.folder / file_of(name) for name in content["config"]["studies"]}
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
        sessions=content["sessions"],
    )


def _bundled() -> list[Fact]:
    return bundled_facts("held", one_per_fact=True)


def _subjects(facts: Sequence[Fact]) -> list[str]:
    return [fact.subject for fact in facts]


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
            f"cannot read {path} ({line}); remove it, and the facts are asked again"
        ) from None


def _drawn(table: pd.DataFrame) -> tuple[list[Fact], list[int]]:
    """The facts to trace, in the order of the draw, and the lengths of their prompts."""
    rows = table[table["chosen"] >= 0].sort_values("chosen")
    cells = rows[list(COLUMNS)].astype(object).where(rows[list(COLUMNS)].notna(), None)
    return [Fact(*row) for row in cells.itertuples(index=False)], rows["tokens"].tolist()
