"""Rows of an evaluation, one record under its edits: each edit alone, one after another, or all as one.

What can go wrong with a single record is its row's reason; the others are measured all the same.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from factlens import editors, metrics
from factlens.benchmarks.mentions import plain_name
from factlens.benchmarks.record_files import Unusable
from factlens.benchmarks.references import unrelated
from factlens.counterfact_scores import Others
from factlens.edits import Edit, applied
from factlens.engines.problems import is_out_of_memory
from factlens.errors import EditError, FactError, FactlensError
from factlens.fingerprints import remembered_fingerprint
from factlens.metrics import MODES, next_logprobs
from factlens.models import Model
from factlens.scoring import Benchmark, Texts, text_protocol

FAILURES = (EditError, FactError)
"""What a single record can do wrong; of anything else the next one would die too."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Session:
    """What does not change from record to record."""

    model: Model
    editor: editors.Editor | None
    config: Any
    of: Benchmark
    mode: str
    others: Others
    texts: Texts | None
    name: str

    unedited: dict[str, Float[Tensor, "token d_vocab"]] = field(default_factory=dict)
    """What the unedited model says after each token of unrelated texts, by text."""

    def lacking(self, record: Any) -> str:
        """Why a record cannot be measured; empty if it can."""
        return record.reason if isinstance(record, Unusable) else self.of.lacking(record)


# -- three ways ------------------------------------------------------------------------------------


def _independent(
    session: Session, records: Sequence[Any], batch: int, points: Sequence[int]
) -> Iterator[Row]:
    for start in range(0, len(records), batch):
        chunk = records[start : start + batch]
        cases = _cases(session, chunk, ())
        _hear(session, [text for record in chunk for text in _unrelated([record])])
        fine = [record for record, case in zip(chunk, cases, strict=True) if not _failed(case)]
        edits = iter(_spared(lambda some: _each_edit(session, some), fine, _is_the_editors))
        for record, case in zip(chunk, cases, strict=True):
            edit = case if _failed(case) else next(edits)
            after = int(session.editor is not None)
            yield _row(session, record, case, edit, after, _unrelated([record]))


def _batch(
    session: Session, records: Sequence[Any], batch: int, points: Sequence[int]
) -> Iterator[Row]:
    cases, fine, apart = _all_cases(session, records, batch)
    edit: Edit | str | None = None
    if session.editor is not None and fine:
        (edit,) = _spared(lambda some: [_edit_of(session, fine)], [None], _is_the_editors)
    after = len(fine) if isinstance(edit, Edit) else 0
    for record, case in zip(records, cases, strict=True):
        yield _row(session, record, case, edit, after, apart)


def _sequential(
    session: Session, records: Sequence[Any], batch: int, points: Sequence[int]
) -> Iterator[Row | None]:
    cases, _, apart = _all_cases(session, records, batch)
    total, after, made = None, 0, []
    for number, (record, case) in enumerate(zip(records, cases, strict=True), 1):
        longer = case if _failed(case) else _with_one_more(session, record, total)
        if isinstance(longer, Edit):
            total, after = longer, after + 1
        made.append(longer)
        yield None
        if number in points:
            for each, its, found in zip(records, cases, made, strict=False):
                edit = found if _failed(found) else total
                yield _row(session, each, its, edit, after, apart)


WAYS: dict[str, Callable[..., Iterator[Row | None]]] = dict(
    zip(MODES, (_independent, _sequential, _batch), strict=True)
)
"""By mode: `(session, records, batch, points) -> rows`, with None for a record that was edited and is measured later."""


def _with_one_more(session: Session, record: Any, total: Edit | None) -> Edit | str | None:
    """The edits so far and the record's, computed on top of them, as one edit of the unedited model; or why there is none.

    One edit, so that the weights below are kept once and not once for each of thousands.
    """
    model = session.model
    if session.editor is None:
        return None
    try:
        with contextlib.nullcontext() if total is None else applied(model, total):
            (edit,) = _spared(lambda some: [_edit_of(session, some[0])], [record], _is_the_editors)
            if isinstance(edit, str):
                return edit
            with applied(model, edit):  # Whether it is one of this model, and fits.
                pass
        own = Edit(edit.changes, {"fingerprint": remembered_fingerprint(model)})
        return own if total is None else total + own
    except FAILURES as error:
        return _reason(error)


# -- records ---------------------------------------------------------------------------------------


def _failed(found: object) -> bool:
    return isinstance(found, str)


def _all_cases(
    session: Session, records: Sequence[Any], batch: int
) -> tuple[list[Any], list[Any], tuple[str, ...]]:
    """The case of each record, or why there is none; the records that have one, whose edits are on the model together; unrelated texts."""
    together = [record for record in records if not session.lacking(record)]
    cases = [
        case
        for start in range(0, len(records), batch)
        for case in _cases(session, records[start : start + batch], together)
    ]
    fine = [record for record, case in zip(records, cases, strict=True) if not _failed(case)]
    apart = _unrelated(fine)
    _hear(session, apart)
    return cases, fine, apart


def _cases(session: Session, records: Sequence[Any], together: Sequence[Any]) -> list[Any]:
    """The case of each record, of the unedited model, or why there is none."""
    of, lacks = session.of, [session.lacking(record) for record in records]
    whole = [record for record, reason in zip(records, lacks, strict=True) if not reason]
    made = iter(
        _spared(lambda some: of.cases(session.model, some, session.others, together), whole)
    )
    return [reason or next(made) for reason in lacks]


def _is_a_records(error: Exception) -> bool:
    return isinstance(error, FAILURES)


def _is_the_editors(error: Exception) -> bool:
    """Also whatever an editor of somebody else may raise; not what factlens refuses for all records, nor a lack of memory."""
    general = isinstance(error, FactlensError | MemoryError) or is_out_of_memory(error)
    return isinstance(error, FAILURES) or not general


def _spared(
    do: Callable[[Sequence[Any]], list],
    records: Sequence[Any],
    is_its_own: Callable[[Exception], bool] = _is_a_records,
) -> list:
    """What `do` gives for each record, or why it gives nothing: one bad record does not take the others with it."""
    if not records:
        return []
    try:
        return do(records)
    except Exception as error:
        if not is_its_own(error):
            raise
        if len(records) == 1:
            return [_reason(error)]
    return [found for record in records for found in _spared(do, [record], is_its_own)]


def _each_edit(session: Session, records: Sequence[Any]) -> list[Edit | None]:
    """The edit of each record by itself; None without an editor."""
    if session.editor is None:
        return [None] * len(records)
    rewrites = [record.rewrite for record in records]
    with editors.unremarked():
        return [*editors.each(session.editor, session.model, rewrites, session.config)]


def _edit_of(session: Session, given: Any) -> Edit:
    """One edit of a record, or of all records of a list."""
    assert session.editor is not None, "nothing is asked of the unedited model"
    rewrites = [each.rewrite for each in given] if isinstance(given, list) else given.rewrite
    with editors.unremarked():
        return editors.made(session.editor(session.model, rewrites, session.config))


# -- one row ---------------------------------------------------------------------------------------


def _row(
    session: Session,
    record: Any,
    case: Any,
    edit: Edit | str | None,
    after: int,
    apart: Sequence[str],
) -> Row:
    """The row of a record under an edit, or why it has none; `apart` are the unrelated texts that are compared."""
    of, texts = session.of, session.texts
    scores = [*of.scores, *(of.text_scores if texts else ()), "KL"]
    row: Row = {
        **{name: getattr(record, name) for name in of.labels},
        "editor": session.name,
        "measured_after": after,
        **dict.fromkeys(scores, float("nan")),
        **dict.fromkeys(of.counts, 0),
        "protocol": of.protocol(session.mode),
        "text_protocol": text_protocol(texts.tokens, session.mode) if texts else "",
        "reason": "",
    }
    if isinstance(case, str) or isinstance(edit, str):
        return {**row, "reason": case if isinstance(case, str) else edit}
    try:
        with contextlib.nullcontext() if edit is None else applied(session.model, edit):
            found = of.measure(session.model, case, texts)
            return {**row, **found, "KL": _kl(session, apart)}
    except FAILURES as error:
        return {**row, "reason": _reason(error)}


def _unrelated(edited: Sequence[Any]) -> tuple[str, ...]:
    """Texts that mention none of the edited subjects."""
    return unrelated({plain_name(record.subject) for record in edited})


def _hear(session: Session, texts: Sequence[str]) -> None:
    """Keep what the unedited model says of the texts, as long as it is that."""
    new = [text for text in dict.fromkeys(texts) if text not in session.unedited]
    session.unedited.update(zip(new, next_logprobs(session.model, new), strict=True))


def _kl(session: Session, texts: Sequence[str]) -> float:
    """KL(unedited || the model as it stands) in nats per token of unrelated texts; NaN without texts."""
    if not texts:
        return float("nan")
    before = torch.cat([session.unedited[text] for text in texts])
    return metrics.kl_per_token(before, torch.cat(next_logprobs(session.model, texts)))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
