"""Tables 1 and 2: means and intervals in closed form, what is bold and red, text that is escaped, and the paper's own numbers."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from factlens import metrics, zsre_scores
from factlens.errors import PlanError
from factlens.paper_tables import (
    PAPER_TABLE_1,
    PAPER_TABLE_2,
    TABLE_2,
    PaperTable,
    beside_paper,
    table_1,
    table_2,
)

NAN = math.nan
EVIL = r"<b>50%</b> & $x_1$ | `a` *c* {d} \e ~f ^g #h [i]"
SCORES = ("ES", "EM", "PS", "PM", "NS", "NM")


def records(editor: str, n: int = 2, **columns) -> pd.DataFrame:
    """Rows of `evaluate`; what is not given is 0.5 throughout."""
    rest = {name: [0.5] * n for name in SCORES}
    fixed = {"case_id": range(n), "editor": editor, "protocol": metrics.PROTOCOL, "reason": ""}
    return pd.DataFrame({**rest, **fixed, **columns})


def together(*frames: pd.DataFrame) -> pd.DataFrame:
    return pd.concat(frames, ignore_index=True)


def by_editor(marks: pd.DataFrame, table: PaperTable) -> dict[str, list[str]]:
    """The scores that are marked, by editor."""
    return {
        name: [score for score in marks if marks.loc[at, score]]
        for at, name in table.frame["editor"].items()
    }


# -- numbers ---------------------------------------------------------------------------------------


def test_a_table_in_closed_form():
    frame = records(
        "rome",
        4,
        ES=[1.0, 1.0, 0.0, NAN],
        PS=[0.5, 0.5, 0.5, NAN],
        NS=[1.0, 0.9, 0.8, NAN],
        NM=[0.1, 0.2, 0.3, NAN],
        GE=[6.0, 6.5, NAN, NAN],
        reason=["", "", "", "EditError: no"],
    )
    (row,) = table_2(frame, source="atlas").frame.to_dict("records")
    assert (row["ES"], row["PS"], row["NS"]) == pytest.approx((200 / 3, 50, 90))
    assert row["S"] == pytest.approx(3 / (3 / 200 + 1 / 50 + 1 / 90))
    assert row["NM_margin"] == pytest.approx(1.96 * 10 / math.sqrt(3))
    assert (row["GE"], row["n_GE"]) == pytest.approx((625, 2))
    assert math.isnan(row["RS"])
    assert (row["n"], row["n_RS"], row["failed"]) == (3, 0, 1)
    assert (row["source"], row["protocol"]) == ("atlas", metrics.PROTOCOL)


def test_zsre_in_closed_form():
    frame = pd.DataFrame(
        {
            "editor": ["rome", "rome", "none"],
            "efficacy": [1.0, 0.5, 0.0],
            "paraphrase": [1.0, 1.0, 0.0],
            "specificity": [0.25, 0.25, 0.5],
            "protocol": zsre_scores.PROTOCOL,
        }
    )
    table = table_1(frame)
    assert list(table.frame["editor"]) == ["none", "rome"]
    row = table.frame.iloc[1]
    assert (row["efficacy"], row["n"], row["failed"]) == (75, 2, 0)
    assert row["efficacy_margin"] == pytest.approx(1.96 * 25)
    assert "| ROME | **75.0 (±49.0)** | **100.0 (±0.0)** | **25.0 (±0.0)** | 2 | 0 |" in (
        table.markdown()
    )


@given(st.integers(0, 2**32 - 1))
def test_the_interval_of_the_harmonic_mean_is_that_of_its_slope(seed):
    draw = np.random.default_rng(seed)
    parts = draw.uniform(0.2, 1.0, (40, 3))
    means, step = parts.mean(axis=0), 1e-6
    slopes = [
        (metrics.harmonic_mean(means + step * unit) - metrics.harmonic_mean(means - step * unit))
        / (2 * step)
        for unit in np.eye(3)
    ]
    variance = slopes @ np.cov(parts.T) @ slopes
    found = metrics.harmonic_half_width(parts)
    assert found == pytest.approx(1.96 * math.sqrt(variance / 40), rel=1e-5)


def test_the_interval_of_the_harmonic_mean_covers_what_resampling_finds():
    draw = np.random.default_rng(0)
    parts = draw.binomial(10, [0.9, 0.6, 0.8], (400, 3)) / 10
    chosen = draw.integers(0, 400, (2000, 400))
    resampled = [metrics.harmonic_mean(parts[rows].mean(axis=0)) for rows in chosen]
    assert metrics.harmonic_half_width(parts) == pytest.approx(1.96 * np.std(resampled), rel=0.1)


def test_the_interval_of_the_harmonic_mean_at_its_edges():
    alike = np.array([[0.5, NAN, 1.0], [0.5, 0.5, 1.0], [0.7, 0.5, 1.0]])
    without = metrics.harmonic_half_width(alike[1:])
    assert metrics.harmonic_half_width(alike) == without > 0
    assert metrics.harmonic_half_width(np.array([[0.0, 0.5, 1.0], [0.0, 0.4, 1.0]])) == 0
    assert math.isnan(metrics.harmonic_half_width(alike[1:2]))
    assert math.isnan(metrics.harmonic_half_width(alike[:1]))


# -- what is bold and what is red ------------------------------------------------------------------


def test_maxima_are_bold_and_the_unedited_model_never_is():
    table = table_2(
        together(
            records("ft", ES=[1.0, 1.0], PS=[0.9, 0.9], NS=[0.1, 0.1], GE=[6.0, 6.0]),
            records("rome", ES=[1.0, 1.0], PS=[0.8, 0.8], NS=[0.7, 0.7], GE=[6.2, 6.2]),
            records("none", ES=[0.0, 0.0], PS=[0.1, 0.1], NS=[0.9, 0.9], GE=[6.3, 6.3]),
        )
    )
    assert list(table.frame["editor"]) == ["none", "ft", "rome"]
    best = by_editor(table.best, table)
    assert best["none"] == []
    assert best["ft"] == ["ES", "EM", "PS", "PM", "NM"]
    assert best["rome"] == ["S", "ES", "EM", "PM", "NS", "NM", "GE"]
    assert not table_2(records("none")).best.any(axis=None)


def test_what_prints_alike_is_a_maximum_alike():
    table = table_2(together(records("a", PM=[0.1004] * 2), records("b", PM=[0.0996] * 2)))
    assert list(table.best["PM"]) == [True, True]
    apart = table_2(together(records("a", PM=[0.1004] * 2), records("b", PM=[0.0994] * 2)))
    assert list(apart.best["PM"]) == [True, False]


def test_clear_failures_are_red():
    unedited = records("none", PS=[0.3, 0.3], NS=[0.8, 0.8], NM=[-0.1, -0.1])
    table = table_2(
        together(
            unedited,
            records("fails", PS=[0.299, 0.298], NS=[0.699, 0.698], NM=[-0.01, -0.002]),
            records("holds", PS=[0.3, 0.3], NS=[0.7, 0.7], NM=[0.0, -0.0002]),
        )
    )
    failed = by_editor(table.failures, table)
    assert failed == {"none": [], "fails": ["PS", "NS", "NM"], "holds": []}
    assert "| 29.8 (0.1) † |" in table.markdown()
    assert "| **0.0 (0.0)** |" in table.markdown(), "no minus before a zero"


def test_without_the_unedited_model_only_nm_is_judged_and_the_caption_says_so():
    table = table_2(records("rome", PS=[0.0, 0.0], NS=[0.0, 0.0], NM=[-0.5, -0.5]))
    assert by_editor(table.failures, table) == {"rome": ["NM"]}
    assert "PS and NS are not judged" in table.caption
    assert "not judged" not in table_2(together(records("rome"), records("none"))).caption


def test_the_caption_says_what_is_bold_what_is_red_and_the_protocol():
    caption = table_2(together(records("none"), records("rome", GE=[6.0, NAN]))).caption
    assert "the largest of each column, also of GE and RS, the unedited model aside" in caption
    assert "NS more than 10 points below it" in caption
    assert "GE of ROME over 1." in caption
    few = {"GE": [6.0, NAN], "RS": [0.3, NAN]}
    table = table_2(together(records("none", **few), records("rome", **few)))
    caption = table.caption
    assert ". GE and RS are means over 1 records, for which texts were generated." in caption
    beside = beside_paper(table).caption
    assert "Our GE and RS are means over 1 records, for which texts were generated." in beside
    assert caption.endswith("Protocol: mean-token-nll/teacher-forced/independent/1.")


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: f.assign(protocol=["x", "y"]), "not of x and y; make one for each"),
        (lambda f: f.assign(text_protocol=["x", "y"]), "not of x and y"),
        (lambda f: f.iloc[:0], "not of none"),
        (lambda f: f.drop(columns="NM"), "no column NM"),
        (lambda f: f.assign(case_id=7), "rome has record 7 twice"),
    ],
)
def test_frames_that_are_no_table_are_refused_in_one_line(change, says):
    with pytest.raises(PlanError, match=says) as refused:
        table_2(change(records("rome")))
    assert "\n" not in str(refused.value)


# -- text ------------------------------------------------------------------------------------------


class Read(HTMLParser):
    """The texts of a page, and every tag in it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


def test_text_from_data_is_escaped_in_every_form():
    table = table_2(together(records("none"), records(EVIL)), source="x\n& y")
    read = Read(table.html())
    assert EVIL in read.texts
    assert set(read.tags) <= {"table", "caption", "thead", "tbody", "tr", "th", "td", "b", "span"}
    line = next(line for line in table.latex().splitlines() if "50" in line and "textless" in line)
    assert line.startswith(
        r"\textless{}b\textgreater{}50\%\textless{}/b\textgreater{} \& \$x\_1\$ \textbar{} `a` *c* \{d\} "
        r"\textbackslash{}e \textasciitilde{}f \textasciicircum{}g \#h [i] & "
    )
    row = table.markdown().splitlines()[-1]
    assert len(re.findall(r"(?<!\\)\|", row)) == 13
    assert r"\<b\>50%\</b\> \& \$x\_1\$ \| \`a\` \*c\*" in row


def test_latex_is_a_table_of_booktabs_whose_rows_are_as_wide():
    lines = PAPER_TABLE_2.latex().splitlines()
    assert [line for line in lines if line in (r"\toprule", r"\midrule", r"\bottomrule")] == [
        r"\toprule",
        r"\midrule",
        r"\midrule",  # between the paper's two models
        r"\bottomrule",
    ]
    rows = [line for line in lines if line.endswith(r"\\") and "multicolumn" not in line]
    assert {line.count("&") for line in rows} == {12}
    assert len(rows) == 1 + 9 + 5
    assert r"\begin{tabular}{llrrrrrrrrrrr}" in lines
    (over,) = [line for line in lines if "multicolumn" in line]
    assert over.startswith(r"&  & \multicolumn{1}{c}{Score} & \multicolumn{2}{c}{Efficacy}")
    assert sum(map(int, re.findall(r"multicolumn\{(\d+)\}", over))) == 11
    (ft, _) = [line for line in rows if line.startswith("FT &")]
    assert r"\textcolor{red}{40.4 (0.7)$^\dagger$} & \textcolor{red}{$-$6.2 (0.4)$^\dagger$}" in ft
    assert r"S $\uparrow$" in rows[0]


def test_html_has_the_papers_line_above_and_marks():
    page = table_2(together(records("none", NM=[0.1] * 2), records("rome", NM=[-0.1] * 2))).html()
    assert '<th colspan="2">Generalization</th>' in page
    assert '<span style="color: #b3261e"><b>-10.0 (0.0)</b>†</span>' in page
    assert "http" not in page
    rows = [row.count("<td") for row in page.split("<tr>")[3:]]
    assert rows == [12, 12]


def test_missing_values_are_empty_cells():
    table = table_2(records("rome", reason=["EditError: no"] * 2))
    assert table.markdown().splitlines()[-1] == "| ROME |" + " |" * 9 + " 0 | 2 |"
    assert not table.best.any(axis=None)


# -- the paper's numbers ---------------------------------------------------------------------------


def test_the_papers_s_is_the_harmonic_mean_of_its_es_ps_and_ns():
    for _, row in PAPER_TABLE_2.frame.iterrows():
        assert metrics.harmonic_mean(row[["ES", "PS", "NS"]]) == pytest.approx(row["S"], abs=0.15)


def test_the_rules_mark_what_the_paper_marks():
    frame = PAPER_TABLE_2.frame
    first = frame["source"] == "GPT-2 XL"
    failed = PAPER_TABLE_2.failures
    assert set(frame.loc[first & failed["NS"], "editor"]) == {
        "ft",
        "ke",
        "ke-cf",
        "mend",
        "mend-cf",
    }
    assert (failed["NS"] == failed["NM"]).all()
    assert not failed["PS"].any()
    best = PAPER_TABLE_2.best
    for score, editor in [("S", "rome"), ("PM", "mend-cf"), ("NM", "rome"), ("GE", "mend")]:
        assert list(frame.loc[first & best[score], "editor"]) == [editor]
    assert list(frame.loc[~first & best["NM"], "editor"]) == ["ft-l"]
    assert list(frame.loc[first & best["ES"], "editor"]) == ["ft", "mend-cf", "rome"]


def test_table_1_has_the_misprinted_row_under_its_name():
    table = PAPER_TABLE_1.frame.set_index("editor")
    assert table.loc["mend-zsre", "paraphrase"] == 99.3
    assert "mend-cf" not in table.index
    assert "misprinted" in PAPER_TABLE_1.caption
    assert not PAPER_TABLE_1.failures.any(axis=None)


def test_ours_stand_beside_the_papers():
    ours = table_2(together(records("attn-edit"), records("rome"), records("none")), source="atlas")
    both = beside_paper(ours)
    found = list(zip(both.frame["editor"], both.frame["source"], strict=True))
    assert found[:5] == [
        ("none", "atlas"),
        ("none", "GPT-2 XL (paper)"),
        ("attn-edit", "atlas"),
        ("rome", "atlas"),
        ("rome", "GPT-2 XL (paper)"),
    ]
    assert len(found) == 3 + 9
    assert both.best.loc[[3, 4], "S"].tolist() == [True, True], "each source has its own maxima"
    assert "| ROME | GPT-2 XL (paper) | **89.2** | **100.0 (0.1)** |" in both.markdown()
    assert "| ROME | atlas | **50.0** |" in both.markdown()
    assert both.latex().count(r"\midrule") == 1
    assert beside_paper(ours, "GPT-J").frame["n"].max() == 2_000


def test_beside_the_paper_stands_only_what_compares():
    with pytest.raises(PlanError, match="no numbers of Llama; it has those of GPT-2 XL, GPT-J"):
        beside_paper(table_2(records("rome")), "Llama")
    other = records("rome").assign(protocol="mean-token-nll/teacher-forced/batch/1")
    with pytest.raises(PlanError, match="batch/1 and mean-token"):
        beside_paper(table_2(other))
    assert beside_paper(PAPER_TABLE_1).layout != TABLE_2
