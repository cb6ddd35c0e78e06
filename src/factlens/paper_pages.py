"""The report of `factlens paper`: the paper's figures and tables, ours beside its own, and a verdict on each claim."""

import pandas as pd

from factlens import plots
from factlens.edit_claims import middle_layers, section_3
from factlens.effects import average_effects
from factlens.layer_sweeps import LAST_SUBJECT, by_layer, correlation
from factlens.paper_results import Results
from factlens.paper_tables import NAMES, PaperTable, beside_paper, table_1, table_2
from factlens.reports import Section, page, run_sections

VERDICTS = "Judged as those of Section 2, but over records: each difference is of two editors, or of an editor and the unedited model, on the same ones."


def paper_page(results: Results) -> str:
    """The page, from files alone: no model, no network.

    Raises:
        RunError: a part was not made yet.
    """
    model = results.summary.run.main.info["model"]
    lead = (
        f"Locating and Editing Factual Associations in GPT (Meng et al., 2022) on {model}. The paper's numbers are of GPT-2 XL unless a "
        "line says otherwise; another model on other records need not agree. Layers count from 0."
    )
    sections = [
        Section(
            f"One fact (Figure 1): {results.trace.facts[0].prompt}",
            figure=plots.heatmap(results.trace),
        ),
        *run_sections(results.summary),
        *_editing(results),
    ]
    return page(f"The paper on {model}", lead, sections)


def _editing(results: Results) -> list[Section]:
    shown = table_2(results.counterfact)
    made = [
        *_tables(shown),
        Section(
            "The claims of Section 3",
            VERDICTS,
            table=section_3(results.counterfact, results.zsre, results.swept),
        ),
        *_beyond(results.counterfact),
    ]
    made += _tables(table_1(results.zsre))
    made.append(
        Section(
            "What the records are made of (Table 3)",
            "Distinct texts.",
            table=results.composition,
        )
    )
    return [*made, *_by_layer(results), *_texts(results.texts)]


def _tables(table: PaperTable) -> list[Section]:
    return [
        Section(table.layout.title, markup=table.html()),
        Section("The same beside the paper's", markup=beside_paper(table).html()),
    ]


def _beyond(rows: pd.DataFrame) -> list[Section]:
    """Scores that the paper has not."""
    scores = ["NS_known", "NS+", "retention", "inverse", "KL"]
    means = rows[rows["reason"] == ""].groupby("editor", sort=False)[scores].mean()
    means.index = [NAMES.get(str(name), str(name)) for name in means.index]
    note = (
        "Means over records. NS_known: NS on neighbours that the unedited model knows; NS+: with the edit's sentence before the neighbour; "
        "retention: the subject's other facts that survive; inverse: the subject is said for the new object; KL: from the unedited model, in nats per "
        "token of unrelated text."
    )
    return [Section("What the paper's scores do not ask", note, table=means.reset_index(names=""))]


def _by_layer(results: Results) -> list[Section]:
    main = results.summary.run.main
    found, correlated = by_layer(results.swept), correlation(results.swept, main)
    aie = average_effects(main)
    own = found[found["fact_token"] == LAST_SUBJECT].set_index("layer")["S"].sort_index()
    middle = middle_layers(own)
    note = (
        f"Can a fact be stored in any of the middle layers? Edited at the last subject token, S lies between {middle.min():.1f} and "
        f"{middle.max():.1f} over layers {middle.index.min()} to {middle.index.max()}; it is largest, {own.max():.1f}, at layer {own.idxmax()}."
    )
    return [
        Section(
            "ROME at every layer and token (Figure 5)",
            note,
            figure=plots.sweep(found, aie=aie, correlations=correlated),
        ),
        Section("Scores by layer and the AIE of MLP windows", table=correlated),
    ]


def _texts(texts: pd.DataFrame) -> list[Section]:
    """Figure 6: for each new fact what every editor's model writes."""
    made = []
    for number, (fact, group) in enumerate(texts.groupby("new_fact", sort=False)):
        heading = "What edited models write (Figure 6)" if number == 0 else ""
        table = group[["editor", "prompt", "text"]].assign(editor=group["editor"].map(NAMES))
        made.append(Section(heading, f"The new fact: {fact}", table=table))
    return made
