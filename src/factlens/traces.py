"""A `Trace`: the frame of measured cells and everything needed to understand it later."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from factlens.engines.problems import SIGNS
from factlens.errors import FactError, TraceFileError
from factlens.facts import Fact
from factlens.files import written_whole
from factlens.plans import CELL

FORMAT = "factlens-trace/1"
_KEY = b"factlens"


@dataclass(frozen=True)
class Trace:
    """Causal traces of one or several facts.

    `frame` has one row for each cell, the columns of its plan (`fact, kind, window, severed, layer, position, token,
    role`, and `head` for sites with heads) and what was measured: `prob_clean, prob_corrupted, prob_restored`, means over noise samples,
    `sample_sd` (of the restored quantity over samples), `effect` (restored minus corrupted: the indirect effect), and
    with another metric its three columns `logprob_*`, `logit_diff_*` or `kl_*`, which `effect` and `sample_sd` then refer to.
    """

    frame: pd.DataFrame
    facts: tuple[Fact, ...]
    answers: tuple[str, ...]
    """What was measured for each fact, as text."""
    subjects: tuple[tuple[int, int], ...]
    """Each fact's subject tokens, half-open."""
    lengths: tuple[int, ...]
    """How many tokens each fact's prompt has."""
    info: dict[str, Any] = field(default_factory=dict)
    """Model, fingerprint, processing, noise, level and its source, samples, seed, metric, engine, `prefix_reuse`,
    `fallback_reason`, seconds, versions."""
    skipped: tuple[tuple[str, str], ...] = ()
    """(prompt, reason) of facts that were not traced."""

    def __len__(self) -> int:
        return len(self.facts)

    @property
    def engine(self) -> str:
        """Which engine ran: "one-pass" or "plain"."""
        return str(self.info["engine"])

    @property
    def prefix_reuse(self) -> bool:
        """Whether fork passes attended to stored keys and values instead of running the prefix again."""
        return bool(self.info["prefix_reuse"])

    @property
    def fallback_reason(self) -> str | None:
        """Why `engine="auto"` took the plain engine, if it did."""
        return self.info.get("fallback_reason")

    def totals(self) -> pd.DataFrame:
        """One row for each fact: `fact, prompt, subject, answer, clean, corrupted, last_is_subject, total_effect`.

        `total_effect` is TE (Section 2.1); `last_is_subject` marks prompts that end with their subject.
        """
        metric = self.info["metric"]
        first = self.frame.groupby("fact", sort=True).first()
        return pd.DataFrame(
            {
                "fact": first.index,
                "prompt": [fact.prompt for fact in self.facts],
                "subject": [fact.subject for fact in self.facts],
                "answer": list(self.answers),
                "clean": first[f"{metric}_clean"].to_numpy(),
                "corrupted": first[f"{metric}_corrupted"].to_numpy(),
                "last_is_subject": [
                    end == length
                    for (_, end), length in zip(self.subjects, self.lengths, strict=True)
                ],
                "total_effect": SIGNS.get(metric, 1.0)
                * (first[f"{metric}_clean"] - first[f"{metric}_corrupted"]).to_numpy(),
            }
        )

    def strongest(self, count: int = 5, *, kind: str = "state") -> pd.DataFrame:
        """The `count` cells of `kind` with the largest effect. The embedding control is left out."""
        cells = self.frame[(self.frame["kind"] == kind) & (self.frame["layer"] >= 0)]
        return cells.nlargest(count, "effect").reset_index(drop=True)

    def select(self, fact: int) -> "Trace":
        """The trace of one fact, by its number.

        Raises:
            FactError: no such fact.
        """
        if not 0 <= fact < len(self):
            raise FactError(
                f"the trace has {len(self)} facts, counted from 0; there is no fact {fact}"
            )
        frame = self.frame[self.frame["fact"] == fact].assign(fact=0).reset_index(drop=True)
        return replace(
            self,
            frame=frame,
            facts=(self.facts[fact],),
            answers=(self.answers[fact],),
            subjects=(self.subjects[fact],),
            lengths=(self.lengths[fact],),
            skipped=(),
        )

    def compare(self, other: "Trace") -> pd.DataFrame:
        """Both traces' effects side by side for the cells they share, and `difference` (other minus this).

        Raises:
            FactError: the two share no cell, or measured different quantities.
        """
        if self.info["metric"] != other.info["metric"]:
            raise FactError(
                f"one trace measured {self.info['metric']}, the other {other.info['metric']}; "
                "effects in different units cannot be compared"
            )
        head = [name for name in ("head",) if name in self.frame and name in other.frame]
        keys = ["fact", *CELL, "token", "role", *head]
        both = self.frame[[*keys, "effect"]].merge(
            other.frame[[*keys, "effect"]], on=keys, suffixes=("", "_other")
        )
        if both.empty:
            raise FactError(
                "the two traces share no cell: other prompts, kinds, windows or severings"
            )
        return both.assign(difference=both["effect_other"] - both["effect"])

    def save(self, path: str | Path) -> Path:
        """Write the frame as Parquet with everything else in its metadata; `load` reads it back.

        Raises:
            OutputError: the place cannot be written. Nothing half-written stays behind.
        """
        about = {
            "format": FORMAT,
            "facts": [asdict(fact) for fact in self.facts],
            "answers": self.answers,
            "subjects": self.subjects,
            "lengths": self.lengths,
            "info": self.info,
            "skipped": self.skipped,
        }
        table = pa.Table.from_pandas(self.frame, preserve_index=False)
        metadata = {**(table.schema.metadata or {}), _KEY: json.dumps(about).encode()}
        with written_whole(path) as partial:
            pq.write_table(table.replace_schema_metadata(metadata), partial)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        """Read a trace that `save` wrote.

        Raises:
            TraceFileError: not there, corrupt, or not a trace.
        """
        try:
            table = pq.read_table(path)
            about = json.loads((table.schema.metadata or {})[_KEY])
            if about["format"] != FORMAT:
                raise TraceFileError(
                    f"{path} is in the format {about['format']!r}; this factlens reads {FORMAT!r}"
                )
            return cls(
                frame=table.to_pandas(),
                facts=tuple(Fact(**each) for each in about["facts"]),
                answers=tuple(about["answers"]),
                subjects=tuple((int(b), int(e)) for b, e in about["subjects"]),
                lengths=tuple(int(length) for length in about["lengths"]),
                info=about["info"],
                skipped=tuple((str(p), str(r)) for p, r in about["skipped"]),
            )
        except FileNotFoundError:
            raise TraceFileError(f"there is no trace at {path}") from None
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, TraceFileError):
                raise
            line = str(error).split("\n")[0][:120]
            raise TraceFileError(f"{path} is no trace, or is damaged ({line})") from None


def common_info(traces: Sequence[Trace]) -> dict[str, Any]:
    """How several traces were had, as `Trace.info` says it of all of them together.

    `samples` is the most of any: symmetric replacement may find fewer other subjects than were asked for.
    """
    engines = {each.info["engine"] for each in traces}
    reasons = [each.info["fallback_reason"] for each in traces if each.info["fallback_reason"]]
    return {
        "samples": max(each.info["samples"] for each in traces),
        "engine": engines.pop() if len(engines) == 1 else "mixed",
        "prefix_reuse": all(each.info["prefix_reuse"] for each in traces),
        "fallback_reason": reasons[0] if reasons else None,
    }


def concat(traces: Sequence[Trace]) -> Trace:
    """One trace of all the facts, numbered on. Settings are taken from the first.

    Raises:
        FactError: no traces.
    """
    if not traces:
        raise FactError("no traces to put together")
    frames, offset = [], 0
    for each in traces:
        frames.append(each.frame.assign(fact=each.frame["fact"] + offset))
        offset += len(each)
    return replace(
        traces[0],
        frame=pd.concat(frames, ignore_index=True),
        facts=tuple(fact for each in traces for fact in each.facts),
        answers=tuple(answer for each in traces for answer in each.answers),
        subjects=tuple(span for each in traces for span in each.subjects),
        lengths=tuple(length for each in traces for length in each.lengths),
        skipped=tuple(skip for each in traces for skip in each.skipped),
    )
