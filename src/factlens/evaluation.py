"""How well edits hold: model x editor x records -> one row per record -> a table (ROME, Section 3.3).

Records are independent: each is edited into the model as it was given, measured, and taken back bit for bit.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from factlens import editors, metrics
from factlens.benchmarks.atlas_counterfact import other_facts
from factlens.benchmarks.counterfact import Record
from factlens.edits import Edit, applied
from factlens.engines.problems import Progress, no_progress
from factlens.errors import EditError, FactError, FactWarning, PlanError
from factlens.facts import Fact
from factlens.metrics import PROTOCOL, harmonic_mean, magnitude, success
from factlens.models import Model

BATCH = 16
"""Records whose edits an editor may optimise side by side."""
NONE = "none"
"""The editor's name of the unedited model."""
SCORES = ("ES", "EM", "PS", "PM", "NS", "NM", "target_first", "retention")
"""Columns of shares and of differences of probability; `S` is made of the means of ES, PS and NS."""
FAILURES = (EditError, FactError)
"""What a single record can do wrong; of anything else the next one would die too."""

Pair = tuple[str, str]
"""A prompt and a target."""
Others = Callable[[Record], Sequence[Fact]]
"""Gives the other facts of a record's subject, which should survive."""


def evaluate(
    model: Model,
    editor: editors.Editor | None,
    records: Iterable[Record],
    *,
    config: Any = None,
    others: Others = other_facts,
    label: str | None = None,
    batch: int = BATCH,
    progress: Progress = no_progress,
) -> pd.DataFrame:
    """Edit each record by itself, measure it, and undo it; the model is left as it was, bit for bit.

    Columns: `case_id, subject, relation_id, editor`, the scores, `n_other, protocol, reason`. ES, PS and NS are the shares of the
    record's prompts at which the edit succeeds, EM, PM and NM the mean differences of probability (REFERENCE, section 3);
    `target_first` says whether the edited model goes on from the rewrite's prompt with the new object, and `retention` is the share
    of the subject's `n_other` sentences that were known before the edit and still are, NaN where there were none. A record whose
    edit fails has its reason and NaN for scores.

    Args:
        model: a hooked model without edits.
        editor: `(model, rewrite, config) -> Edit`; None measures the unedited model, the control.
        records: CounterFact records, from a file or of atlas.
        config: given to the editor as it is.
        others: the facts that `retention` asks; by default those that the bundled tables have.
        label: what to call the editor in the frame; its own name by default.
        batch: records whose edits may be optimised side by side, where the editor can.
        progress: told (records measured, records in all).
    """
    asked = list(records)
    name = label or (NONE if editor is None else _name(editor))
    rows: list[dict[str, object]] = []
    for start in range(0, len(asked), batch):
        chunk = asked[start : start + batch]
        known = _spared(lambda some: _known(model, some, others), chunk)
        edits = _spared(lambda some: _edits(model, editor, some, config), chunk)
        for record, pairs, edit in zip(chunk, known, edits, strict=True):
            rows.append(_row(model, record, pairs, edit) | {"editor": name})
            progress(len(rows), len(asked))
    columns = [
        "case_id",
        "subject",
        "relation_id",
        "editor",
        *SCORES,
        "n_other",
        "protocol",
        "reason",
    ]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.astype(dict.fromkeys(SCORES, float))


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """The means of `evaluate`'s scores, in per cent, one row for each editor of the frame.

    Columns: `editor, S`, each score with its `..._margin`, half of the 95 % interval over records, then `n` records measured,
    `n_retention` of them with other facts that were known, `failed` records without an edit, `protocol`. S is the harmonic
    mean of the means of ES, PS and NS.

    Raises:
        PlanError: numbers of several protocols, which do not compare, or no numbers.
    """
    protocols = sorted(set(frame["protocol"]))
    if len(protocols) != 1:
        found = " and ".join(protocols) or "none"
        raise PlanError(f"a table has numbers of one protocol, not of {found}; make one for each")
    rows = []
    for name, group in frame.groupby("editor", sort=False):
        measured = group[group["reason"] == ""]
        means = measured[list(SCORES)].mean()
        row = {"editor": name, "S": 100 * harmonic_mean(means[["ES", "PS", "NS"]])}
        for score in SCORES:
            row[score] = 100 * means[score]
            row[f"{score}_margin"] = 100 * metrics.half_width(measured[score])
        row["n"] = len(measured)
        row["n_retention"] = int(measured["retention"].notna().sum())
        row["failed"] = len(group) - len(measured)
        rows.append({**row, "protocol": protocols[0]})
    return pd.DataFrame(rows)


# -- one record ------------------------------------------------------------------------------------


def _name(editor: editors.Editor) -> str:
    return str(getattr(editor, "__name__", type(editor).__name__))


def _spared(do: Callable[[Sequence[Record]], list], records: Sequence[Record]) -> list:
    """What `do` gives for each record, or why it gives nothing: one bad record does not take the others with it."""
    try:
        return do(records)
    except FAILURES as error:
        if len(records) == 1:
            return [_reason(error)]
    return [found for record in records for found in _spared(do, [record])]


def _edits(
    model: Model, editor: editors.Editor | None, records: Sequence[Record], config: Any
) -> list[Edit | None]:
    """The edit of each record; None without an editor."""
    if editor is None:
        return [None] * len(records)
    with warnings.catch_warnings():
        # Whether an edit takes is what is measured; a line for each of hundreds would hide what is not.
        for said in ("the edit of .* did not take", "the model says .* already"):
            warnings.filterwarnings("ignore", said, FactWarning)
        return [*editors.each(editor, model, [record.rewrite for record in records], config)]


def _known(model: Model, records: Sequence[Record], others: Others) -> list[list[Pair]]:
    """(prompt, object) of each record's other facts that the unedited model says."""
    asked = [[(fact.prompt, str(fact.object)) for fact in others(record)] for record in records]
    said = iter(metrics.score(model, [pair for some in asked for pair in some]).ranked_first)
    return [[pair for pair in some if next(said)] for some in asked]


def _row(
    model: Model, record: Record, known: list[Pair] | str, edit: Edit | str | None
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "case_id": record.case_id,
        "subject": record.subject,
        "relation_id": record.relation_id,
        **dict.fromkeys(SCORES, float("nan")),
        "n_other": 0,
        "protocol": PROTOCOL,
        "reason": "",
    }
    if isinstance(known, str) or isinstance(edit, str):
        return {**row, "reason": edit if isinstance(edit, str) else known}
    try:
        return {**row, **_measured(model, record, known, edit)}
    except FAILURES as error:
        return {**row, "reason": _reason(error)}


def _measured(
    model: Model, record: Record, known: list[Pair], edit: Edit | None
) -> dict[str, object]:
    """The scores of a record under its edit."""
    prompts = [record.rewrite.prompt, *record.paraphrase_prompts, *record.neighborhood_prompts]
    asked = [
        (prompt, target.text)
        for target in (record.target_new, record.target_true)
        for prompt in prompts
    ]
    with contextlib.nullcontext() if edit is None else applied(model, edit):
        scored = metrics.score(model, [*asked, *known])
    if bool(scored.nll.isnan().any()):
        raise EditError("the edited model gives NaN; use a smaller max_norm_ratio, or float32")
    new, true, _ = scored.nll.split([len(prompts), len(prompts), len(known)])
    return {
        **_scores(new, true, len(record.paraphrase_prompts)),
        "target_first": float(scored.ranked_first[0]),
        "retention": float(scored.ranked_first[len(asked) :].double().mean()),
        "n_other": len(known),
    }


def _scores(
    new: Float[Tensor, " prompt"], true: Float[Tensor, " prompt"], paraphrases: int
) -> dict[str, object]:
    """ES to NM, from both targets' nll at the rewrite's prompt, its paraphrases, then the neighbours."""
    said, near = slice(1, 1 + paraphrases), slice(1 + paraphrases, None)
    return {
        "ES": success(new[:1], true[:1]),
        "EM": magnitude(new[:1], true[:1]),
        "PS": success(new[said], true[said]),
        "PM": magnitude(new[said], true[said]),
        "NS": success(true[near], new[near]),
        "NM": magnitude(true[near], new[near]),
    }


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
