"""Evaluations that are kept part by part: stopped, gone on with, shared out among workers.

runs/x/
  run.yaml             the whole configuration, what it belongs to, versions
  parts/part-00017.parquet   the rows of some records under one editor
  records.parquet      all rows, in the order of editors and records
  table.csv            their means
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from factlens import models
from factlens.benchmarks.atlas_counterfact import other_facts
from factlens.benchmarks.references import References
from factlens.counterfact_scores import Others
from factlens.editors import Editor
from factlens.engines.problems import Progress, no_progress
from factlens.errors import OutputError, PlanError, RunError
from factlens.evaluation import BATCH, NONE, evaluate, name_of, steps_of, table
from factlens.executors import Executor, InProcess
from factlens.files import written_whole
from factlens.fingerprints import provenance, remembered_fingerprint
from factlens.models import Model
from factlens.row_files import Rows
from factlens.store import Store, locked, open_store

RECORDS, TABLE = "records.parquet", "table.csv"
RunProgress = Callable[[int, int, str], None]
"""Told (steps done, steps in all, the editor at work)."""


@dataclass(frozen=True)
class Contestant:
    """An editor under the name that it has in the frame; None is the unedited model."""

    label: str
    editor: Editor | None
    config: Any = None


@dataclass(frozen=True)
class _Chunk:
    """What a worker is given, and what becomes one part."""

    contestant: Contestant
    records: tuple[Any, ...]
    options: Mapping[str, Any]
    """Further arguments of `evaluate`."""

    @property
    def name(self) -> str:
        """What a part must be of to be taken for this chunk's."""
        return _digest(self.records, self.contestant.label)

    @property
    def steps(self) -> int:
        """How often `evaluate` tells of progress."""
        return steps_of(len(self.records), self.options["mode"], self.options["every"])


def evaluate_run(
    model: Model | Executor,
    contestants: Sequence[Contestant],
    records: Iterable[Any],
    *,
    out: str | Path,
    mode: str = "independent",
    every: int | None = None,
    generations: int | None = None,
    others: Others = other_facts,
    references: References | None = None,
    batch: int = BATCH,
    progress: RunProgress = lambda done, total, label: None,
) -> pd.DataFrame:
    """`evaluate` of several editors on the same records, kept in the folder `out`; all rows, and their means in `table.csv`.

    The same call goes on where an earlier one stopped. Neither that, nor `batch`, nor the number of workers changes a number by more than
    1e-5. A part is `batch` records of one editor; in sequential and batch mode, where edits build on one another, all its records,
    so that an editor that was stopped there begins anew.

    Args:
        model: a hooked model without edits, or an `executors.OnRay` for several workers.
        contestants: the editors, in the order of the table.
        records: of CounterFact's or of zsRE's form.
        out: the run's folder.
        mode: as in `evaluate`, as are `every`, `generations`, `others`, `references`, `batch`.
        progress: told (steps done, steps in all, editor).

    Raises:
        PlanError: no editor or two of one name, or what `evaluate` refuses.
        RunError: `out` holds a run with another configuration, or another process is at work on it.
        OutputError: `out` cannot be written, or the disk is full. What was finished is kept.
    """
    begun, out, asked = time.perf_counter(), Path(out), list(records)
    executor = InProcess(model) if isinstance(model, models.Model) else model
    labels = [each.label for each in contestants]
    if not labels or len(set(labels)) < len(labels):
        raise PlanError(f"editors need a name each, not {', '.join(labels) or 'none at all'}")
    options = {"mode": mode, "every": every, "generations": generations}
    more = {"others": others, "references": references, "batch": batch}
    with locked(out):
        about = executor.call(_describe, None)
        config = {
            "model": {key: about[key] for key in ("model", "fingerprint", "dtype")},
            "records": {"asked": len(asked), "sha256": _digest(asked)},
            "editors": {each.label: _settings(each) for each in contestants},
            "measured": {**options, "references": _about(references), "others": name_of(others)},
        }
        store = open_store(out, config, about)
        chunks = _cut(contestants, asked, {**options, **more})
        try:
            _do_missing(store, executor, chunks, about["fingerprint"], progress)
            return _put_together(store, chunks)
        finally:
            versions = {key: about[key] for key in ("device", "python", "versions")}
            seconds = time.perf_counter() - begun
            store.add_session(seconds, {"workers": executor.workers, **versions})


def do_chunk(model: Model, chunk: _Chunk, progress: Progress = no_progress) -> Rows:
    """The rows of a chunk, with the fingerprint of the model that gave them."""
    of = chunk.contestant
    frame = evaluate(
        model,
        of.editor,
        chunk.records,
        config=of.config,
        label=of.label,
        progress=progress,
        **chunk.options,
    )
    return Rows(frame, {"chunk": chunk.name, "fingerprint": remembered_fingerprint(model)})


def _describe(model: Model, _: None) -> dict[str, Any]:
    return provenance(model)


# -- configuration ---------------------------------------------------------------------------------


def _settings(of: Contestant) -> dict[str, Any]:
    """What an editor's rows depend on, as YAML can hold it."""
    given = of.config
    if is_dataclass(given) and not isinstance(given, type):
        given = asdict(given)
    config = {k: _simple(v) for k, v in given.items()} if isinstance(given, Mapping) else given
    if of.editor is None:
        return {"editor": NONE}
    home = getattr(of.editor, "__module__", type(of.editor).__module__)
    return {"editor": f"{home}.{name_of(of.editor)}", "config": _simple(config)}


def _simple(value: Any) -> Any:
    """Numbers, texts and what is made of them as they are; anything else by how it prints."""
    if isinstance(value, Mapping):
        return {str(key): _simple(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_simple(each) for each in value]
    return value if isinstance(value, str | int | float | None) else repr(value)


def _about(references: References | None) -> str:
    if references is None:
        return "bundled"
    keys = sorted(references.texts)
    texts = [[*key, *references.texts[key]] for key in keys]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def _digest(records: Sequence[Any], *more: str) -> str:
    """sha256 over records, and over what else is to be told apart."""
    return hashlib.sha256(json.dumps([*more, *map(asdict, records)]).encode()).hexdigest()


# -- parts -----------------------------------------------------------------------------------------


def _cut(
    contestants: Sequence[Contestant], records: Sequence[Any], options: Mapping[str, Any]
) -> list[_Chunk]:
    """Every part, editor by editor."""
    size = options["batch"] if options["mode"] == "independent" else max(1, len(records))
    return [
        _Chunk(contestant, tuple(records[start : start + size]), options)
        for contestant in contestants
        for start in range(0, max(1, len(records)), max(1, size))
    ]


def _do_missing(
    store: Store,
    executor: Executor,
    chunks: Sequence[_Chunk],
    fingerprint: str,
    progress: RunProgress,
) -> None:
    """Do what is not done, and keep each part when it is finished.

    Raises:
        RunError: a worker has another model than the run.
    """
    todo = [number for number, chunk in enumerate(chunks) if _done(store, number, chunk) is None]
    total = sum(chunk.steps for chunk in chunks)
    done = total - sum(chunks[number].steps for number in todo)

    def here(model: Model, chunk: _Chunk) -> Rows:
        label = chunk.contestant.label
        return do_chunk(model, chunk, lambda one, _: progress(done + one, total, label))

    # A worker elsewhere cannot tell of each step.
    work = here if isinstance(executor, InProcess) else do_chunk
    for place, rows in executor.map(work, [chunks[number] for number in todo]):
        chunk = chunks[todo[place]]
        if rows.about["fingerprint"] != fingerprint:
            raise RunError(
                f"the model is another one than the run's (fingerprint {rows.about['fingerprint'][:12]}, not "
                f"{fingerprint[:12]}): a worker loaded other weights, or an editor left its edit in them"
            )
        store.write(todo[place], rows)
        done += chunk.steps
        progress(done, total, chunk.contestant.label)


def _done(store: Store, number: int, chunk: _Chunk) -> pd.DataFrame | None:
    """The rows of a finished part; None where there are none, or those of other records."""
    found = store.read_rows(number)
    whole = found is not None and found.about.get("chunk") == chunk.name
    return found.frame if found is not None and whole else None


def _put_together(store: Store, chunks: Sequence[_Chunk]) -> pd.DataFrame:
    """All rows, and their table, in the order of editors and records, whatever order they were done in."""
    frames = []
    for number, chunk in enumerate(chunks):
        rows = _done(store, number, chunk)
        if rows is None:
            raise OutputError(
                f"{store.part(number)} cannot be read back; run the same command again"
            )
        frames.append(rows)
    whole = pd.concat(frames, ignore_index=True)
    with written_whole(store.folder / RECORDS) as partial:
        whole.to_parquet(partial)
    if len(whole):
        with written_whole(store.folder / TABLE) as partial:
            table(whole).to_csv(partial, index=False)
    return whole
