"""The claims of ROME's Section 3 put to evaluations, each as a paired difference over records with its interval and a verdict.

The rule is that of Section 2's claims (`claims.verdict`): a claim is seen when the 95 % interval of its difference lies wholly
on the paper's side. Records are the unit of sampling; both sides of a difference are of the same records.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from factlens import paper_numbers
from factlens.claims import UNTESTABLE, Compared, verdict
from factlens.errors import PlanError
from factlens.evaluation import NONE
from factlens.intervals import mean_interval
from factlens.layer_sweeps import LAST_SUBJECT

COLUMNS = ("claim", "paper", "difference", "low", "high", "n_records", "verdict", "how")
BLED = 0.1
"""Of NS, that an edit may lose before it bleeds over: the paper's red figures lie further below the unedited model's."""
FELL_SHORT = 0.1
"""Of efficacy, that paraphrases may miss before an edit fails to generalise."""
FEWEST_LAYERS = 4
"""Of a sweep, that has a middle."""
_PAPER = paper_numbers.read(
    paper_numbers.COUNTERFACT["GPT-2 XL"].rows,
    ("S", "ES", "EM", "PS", "PM", "NS", "NM", "GE", "RS"),
    without_margin=("S",),
).set_index("editor")


@dataclass(frozen=True)
class _Scores:
    """Scores by editor and record, of records that were measured."""

    frame: pd.DataFrame

    def of(self, editor: str, score: str) -> pd.Series:
        """One score of an editor, by record.

        Raises:
            LookupError: the editor, or the score, was not measured.
        """
        rows = self.frame[self.frame["editor"] == editor]
        if rows.empty or score not in rows:
            raise LookupError(f"{score} of {editor} was not measured")
        return rows.set_index("case_id")[score].astype(float)


def section_3(
    counterfact: pd.DataFrame,
    zsre: pd.DataFrame | None = None,
    swept: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Every claim of Sections 3.3 to 3.5 about how editors compare: `claim, paper, difference, low, high, n_records, verdict, how`.

    Differences are of shares, positive where the paper is right; intervals are BCa bootstrap over the records that both sides
    have. What was not measured is not testable here, with its reason.

    Args:
        counterfact: the frame of `evaluate` on CounterFact records, with the editors "none" (unedited), "rome", "ft", "ft-l",
            "attn-edit" and "kn" as far as they were run.
        zsre: the same on zsRE's records.
        swept: the rows of `layer_sweeps.layer_sweep`, ROME at every layer.

    Raises:
        PlanError: an editor has a record twice, so that records cannot be paired.
    """
    for frame in (counterfact, *([] if zsre is None else [zsre])):
        if (twice := frame.duplicated(["editor", "case_id"])).any():
            row = frame[twice].iloc[0]
            raise PlanError(f"{row['editor']} has record {row['case_id']} twice; give each once")
    cf = _Scores(counterfact[counterfact["reason"] == ""])
    rows = [_row(claim, paper, compare) for claim, paper, compare in _claims(cf)]
    if zsre is not None:
        asked = _Scores(zsre[zsre["reason"] == ""])
        rows.append(
            _row(
                "zsRE's specificity of FT moves less than its NS",
                "-1.0 against -37.7 points",
                lambda: _insensitive(cf, asked),
            )
        )
    if swept is not None:
        rows.append(
            _row(
                "A fact can be stored in any of the middle layers: PS at the worst of them is less than 10 points below the best layer's",
                "Figure 5",
                lambda: _anywhere(swept),
            )
        )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _claims(cf: _Scores) -> list[tuple[str, str, Callable[[], Compared]]]:
    return [
        (
            "ROME says the new fact in other words: its PS is above FT+L's",
            _said(("rome", "PS"), ("ft-l", "PS")),
            lambda: _above(cf, "PS", "rome", "ft-l"),
        ),
        (
            "ROME generalises: its PS is less than 10 points below its ES",
            _said(("rome", "PS"), ("rome", "ES")),
            lambda: _follows(cf, "rome"),
        ),
        (
            "ROME leaves neighbours alone: its NS is above FT's",
            _said(("rome", "NS"), ("ft", "NS")),
            lambda: _above(cf, "NS", "rome", "ft"),
        ),
        (
            "ROME does not bleed over: its NS is less than 10 points below the unedited model's",
            _said(("rome", "NS"), (NONE, "NS")),
            lambda: _spares(cf, "rome"),
        ),
        (
            "FT bleeds over: its NS is more than 10 points below the unedited model's",
            _said(("ft", "NS"), (NONE, "NS")),
            lambda: _bleeds(cf, "ft"),
        ),
        (
            "FT+L fails to generalise: its PS is more than 10 points below its ES",
            _said(("ft-l", "PS"), ("ft-l", "ES")),
            lambda: _falls_short(cf, "ft-l"),
        ),
        (
            "AttnEdit regurgitates: its PS is more than 10 points below its ES",
            "Appendix I",
            lambda: _falls_short(cf, "attn-edit"),
        ),
        (
            "ROME is more effective than KN: its ES is above KN's",
            _said(("rome", "ES"), ("kn", "ES")),
            lambda: _above(cf, "ES", "rome", "kn"),
        ),
    ]


def _said(*scores: tuple[str, str]) -> str:
    """The paper's numbers, of GPT-2 XL."""
    return " against ".join(f"{_PAPER.loc[editor, score]:.1f}" for editor, score in scores)


# -- what is compared ------------------------------------------------------------------------------


def _above(cf: _Scores, score: str, one: str, other: str) -> Compared:
    return _paired(
        cf.of(one, score), cf.of(other, score)
    ), f"{score} of {one} minus that of {other}"


def _bleeds(cf: _Scores, editor: str) -> Compared:
    lost = _paired(cf.of(NONE, "NS"), cf.of(editor, "NS"))
    return lost - BLED, f"NS unedited minus NS of {editor}, minus {BLED:g}"


def _spares(cf: _Scores, editor: str) -> Compared:
    lost, _ = _bleeds(cf, editor)
    return -lost, f"{BLED:g} minus what NS loses from the unedited model to {editor}"


def _falls_short(cf: _Scores, editor: str) -> Compared:
    gap = _paired(cf.of(editor, "ES"), cf.of(editor, "PS"))
    return gap - FELL_SHORT, f"ES minus PS of {editor}, minus {FELL_SHORT:g}"


def _follows(cf: _Scores, editor: str) -> Compared:
    gap, _ = _falls_short(cf, editor)
    return -gap, f"{FELL_SHORT:g} minus what PS of {editor} is below its ES"


def _insensitive(cf: _Scores, zsre: _Scores) -> Compared:
    """Records of two benchmarks cannot be paired, so zsRE's mean loss is taken from each loss of NS: its own spread is left out."""
    lost = _paired(cf.of(NONE, "NS"), cf.of("ft", "NS"))
    moved = _paired(zsre.of(NONE, "specificity"), zsre.of("ft", "specificity"))
    return lost - abs(moved.mean()), (
        f"what FT takes from NS, minus the {abs(moved.mean()):.3f} that it moves zsRE's specificity (mean of {moved.count()} records)"
    )


def _anywhere(swept: pd.DataFrame) -> Compared:
    """Of the middle half of the layers; edits are at the last subject token."""
    rows = swept[(swept["fact_token"] == LAST_SUBJECT) & (swept["reason"] == "")]
    scores = rows.pivot(index="case_id", columns="layer", values="PS").dropna()
    if scores.empty or scores.shape[1] < FEWEST_LAYERS:
        raise LookupError(
            f"ROME was swept over {scores.shape[1]} layers at the last subject token, fewer than {FEWEST_LAYERS}"
        )
    means = scores.mean()
    middle = middle_layers(means)
    best, worst = int(means.idxmax()), int(middle.idxmin())
    return FELL_SHORT - _paired(scores[best], scores[worst]), (
        f"{FELL_SHORT:g} minus what PS at layer {worst} is below that at layer {best}; the middle is layers {middle.index[0]} to "
        f"{middle.index[-1]}"
    )


def middle_layers(by_layer: pd.Series) -> pd.Series:
    """The middle half of what there is of each layer."""
    quarter = len(by_layer) // 4
    return by_layer.sort_index().iloc[quarter : len(by_layer) - quarter]


def _paired(one: pd.Series, other: pd.Series) -> pd.Series:
    """The difference on the records that have both."""
    return (one - other).dropna()


def _row(claim: str, paper: str, compare: Callable[[], Compared]) -> tuple:
    try:
        values, how = compare()
    except LookupError as error:
        return claim, paper, np.nan, np.nan, np.nan, 0, UNTESTABLE, str(error).strip("'\"")
    found = mean_interval(values, interval="bootstrap")
    said = verdict(found)
    if said == UNTESTABLE:
        how = f"{found.n} records are too few; {how}"
    return claim, paper, found.mean, found.low, found.high, found.n, said, how
