"""What `factlens paper` leaves in its folder, read back for its report."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from factlens import editors
from factlens.averages import read_run
from factlens.benchmarks.counterfact import Record
from factlens.edits import applied
from factlens.errors import PlanError, RunError
from factlens.evaluation_runs import RECORDS
from factlens.generation import generate
from factlens.models import Model, cfg
from factlens.rating_texts import LENGTH, TOP_K, edits_of, new_fact
from factlens.summaries import Summary
from factlens.traces import Trace

FIGURE_1, AVERAGE, FIGURE_5 = "figure-1", "average", "figure-5"
COUNTERFACT, TEXTS, ZSRE = "counterfact", "texts", "zsre"
FIGURE_6, TABLE_3 = "figure-6.csv", "table-3.csv"
OF_TEXTS = ("GE", "RS", "free", "free_paraphrase", "text_protocol")
"""Columns of evaluations that generate texts."""


@dataclass(frozen=True)
class Results:
    """The folder of `factlens paper`, each part read when it is asked for.

    Raises:
        RunError: a part is not there yet.
    """

    folder: Path

    @cached_property
    def trace(self) -> Trace:
        """Of one fact (Figure 1)."""
        return Trace.load(self._there(f"{FIGURE_1}/trace.parquet"))

    @cached_property
    def summary(self) -> Summary:
        """The run of many facts (Section 2)."""
        return Summary(read_run(self.folder / AVERAGE))

    @cached_property
    def counterfact(self) -> pd.DataFrame:
        """The rows of all editors (Table 2), with the scores of texts of those records for which texts were generated."""
        rows = pd.read_parquet(self._there(f"{COUNTERFACT}/{RECORDS}"))
        written = pd.read_parquet(self._there(f"{TEXTS}/{RECORDS}"))
        keys = ["editor", "case_id"]
        return rows.merge(written[[*keys, *OF_TEXTS]], on=keys, how="left")

    @cached_property
    def zsre(self) -> pd.DataFrame:
        """The rows of all editors on zsRE (Table 1)."""
        return pd.read_parquet(self._there(f"{ZSRE}/{RECORDS}"))

    @cached_property
    def swept(self) -> pd.DataFrame:
        """ROME at every layer and token (Figure 5)."""
        return pd.read_parquet(self._there(f"{FIGURE_5}/{RECORDS}"))

    @cached_property
    def texts(self) -> pd.DataFrame:
        """What the editors write (Figure 6)."""
        return pd.read_csv(self._there(FIGURE_6), keep_default_na=False)

    @cached_property
    def composition(self) -> pd.DataFrame:
        """What the records are made of (Table 3)."""
        return pd.read_csv(self._there(TABLE_3))

    def _there(self, name: str) -> Path:
        path = self.folder / name
        if not path.exists():
            raise RunError(f"{path} is not there yet; `factlens paper` goes on and makes it")
        return path


def side_by_side(
    model: Model,
    contestants: Mapping[str, tuple[editors.Editor | None, Any]],
    records: Sequence[Record],
    *,
    prompts: int = 2,
) -> pd.DataFrame:
    """What each editor's model writes about the same new facts (ROME, Figure 6): `case_id, new_fact, editor, prompt, text`.

    Drawn from the 5 likeliest tokens with the record's number as seed, so that texts differ by the edits alone. An edit that fails has its
    reason in the place of texts. The model is left as it was.

    Args:
        model: a hooked model without edits.
        contestants: by name an editor with its config; None writes with the unedited model.
        records: CounterFact records.
        prompts: generation prompts of each.

    Raises:
        PlanError: a record without generation prompts.
    """
    rows = []
    for record in records:
        asked = list(dict.fromkeys(record.generation_prompts))[:prompts]
        if not asked:
            raise PlanError(f"record {record.case_id} has no generation prompts; give another")
        length = min(LENGTH, int(cfg(model).n_ctx))
        for name, (editor, config) in contestants.items():
            (edit,) = edits_of(model, editor, [record], config)
            if isinstance(edit, str):
                written = [f"{prompt} ({edit})" for prompt in asked]
            else:
                with nullcontext() if edit is None else applied(model, edit):
                    written = generate(
                        model, asked, max_tokens=length, top_k=TOP_K, seed=record.case_id
                    )
            rows += [
                (record.case_id, new_fact(record), name, prompt, text[len(prompt) :])
                for prompt, text in zip(asked, written, strict=True)
            ]
    return pd.DataFrame(rows, columns=["case_id", "new_fact", "editor", "prompt", "text"])
