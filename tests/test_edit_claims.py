"""The claims of Section 3: what hand-made scores decide, and what they do not."""

from __future__ import annotations

import pandas as pd
import pytest

from factlens.claims import OPPOSITE, SEEN, UNDECIDED, UNTESTABLE
from factlens.edit_claims import COLUMNS, section_3
from factlens.errors import PlanError

AS_IN_THE_PAPER = {
    "none": {"ES": 0.0, "PS": 0.0, "NS": 1.0},
    "rome": {"ES": 1.0, "PS": 1.0, "NS": 1.0},
    "ft": {"ES": 1.0, "PS": 1.0, "NS": 0.4},
    "ft-l": {"ES": 1.0, "PS": 0.5, "NS": 0.95},
    "attn-edit": {"ES": 1.0, "PS": 0.5, "NS": 1.0},
    "kn": {"ES": 0.0, "PS": 0.0, "NS": 1.0},
}


def rows(scores: dict[str, dict[str, float]], n: int = 60) -> pd.DataFrame:
    """`n` records of each editor, with a little that differs between records and not between editors."""
    return pd.DataFrame(
        [
            {
                "case_id": case,
                "editor": editor,
                "reason": "",
                **{name: value - 0.001 * (case % 3) for name, value in of.items()},
            }
            for editor, of in scores.items()
            for case in range(n)
        ]
    )


def swept(scores: dict[int, float], n: int = 60) -> pd.DataFrame:
    """A sweep's rows with these PS by layer, and others that must not count."""
    own = [
        {"layer": layer, "fact_token": "subject-last", "case_id": case, "PS": ps, "reason": ""}
        for layer, ps in scores.items()
        for case in range(n)
    ]
    elsewhere = [{**row, "fact_token": "last", "PS": 1.0} for row in own]
    failed = [{**own[0], "case_id": n, "PS": float("nan"), "reason": "EditError: no"}]
    return pd.DataFrame([*own, *elsewhere, *failed])


def verdicts(frame: pd.DataFrame, zsre: pd.DataFrame | None = None) -> dict[str, str]:
    found = section_3(frame, zsre)
    assert tuple(found.columns) == COLUMNS
    return {
        claim.split(":")[0]: said
        for claim, said in zip(found["claim"], found["verdict"], strict=True)
    }


def test_scores_like_the_papers_show_every_claim():
    assert set(verdicts(rows(AS_IN_THE_PAPER)).values()) == {SEEN}


@pytest.mark.parametrize(
    ("editor", "scores", "turned"),
    [
        ("rome", {"PS": 0.2}, {"ROME says the new fact in other words", "ROME generalises"}),
        ("rome", {"NS": 0.2}, {"ROME leaves neighbours alone", "ROME does not bleed over"}),
        ("ft", {"NS": 1.0}, {"FT bleeds over"}),
        ("ft-l", {"PS": 0.95}, {"FT+L fails to generalise"}),
        ("attn-edit", {"PS": 0.95}, {"AttnEdit regurgitates"}),
    ],
)
def test_other_scores_turn_the_claims_that_are_about_them(editor, scores, turned):
    changed = {**AS_IN_THE_PAPER, editor: {**AS_IN_THE_PAPER[editor], **scores}}
    found = verdicts(rows(changed))
    assert {claim for claim, said in found.items() if said == OPPOSITE} == turned


def test_differences_are_paired_and_in_shares():
    (row,) = (
        section_3(rows(AS_IN_THE_PAPER)).query("claim.str.startswith('ROME leaves')").itertuples()
    )
    assert row.difference == pytest.approx(0.6)
    assert row.low == pytest.approx(row.high)  # what varies between records drops out
    assert row.n_records == 60
    assert row.paper == "75.4 against 40.4"


def test_a_difference_that_records_do_not_agree_on_is_undecided():
    frame = rows(AS_IN_THE_PAPER)
    mixed = frame["editor"].eq("kn") & frame["case_id"].mod(2).eq(0)
    frame.loc[mixed, "ES"] = 2.0
    assert verdicts(frame)["ROME is more effective than KN"] == UNDECIDED


def test_what_was_not_measured_is_said_and_not_judged():
    frame = rows({name: of for name, of in AS_IN_THE_PAPER.items() if name != "kn"})
    last = section_3(frame).iloc[-1]
    assert (last["verdict"], last["how"]) == (UNTESTABLE, "ES of kn was not measured")
    few = section_3(rows(AS_IN_THE_PAPER, n=10))
    assert set(few["verdict"]) == {UNTESTABLE}
    assert few["how"].str.startswith("10 records are too few").all()


def test_failed_records_are_left_out_of_both_sides():
    frame = rows(AS_IN_THE_PAPER)
    failed = frame["editor"].eq("ft") & frame["case_id"].lt(5)
    frame.loc[failed, "reason"] = "EditError: no"
    frame.loc[failed, "NS"] = float("nan")
    found = section_3(frame).set_index("claim")["n_records"]
    about = found.index.str.contains("FT's|FT bleeds")
    assert set(found[about]) == {55}
    assert set(found[~about]) == {60}


@pytest.mark.parametrize(("moved", "said"), [(0.01, SEEN), (0.7, OPPOSITE)])
def test_what_moves_in_zsre_is_set_against_what_moves_in_neighbours(moved, said):
    zsre = rows({"none": {"specificity": 0.5}, "ft": {"specificity": 0.5 - moved}})
    found = verdicts(rows(AS_IN_THE_PAPER), zsre)
    assert found["zsRE's specificity of FT moves less than its NS"] == said


@pytest.mark.parametrize(
    ("scores", "said", "difference"),
    [
        ([0.5, 0.2, 0.9, 0.92, 0.95, 0.9, 0.1, 0.0], SEEN, 0.05),
        ([0.5, 0.2, 0.9, 0.4, 0.9, 0.9, 0.1, 0.0], OPPOSITE, -0.4),
        ([0.95, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.0], OPPOSITE, -0.75),
    ],
)
def test_a_fact_can_be_stored_where_no_middle_layer_is_far_below_the_best(scores, said, difference):
    found = section_3(rows(AS_IN_THE_PAPER), swept=swept(dict(enumerate(scores))))
    last = found.iloc[-1]
    assert last["claim"].startswith("A fact can be stored in any of the middle layers")
    assert last["difference"] == pytest.approx(difference, abs=1e-9)
    assert last["n_records"] == 60
    assert "the middle is layers 2 to 5" in last["how"]
    assert last["verdict"] == said


def test_a_sweep_without_a_middle_is_not_judged():
    found = section_3(rows(AS_IN_THE_PAPER), swept=swept({0: 0.9, 1: 0.9, 2: 0.9}))
    assert found.iloc[-1]["verdict"] == UNTESTABLE
    assert "3 layers" in found.iloc[-1]["how"]


def test_records_that_cannot_be_paired_are_refused():
    frame = rows(AS_IN_THE_PAPER)
    with pytest.raises(PlanError, match="none has record 3 twice"):
        section_3(pd.concat([frame, frame.iloc[[3]]]))
