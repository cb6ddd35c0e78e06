"""zsRE's three scores (ROME, Section 3.2 and Table 1): which tokens of three answers a model ranks first.

All are accuracies of teacher-forced tokens, mean over the tokens of an answer, then over records.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd
from jaxtyping import Bool
from torch import Tensor

from factlens import metrics
from factlens.benchmarks.mentions import mentioned, plain_name
from factlens.benchmarks.zsre import Record
from factlens.engines.problems import Progress, no_progress
from factlens.errors import EditError, PlanError
from factlens.metrics import token_accuracy
from factlens.models import Model
from factlens.scoring import Benchmark, Texts, means

SCORING = "token-argmax/teacher-forced"
PROTOCOL = f"{SCORING}/independent/1"
"""Scoring, decoding, mode and version: the paper's zsRE, each edit alone."""
SCORES = ("efficacy", "paraphrase", "specificity")
COLUMNS = ("case_id", "subject", "editor", *SCORES, "protocol")
BATCH = 64
"""Records that are scored between two reports of progress."""


def record_scores(
    rewrite: Bool[Tensor, " rewrite_token"],
    paraphrase: Bool[Tensor, " paraphrase_token"],
    unrelated: Bool[Tensor, " unrelated_token"],
) -> dict[str, float]:
    """The three scores of one record, from the tokens that rank first at each of `Record.asked`.

    Efficacy and paraphrase count the new answer's tokens, after the question and after its other wording. Specificity counts
    those of the unrelated question's gold answer: accuracy, not agreement with the unedited model, which may be wrong too.
    """
    hits = (rewrite, paraphrase, unrelated)
    return {name: token_accuracy(each) for name, each in zip(SCORES, hits, strict=True)}


def measure(
    model: Model,
    records: Iterable[Record],
    *,
    label: str = "none",
    progress: Progress = no_progress,
) -> pd.DataFrame:
    """The scores of the model as it stands: one row a record, of the edited model inside `with applied(model, edit):`.

    Columns: `case_id, subject, editor`, the three scores as shares, `protocol`.
    Differs from the paper's code: tokens go into the model as they are, where the code decodes each and tokenizes it again, which
    changes those that hold a part of a character.

    Args:
        model: a hooked model.
        records: of zsRE's form, from a file or of atlas.
        label: the value of `editor`; "none" is the unedited model.
        progress: told (records measured, records in all).

    Raises:
        PromptTooLong: a question and its answer do not fit the context.
        EditError: the model gives NaN.
    """
    listed = list(records)
    rows: list[dict[str, object]] = []
    for start in range(0, len(listed), BATCH):
        rows += _rows(model, listed[start : start + BATCH], label)
        progress(len(rows), len(listed))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _rows(model: Model, records: Sequence[Record], label: str) -> list[dict[str, object]]:
    scored = metrics.score(model, [pair for record in records for pair in record.asked])
    if bool(scored.nll.isnan().any()):
        raise EditError("the model gives NaN; edit it less, or load it in float32")
    hits = iter(scored.hits)
    return [
        {
            "case_id": record.case_id,
            "subject": record.subject,
            "editor": label,
            **record_scores(next(hits), next(hits), next(hits)),
            "protocol": PROTOCOL,
        }
        for record in records
    ]


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """The means of `measure`'s scores in per cent, one row for each editor: Table 1.

    Columns: `editor`, each score with its `..._margin`, half of the 95 % interval over records, `n` records, `protocol`.

    Raises:
        PlanError: numbers of another protocol, which do not compare, or no numbers.
    """
    if sorted(set(frame["protocol"])) != [PROTOCOL]:
        found = " and ".join(sorted(set(frame["protocol"]))) or "none"
        raise PlanError(f"a table of zsRE has numbers of {PROTOCOL}, not of {found}")
    rows = []
    for name, group in frame.groupby("editor", sort=False):
        rows.append({"editor": name, **means(group, SCORES), "n": len(group), "protocol": PROTOCOL})
    return pd.DataFrame(rows)


# -- in the loop of an evaluation ------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A record, and whether its unrelated question can be asked."""

    record: Record
    spared: bool
    """No other edit on the model is about what it asks."""


def cases(
    model: Model, records: Sequence[Record], others: object = None, together: Sequence[Record] = ()
) -> list[Case]:
    """The records. Where the edits of `together` are on the model at once, an unrelated question that names one of their subjects is not asked."""
    names = {plain_name(each.subject) for each in together}
    return [Case(record, not mentioned(record.loc, names)) for record in records]


def measure_case(model: Model, case: Case, texts: Texts | None = None) -> dict[str, object]:
    """The three scores of a case; specificity is NaN where the question is not asked. Raises what `measure` raises."""
    (row,) = _rows(model, [case.record], "")
    scores = {name: row[name] for name in SCORES}
    return scores if case.spared else {**scores, "specificity": float("nan")}


ZSRE = Benchmark(
    name="zsre",
    record=Record,
    scoring=SCORING,
    labels=("case_id", "subject"),
    scores=SCORES,
    text_scores=(),
    counts=(),
    lacking=lambda record: "",
    cases=cases,
    measure=measure_case,
)
