"""zsRE's three scores (ROME, Section 3.2 and Table 1): which tokens of three answers a model ranks first.

All are accuracies of teacher-forced tokens, mean over the tokens of an answer, then over records.
"""

from collections.abc import Iterable, Sequence

import pandas as pd
from jaxtyping import Bool
from torch import Tensor

from factlens import metrics
from factlens.benchmarks.zsre import Record
from factlens.engines.problems import Progress, no_progress
from factlens.errors import EditError, PlanError
from factlens.metrics import half_width, token_accuracy
from factlens.models import Model

PROTOCOL = "token-argmax/teacher-forced/independent/1"
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
        row: dict[str, object] = {"editor": name}
        for score in SCORES:
            row[score] = 100 * group[score].mean()
            row[f"{score}_margin"] = 100 * half_width(group[score])
        rows.append({**row, "n": len(group), "protocol": PROTOCOL})
    return pd.DataFrame(rows)
