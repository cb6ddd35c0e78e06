"""Tables 1 and 2 as the paper prints them (ROME, Section 3), of our records, and beside the paper's own numbers.

The unedited model stands on top and S in front; each mean has half of its 95 % interval behind it, maxima are bold and clear failures
red. Both follow from the numbers as they are printed (`PaperTable.best`, `PaperTable.failures`); the caption says by which rule.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from factlens import paper_numbers, table_texts, zsre_scores
from factlens.errors import PlanError
from factlens.evaluation import NONE
from factlens.metrics import half_width, harmonic_half_width, harmonic_mean
from factlens.table_texts import WRONG, Cell, Printed

NAMES: Mapping[str, str] = {
    NONE: "unedited",
    "C = identity": "ROME with the identity for C",
    "rome": "ROME",
    "ft": "FT",
    "ft-l": "FT+L",
    "attn-edit": "AttnEdit",
    "kn": "KN",
    "ke": "KE",
    "ke-cf": "KE-CF",
    "ke-zsre": "KE-zsRE",
    "mend": "MEND",
    "mend-cf": "MEND-CF",
    "mend-zsre": "MEND-zsRE",
}
"""What tables call editors; others have their own name."""
HERE = "here"
"""The source of our numbers, unless they have another name."""
PROTOCOLS = ("protocol", "text_protocol")
"""Columns that say how numbers were measured; a table has one value of each."""
FAR = 10.0
"""Points of NS that an edit may lose before it is a clear failure of specificity."""


@dataclass(frozen=True)
class Layout:
    """What stands in a table of the paper."""

    title: str
    reading: str
    """The caption's sentence about the scores."""
    scores: tuple[str, ...]
    headings: tuple[str, ...]
    groups: tuple[tuple[str, int], ...] = ()
    """The line above the headings: words, each over so many scores."""
    of_text: tuple[str, ...] = ()
    """Scores of generated text, which not all records have, and not all frames."""
    margin: str = "({:.1f})"
    """How half an interval is printed. S has none there, as in the paper."""


TABLE_1 = Layout(
    title="zsRE editing results (ROME, Table 1)",
    reading="Shares of the answers' tokens that rank first, in per cent",
    scores=zsre_scores.SCORES,
    headings=("Efficacy", "Paraphrase", "Specificity"),
    margin="(±{:.1f})",
)
_SCORES_2 = ("S", "ES", "EM", "PS", "PM", "NS", "NM", "GE", "RS")
TABLE_2 = Layout(
    title="Quantitative editing results on CounterFact (ROME, Table 2)",
    reading="S is the harmonic mean of the means ES, PS and NS; per cent, GE in hundredths of a bit",
    scores=_SCORES_2,
    headings=_SCORES_2,
    groups=(
        ("Score", 1),
        ("Efficacy", 2),
        ("Generalization", 2),
        ("Specificity", 2),
        ("Fluency", 1),
        ("Consistency", 1),
    ),
    of_text=("GE", "RS"),
)


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper, as numbers and in print."""

    frame: pd.DataFrame
    """One row for each editor and source: `editor, source`, each score, times 100 as in the paper, with its `..._margin`, half of the
    95 % interval over records; `n` records measured, `n_...` of them with a score of text, `failed` without any; `protocol`. What
    there is no value of is NaN."""
    layout: Layout
    notes: tuple[str, ...] = ()
    """Further sentences of the caption."""

    @property
    def best(self) -> pd.DataFrame:
        """Which scores are bold: as printed the largest of their column and source, several where they are equal; none of the unedited model."""
        shown, edited = self._shown(), self.frame["editor"] != NONE
        largest = shown[edited].groupby(self.frame.loc[edited, "source"]).transform("max")
        return shown.eq(largest.reindex(shown.index))

    @property
    def failures(self) -> pd.DataFrame:
        """Which scores are red: as printed PS below the unedited model's, NS more than 10 points below it, NM below 0.

        The paper states no rule. This one marks what the paper marks in NS and NM, and MEND's NS on GPT-J. The paper also marks
        PS of FT+L, KN and, on GPT-J, MEND, which is above the unedited model's, and low values of other scores.
        """
        shown, unedited = self._shown(), self.frame["editor"] == NONE
        found = pd.DataFrame(False, index=shown.index, columns=shown.columns)
        if self.layout != TABLE_2:
            return found
        before = shown[unedited].set_axis(self.frame.loc[unedited, "source"])
        for score, slack in (("PS", 0.0), ("NS", FAR)):
            least = self.frame["source"].map((before[score] - slack).round(1)).astype(float)
            found[score] = ~unedited & (shown[score] < least)
        found["NM"] = ~unedited & (shown["NM"] < 0)
        return found

    @property
    def caption(self) -> str:
        """What is shown, what is bold and red, and by which protocol it was measured."""
        said = [
            f"{self.layout.title}",
            f"{self.layout.reading}; in brackets half of the 95 % interval over the n records that were measured",
            *self._of_fewer(),
            f"Bold: the largest of each column{', also of GE and RS' if self.layout.of_text else ''}, the unedited model aside",
        ]
        if self.layout == TABLE_2:
            said.append(
                f"Red ({WRONG}): a clear failure, which is PS below the unedited model's, NS more than {FAR:.0f} points below it, or NM "
                "below 0; for the other scores there is no such rule"
            )
            if set(self.frame["source"]) - set(self._sources_with_control()):
                said.append("Without the unedited model PS and NS are not judged")
        said += [*self.notes, f"Protocol: {self.frame['protocol'].iloc[0]}"]
        return " ".join(f"{each}." for each in said)

    @property
    def printed(self) -> Printed:
        """The table as it is to be read."""
        sources = self.frame["source"].nunique() > 1
        unedited = list(self.frame["editor"] == NONE)
        best, failures = self.best, self.failures
        rows = [
            (
                Cell(NAMES.get(row["editor"], str(row["editor"]))),
                *([Cell(str(row["source"]))] if sources else []),
                *(
                    Cell(
                        self._text(row, each), bool(best.at[at, each]), bool(failures.at[at, each])
                    )
                    for each in self.layout.scores
                ),
                *(Cell(_number(row[each], "{:.0f}")) for each in ("n", "failed")),
            )
            for at, row in self.frame.iterrows()
        ]
        arrows = [f"{each} ↑" for each in self.layout.headings]
        return Printed(
            caption=self.caption,
            headings=("Editor", *(["Of"] if sources else []), *arrows, "n", "failed"),
            rows=tuple(rows),
            names=1 + sources,
            groups=(*self.layout.groups, ("", 2)) if self.layout.groups else (),
            begins=tuple(
                at for at, here in enumerate(unedited) if here and not (at and unedited[at - 1])
            ),
        )

    def markdown(self) -> str:
        """The caption and a Markdown table."""
        return table_texts.markdown(self.printed)

    def latex(self) -> str:
        """A `table` for LaTeX; needs the packages booktabs and xcolor."""
        return table_texts.latex(self.printed)

    def html(self) -> str:
        """A `<table>` that needs no style sheet."""
        return table_texts.html(self.printed)

    def _shown(self) -> pd.DataFrame:
        """The scores as printed: of marks that go by hidden digits a reader would not see the reason."""
        return self.frame[[*self.layout.scores]].map(lambda value: float(f"{value:.1f}"))

    def _text(self, row: pd.Series, score: str) -> str:
        value, margin = _number(row[score]), row[f"{score}_margin"]
        if score == "S" or pd.isna(margin):
            return value
        return f"{value} {self.layout.margin.format(margin)}"

    def _of_fewer(self) -> list[str]:
        """The numbers of records that have scores of text, where they are not all."""
        fewer: dict[str, list[str]] = {}
        sources = set()
        for _, row in self.frame.iterrows():
            name = NAMES.get(row["editor"], row["editor"])
            for score in self.layout.of_text:
                if 0 < row[f"n_{score}"] < row["n"]:
                    fewer.setdefault(f"{row[f'n_{score}']:.0f}", []).append(f"{score} of {name}")
                    sources.add(row["source"])
        asked = int(self.frame["source"].isin(sources).sum()) * len(self.layout.of_text)
        for count, scores in fewer.items():
            if len(scores) == asked:
                ours = "Our GE and RS" if sources != {*self.frame["source"]} else "GE and RS"
                return [f"{ours} are means over {count} records, for which texts were generated"]
        of = [f"{', '.join(scores)} over {count}" for count, scores in fewer.items()]
        return [f"Texts were not generated for all: {'; '.join(of)}"] if of else []

    def _sources_with_control(self) -> pd.Series:
        return self.frame.loc[self.frame["editor"] == NONE, "source"]


def _number(value: Any, form: str = "{:.1f}") -> str:
    """A number in print; nothing for NaN, and no minus before a zero."""
    text = "" if pd.isna(value) else form.format(value)
    return text.removeprefix("-") if text and float(text) == 0 else text


# -- of our records --------------------------------------------------------------------------------


def table_1(frame: pd.DataFrame, *, source: str = HERE) -> PaperTable:
    """Table 1 from the scores of zsRE's records: `editor, efficacy, paraphrase, specificity, protocol`, where there is one `reason`.

    Raises:
        PlanError: numbers of several protocols, which do not compare, or none; a column that is missing; a record that an editor has
            twice.
    """
    return _table(frame, TABLE_1, source)


def table_2(frame: pd.DataFrame, *, source: str = HERE) -> PaperTable:
    """Table 2 from the frame of `evaluate`, of one editor or several; GE and RS are empty where nothing was generated.

    A record whose `reason` is not empty counts as failed. The interval of S is `metrics.harmonic_half_width`'s; the paper gives none.

    Args:
        frame: one row for each record and editor, the scores as shares, differences of probability and, GE, bits.
        source: whose numbers they are, such as the model; printed where a table has several.

    Raises:
        PlanError: as `table_1`.
    """
    return _table(frame, TABLE_2, source)


def _table(frame: pd.DataFrame, layout: Layout, source: str) -> PaperTable:
    needed = [each for each in layout.scores if each not in ("S", *layout.of_text)]
    if missing := [each for each in ("editor", *needed, "protocol") if each not in frame]:
        raise PlanError(
            f"the frame has no column {', '.join(missing)}, which the table needs; it has {', '.join(map(str, frame.columns))}"
        )
    _check_one_protocol(frame)
    _check_once(frame)
    absent = {each: float("nan") for each in layout.of_text if each not in frame}
    whole = frame.assign(**absent, **({} if "reason" in frame else {"reason": ""}))
    groups = sorted(whole.groupby("editor", sort=False), key=lambda group: group[0] != NONE)
    rows = [{"editor": name, "source": source, **_row(of, layout)} for name, of in groups]
    return PaperTable(pd.DataFrame(rows), layout)


def _row(group: pd.DataFrame, layout: Layout) -> dict[str, object]:
    """The means of one editor."""
    measured = group[group["reason"] == ""]
    row: dict[str, object] = {}
    for score in layout.scores:
        if score == "S":
            parts = measured[["ES", "PS", "NS"]].astype(float)
            row["S"] = 100 * harmonic_mean(parts.mean())
            row["S_margin"] = 100 * harmonic_half_width(parts.to_numpy())
        else:
            row[score] = 100 * float(measured[score].mean())
            row[f"{score}_margin"] = 100 * half_width(measured[score])
    row["n"] = len(measured)
    row |= {f"n_{score}": int(measured[score].notna().sum()) for score in layout.of_text}
    return {**row, "failed": len(group) - len(measured), "protocol": group["protocol"].iloc[0]}


def _check_one_protocol(frame: pd.DataFrame) -> None:
    for column in PROTOCOLS:
        if column not in frame:
            continue
        found = sorted(set(frame[column].dropna()))
        if len(found) > 1 or (column == "protocol" and not found):
            named = " and ".join(found) or "none"
            raise PlanError(
                f"a table has numbers of one protocol, not of {named}; make one for each"
            )


def _check_once(frame: pd.DataFrame) -> None:
    if "case_id" in frame and (twice := frame.duplicated(["editor", "case_id"])).any():
        row = frame[twice].iloc[0]
        raise PlanError(
            f"{row['editor']} has record {row['case_id']} twice; a table has each record of an editor once"
        )


# -- of the paper ----------------------------------------------------------------------------------


def beside_paper(table: PaperTable, model: str = "GPT-2 XL") -> PaperTable:
    """Our table with the paper's rows: each editor's below ours, then those of editors that we have not. Maxima are each source's own.

    The paper's records are others than ours, and its model another: what compares is how editors differ.

    Args:
        table: from `table_1` or `table_2`.
        model: whose of the paper's numbers: "GPT-2 XL" or, in Table 2, "GPT-J".

    Raises:
        PlanError: a model that the paper's table has not, or numbers of another protocol than the paper's.
    """
    paper = PAPER_TABLE_2 if table.layout == TABLE_2 else PAPER_TABLE_1
    known = list(dict.fromkeys(paper.frame["source"]))
    if model not in known:
        raise PlanError(
            f"the paper's table has no numbers of {model}; it has those of {', '.join(known)}"
        )
    own = paper.frame[paper.frame["source"] == model]
    whole = pd.concat([table.frame, own.assign(source=f"{model} (paper)")], ignore_index=True)
    _check_one_protocol(whole)
    order = {name: place for place, name in enumerate(dict.fromkeys(whole["editor"]))}
    whole = whole.sort_values("editor", key=lambda names: names.map(order), kind="stable")
    return PaperTable(whole.reset_index(drop=True), table.layout, paper.notes)


def _of_paper(layout: Layout, source: str) -> pd.DataFrame:
    """The paper's rows of one model. How many edits failed it does not say."""
    of = paper_numbers.ZSRE if layout == TABLE_1 else paper_numbers.COUNTERFACT[source]
    counts = dict.fromkeys(["n", *(f"n_{score}" for score in layout.of_text)], of.records)
    found = paper_numbers.read(of.rows, layout.scores, without_margin=("S",))
    found.insert(1, "source", source)
    return found.assign(**counts, failed=float("nan"), protocol=of.protocol)


PAPER_TABLE_1 = PaperTable(
    _of_paper(TABLE_1, "GPT-2 XL"),
    TABLE_1,
    notes=(
        "The paper's numbers are those of Meng et al. (2022), Table 1, where MEND-zsRE is misprinted as MEND-CF",
    ),
)
"""The paper's Table 1. There ROME's specificity is bold, though KE's is larger, and FT+L's paraphrase score, which is the lowest."""
PAPER_TABLE_2 = PaperTable(
    pd.concat([_of_paper(TABLE_2, each) for each in paper_numbers.COUNTERFACT], ignore_index=True),
    TABLE_2,
    notes=("The paper's numbers are those of Meng et al. (2022), Table 2",),
)
"""The paper's Table 2, of GPT-2 XL and GPT-J. Of equal maxima it prints one bold."""
