"""How well edits hold: model x editor x records -> one row per record -> a table (ROME, Sections 3.2 and 3.3).

Records are edited into the model as it was given, one at a time, one after another, or all at once; they are measured, and taken back bit
for bit.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from factlens import editors, metrics
from factlens.benchmarks.atlas_counterfact import other_facts
from factlens.benchmarks.record_files import Unusable
from factlens.benchmarks.references import References, bundled_references
from factlens.counterfact_scores import COUNTERFACT, Others
from factlens.engines.problems import Progress, no_progress
from factlens.errors import PlanError
from factlens.evaluation_rows import WAYS, Row, Session
from factlens.metrics import MODES, harmonic_mean
from factlens.models import Model
from factlens.scoring import Benchmark, Texts, means, one_protocol
from factlens.zsre_scores import ZSRE

BENCHMARKS = (COUNTERFACT, ZSRE)
BATCH = 16
"""Records whose edits an editor may optimise side by side."""
NONE = "none"
"""The editor's name of the unedited model."""


def evaluate(
    model: Model,
    editor: editors.Editor | None,
    records: Iterable[Any],
    *,
    config: Any = None,
    mode: str = "independent",
    every: int | None = None,
    generations: int | None = None,
    others: Others = other_facts,
    references: References | None = None,
    label: str | None = None,
    batch: int = BATCH,
    progress: Progress = no_progress,
) -> pd.DataFrame:
    """Edit records, measure each, and undo the edits; the model is left as it was, bit for bit.

    Columns for CounterFact: `case_id, subject, relation_id, editor, measured_after`, the scores, `n_other, KL`, with
    `generations` the scores of texts and `text_protocol`, then `protocol, reason`.

    - ES, PS and NS are the shares of the record's prompts at which the edit succeeds, EM, PM and NM the mean differences of
      probability (REFERENCE, section 3). `NS_known` is NS on the neighbours of which the unedited model says the true object, and
      `known_neighbours` their share. `NS+` is NS with the edit's sentence before each neighbour's prompt (CounterFact+).
    - `target_first` says whether the model goes on from the rewrite's prompt with the new object; `retention` is the share of the subject's
      `n_other` sentences that were known before the edit and still are, NaN where there were none.
    - `inverse` is the share of the relation's reversed sentences with the new object after which the model says the subject, and
      `inverse_likelier` of those at which it finds the subject likelier than with the true object; NaN but for bundled relations.
    - `KL` is KL(unedited || edited) in nats per token of a few bundled paragraphs that name none of the edited subjects.
    - `free` and `free_paraphrase` say how often greedy text says the new object, after the rewrite's prompt and its paraphrases, GE how varied
      texts are that are drawn from the 5 likeliest tokens, RS how like texts about subjects that do have the new object.

    For zsRE: `case_id, subject, editor, measured_after, efficacy, paraphrase, specificity, KL, protocol, reason`.

    A record that lacks prompts, or whose edit fails, has its reason and NaN for scores; so has a row of a file of which no record could
    be made (`counterfact.read_rows`).

    Args:
        model: a hooked model without edits.
        editor: `(model, rewrites, config) -> Edit`; None measures the unedited model, the control.
        records: of CounterFact's or of zsRE's form, from a file or of atlas.
        config: given to the editor as it is.
        mode: "independent": each record by itself. "sequential": edits are kept, each computed on the model that has those before
            it, and all records are measured after the last. "batch": all rewrites are one edit. `measured_after` says how many
            rewrites were on the model; what the other edits change by right is not asked (`counterfact_scores.cases`).
        every: in sequential mode, measure after so many records too, and again after so many more: all records up to there.
        generations: tokens of a generated text with its prompt, 100 in the paper; None generates none, which is faster.
        others: the facts that `retention` asks; by default those that the bundled tables have.
        references: what RS compares with; by default paragraphs about the bundled subjects.
        label: what to call the editor in the frame; its own name by default.
        batch: records whose edits may be optimised side by side, where the editor can.
        progress: told (steps done, steps in all): a step is a record measured, in sequential mode also a record edited.

    Raises:
        PlanError: no such mode, records of two benchmarks, or texts of records that have no prompts for them.
    """
    asked = list(records)
    of = benchmark_of(asked)
    _check(of, mode, every, generations, batch)
    texts = None
    if generations is not None:
        texts = Texts(generations, references or bundled_references())
    name = label or (NONE if editor is None else name_of(editor))
    session = Session(model, editor, config, of, mode, others, texts, name)
    rows: list[Row] = []
    steps = steps_of(len(asked), mode, every)
    points = _points(len(asked), every)
    for done, row in enumerate(WAYS[mode](session, asked, batch, points), 1):
        rows += [] if row is None else [row]
        progress(done, steps)
    return frame_of(rows, of, texts is not None)


def name_of(function: object) -> str:
    """What an editor, or another function, is called where nobody gives it a name."""
    return str(getattr(function, "__name__", type(function).__name__))


def benchmark_of(records: Sequence[Any]) -> Benchmark:
    """Which benchmark the records are of; CounterFact, if there are none.

    Raises:
        PlanError: of several, or of none that is known.
    """
    kinds = {each.benchmark if isinstance(each, Unusable) else type(each) for each in records}
    found = [of for of in BENCHMARKS if kinds <= {of.record, of.name}]
    if not found:
        names = ", ".join(
            sorted(e if isinstance(e, str) else f"{e.__module__}.{e.__name__}" for e in kinds)
        )
        raise PlanError(
            f"records are of {' or of '.join(of.name for of in BENCHMARKS)}, not {names}; evaluate each kind by itself"
        )
    return found[0]


def frame_of(rows: Sequence[Row], of: Benchmark, with_texts: bool) -> pd.DataFrame:
    """`evaluate`'s frame of rows."""
    written = [*of.text_scores, "text_protocol"] if with_texts else []
    columns = [*of.labels, "editor", "measured_after", *of.scores, *of.counts, "KL", *written]
    frame = pd.DataFrame(rows, columns=[*columns, "protocol", "reason"])
    numbers = [*of.scores, "KL", *(of.text_scores if with_texts else ())]
    return frame.astype(dict.fromkeys(numbers, float))


def steps_of(records: int, mode: str, every: int | None = None) -> int:
    """How many steps of progress an evaluation has."""
    return records + sum(_points(records, every)) if mode == "sequential" else records


def _points(records: int, every: int | None) -> list[int]:
    """After how many records of a sequence it is measured: after each `every`, and after the last."""
    return [*range(every or records, records, every or 1), *([records] if records else [])]


def _check(
    of: Benchmark, mode: str, every: int | None, generations: int | None, batch: int
) -> None:
    if mode not in MODES:
        raise PlanError(f"no mode {mode!r}; there are {', '.join(MODES)}")
    if every is not None and mode != "sequential":
        raise PlanError(f"every={every} is of edits one after another; use mode='sequential'")
    for name, value in (("every", every), ("generations", generations), ("batch", batch)):
        if value is not None and value < 1:
            raise PlanError(f"{name} is a number from 1 up, not {value}")
    if generations is not None and not of.text_scores:
        raise PlanError(f"records of {of.name} have no prompts for texts; leave out generations")


# -- tables ----------------------------------------------------------------------------------------


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """The means of `evaluate`'s scores, in per cent, one row for each editor and number of edits on the model.

    Columns: `editor, measured_after`, for CounterFact `S`, each score with its `..._margin`, half of the 95 % interval over records,
    `KL` in nats per token with its margin, then `n` records measured, for CounterFact `n_retention` of them with other facts that
    were known, `failed` records without scores, `protocol`. S is the harmonic mean of the means of ES, PS and NS.

    Raises:
        PlanError: numbers of several protocols, which do not compare, or no numbers.
    """
    protocol = one_protocol(frame)
    of = next(each for each in BENCHMARKS if protocol.startswith(each.scoring))
    scores = [*of.scores, *(each for each in of.text_scores if each in frame)]
    rows = []
    for (name, after), group in frame.groupby(["editor", "measured_after"], sort=False):
        measured = group[group["reason"] == ""]
        found = means(measured, scores)
        row: Row = {"editor": name, "measured_after": int(after)}
        if of is COUNTERFACT:
            row["S"] = 100 * harmonic_mean(found[each] / 100 for each in ("ES", "PS", "NS"))
        row |= found | {"KL": float(measured["KL"].mean())}
        row["KL_margin"] = metrics.half_width(measured["KL"])
        row["n"] = len(measured)
        if of is COUNTERFACT:
            row["n_retention"] = int(measured["retention"].notna().sum())
        rows.append({**row, "failed": len(group) - len(measured), "protocol": protocol})
    return pd.DataFrame(rows)
