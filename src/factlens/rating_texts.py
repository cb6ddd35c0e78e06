"""What two editors' models write of the same new facts: generated, or read from a file."""

import csv
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from factlens import editors, models
from factlens.benchmarks.counterfact import Record
from factlens.edits import Edit, applied
from factlens.engines.problems import Progress, no_progress
from factlens.errors import PlanError, RatingError
from factlens.evaluation_rows import FAILURES
from factlens.files import written_whole
from factlens.generation import generate
from factlens.models import Model
from factlens.ratings import SHOWN, Comparison, identical
from factlens.tokens import token_ids

TOP_K = 5
LENGTH = 100
"""Tokens of a passage with its prompt (ROME, Section 3.3), as far as the model's positions go."""
BATCH = 16
"""Records whose edits an editor may optimise side by side."""
COLUMNS = ("fact", "a", "b")
"""Of a file of texts; it may also have `case`."""
NO_PROMPT = "the record has no generation prompts"
SAME = "both editors' texts are the same"

Contestant = tuple[editors.Editor | None, Any]
"""An editor and its config; None writes with the unedited model."""


# -- generated -------------------------------------------------------------------------------------


def compare(
    model: Model,
    a: Contestant,
    b: Contestant,
    records: Sequence[Record],
    *,
    n: int = SHOWN,
    passages: int = 1,
    length: int = LENGTH,
    seed: int = 0,
    progress: Progress = no_progress,
) -> tuple[list[Comparison], list[tuple[str, str]]]:
    """Let either editor insert each record's new object, by itself, and the model write on from the record's generation prompts.

    Drawn from the 5 likeliest tokens, with one seed for both editors, so that the texts differ by the edits alone. Takes records
    until `n` gave two texts that differ; the model is left as it was.

    Args:
        model: a hooked model without edits.
        a: the first editor, with its config.
        b: the second.
        records: CounterFact records, in the order in which they are taken.
        n: comparisons wanted.
        passages: generation prompts of a record that are written on from; a text is all of them.
        length: tokens of a passage with its prompt, at most.
        seed: of the draws.
        progress: told (comparisons made, comparisons wanted).

    Returns:
        The comparisons, at most `n`, and (case, reason) of each record that gave none.

    Raises:
        PlanError: a number below 1.
    """
    for name, value in (("n", n), ("passages", passages), ("length", length)):
        if value < 1:
            raise PlanError(f"{name} is a number from 1 up, not {value}")
    made: list[Comparison] = []
    left_out: list[tuple[str, str]] = []
    start = 0
    while len(made) < n and start < len(records):
        chunk = records[start : start + min(BATCH, n - len(made))]
        start += len(chunk)
        edits = [edits_of(model, editor, chunk, config) for editor, config in (a, b)]
        for record, *pair in zip(chunk, *edits, strict=True):
            found = _comparison(model, record, pair, passages, length, seed)
            if isinstance(found, str):
                left_out.append((str(record.case_id), found))
            else:
                made.append(found)
                progress(len(made), n)
    return made, left_out


def new_fact(record: Record) -> str:
    """The record's rewrite as a sentence."""
    rewrite = record.rewrite
    said = f"{rewrite.prompt.rstrip()} {rewrite.target.strip()}"
    return said if said.endswith((".", "!", "?")) else f"{said}."


def edits_of(
    model: Model, editor: editors.Editor | None, records: Sequence[Record], config: Any
) -> list[Edit | str | None]:
    """The edit of each record, or why there is none; None without an editor."""
    if editor is None:
        return [None] * len(records)
    try:
        with editors.unremarked():  # How well an edit took is what raters are asked.
            return [*editors.each(editor, model, [each.rewrite for each in records], config)]
    except FAILURES as error:
        if len(records) == 1:
            return [_reason(error)]
    return [found for each in records for found in edits_of(model, editor, [each], config)]


def _comparison(
    model: Model,
    record: Record,
    edits: Sequence[Edit | str | None],
    passages: int,
    length: int,
    seed: int,
) -> Comparison | str:
    """What the model writes under either edit, or why there is nothing to compare."""
    prompts = list(record.generation_prompts[:passages])
    if not prompts:
        return NO_PROMPT
    texts = []
    for edit in edits:
        if isinstance(edit, str):
            return edit
        try:
            with nullcontext() if edit is None else applied(model, edit):
                texts.append(_written(model, prompts, length, seed + record.case_id))
        except FAILURES as error:
            return _reason(error)
    made = Comparison(new_fact(record), texts[0], texts[1], str(record.case_id))
    return SAME if identical(made) else made


def _written(model: Model, prompts: Sequence[str], length: int, seed: int) -> str:
    """The model's passages, one below the other."""
    tokenizer, context = models.tokenizer(model), int(models.cfg(model).n_ctx)
    longest = max(len(token_ids(tokenizer, prompt)) for prompt in prompts)
    new = max(1, min(length, context) - longest)
    texts = generate(model, list(prompts), max_new_tokens=new, top_k=TOP_K, seed=seed)
    return "\n\n".join(text.strip() for text in texts)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


# -- files -----------------------------------------------------------------------------------------


def write_texts(comparisons: Sequence[Comparison], path: str | Path) -> None:
    """Write comparisons as JSON, which `read_texts` reads."""
    with written_whole(path) as partial:
        rows = json.dumps([asdict(each) for each in comparisons], indent=1)
        partial.write_text(rows + "\n", encoding="utf-8")


def read_texts(path: str | Path) -> list[Comparison]:
    """Read texts to compare: .json (a list) or .csv, each row with `fact`, the editors' texts `a` and `b`, and maybe `case`.

    Raises:
        RatingError: with the row, and what is wrong in it.
    """
    path = Path(path)
    made = []
    for number, row in enumerate(_rows(path)):
        where = f"{path}, row {number}"
        if not isinstance(row, Mapping):
            raise RatingError(f"{where}: {row!r:.60} is no row with {', '.join(COLUMNS)}")
        if None in row:
            raise RatingError(f"{where}: more cells than columns; quote texts that hold commas")
        if missing := [name for name in COLUMNS if row.get(name) is None]:
            raise RatingError(
                f"{where}: no {', '.join(missing)}; it has {', '.join(map(str, row)) or 'nothing'}"
            )
        for name in COLUMNS:
            if not isinstance(row[name], str) or not row[name].strip():
                raise RatingError(f"{where}: {name} must be text, not {row[name]!r:.60}")
        case = row.get("case")
        named = {name: row[name] for name in COLUMNS}
        made.append(Comparison(**named, case="" if case is None else str(case)))
    if not made:
        raise RatingError(f"{path} holds no texts to compare")
    return made


def _rows(path: Path) -> list[Any]:
    ending = path.suffix.lower()
    if ending not in (".json", ".csv"):
        raise RatingError(f"{path} is neither .json nor .csv; texts are read from those")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, strict=True)) if ending == ".csv" else json.load(file)
    except OSError as error:
        raise RatingError(f"cannot read the texts {path}: {error.strerror or error}") from None
    except (csv.Error, ValueError, RecursionError) as error:
        raise RatingError(f"{path} is not {ending[1:].upper()} in UTF-8: {error}") from None
    if not isinstance(rows, list):
        raise RatingError(f"{path} must hold a list of rows with {', '.join(COLUMNS)}")
    return rows
