"""Blocks of documents that measurements write: what stands between `<!-- atlas: NAME -->` and `<!-- end -->`.

Each block is a function of what a release measured (`Measured`), so that a number in a block is one that was measured on the
checkpoint that ships.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from factlens import atlas_results
from factlens.edit_claims import section_3
from factlens.errors import OutputError, RunError
from factlens.paper_results import Results
from factlens.paper_tables import NAMES, table_1, table_2
from factlens.studies import NOISE_RULES
from factlens.summaries import Summary
from factlens.sweeps import best
from factlens.terminal import as_markdown
from factlens.tunings import in_words, summary

BEGINNING, END = "<!-- atlas: ", "<!-- end -->"
BLOCK = re.compile(rf"({BEGINNING}(?P<name>\S+) -->\n)(?P<text>.*?)({END})", re.DOTALL)
PAPER = "paper"
"""Where `factlens paper` stands in the folder of measurements."""
COMMAND, SECONDS = "command", "seconds"
"""What is noted of a step beside its table."""
TRAININGS = Path(__file__).parents[2] / "docs" / "atlas-search.jsonl"
"""Results of `atlas_search`, in a checkout."""
SHIPPED = "longer"
"""The variant of them whose seed 0 ships."""
SCORES = ("ES", "PS", "NS", "retention")
"""The scores of edits that tables show, after S."""


@dataclass(frozen=True)
class Measured:
    """What `atlas_release measure` left in its folder, and the file of all trainings."""

    folder: Path
    trainings: Path = TRAININGS

    @cached_property
    def report(self) -> Mapping[str, Any]:
        """The checkpoint's report, measured anew.

        Raises:
            RunError: it was not.
        """
        found: Mapping[str, Any] = json.loads(
            _there(self.folder / "report.json").read_text("utf-8")
        )
        return found

    @cached_property
    def paper(self) -> Results:
        """What `factlens paper` left."""
        return Results(self.folder / PAPER)

    @property
    def summary(self) -> Summary:
        """The run of a thousand facts."""
        return self.paper.summary

    def table(self, name: str) -> pd.DataFrame:
        """One of its tables."""
        return read_table(self.folder / name)

    def step(self, name: str) -> Mapping[str, Any]:
        """The command that made a table, and its seconds."""
        found: Mapping[str, Any] = json.loads(
            _there(self.folder / name / "step.json").read_text("utf-8")
        )
        return found


def read_table(path: Path) -> pd.DataFrame:
    """A table that was measured.

    Raises:
        RunError: it was not.
    """
    return pd.read_csv(_there(path))


def _there(path: Path) -> Path:
    if not path.exists():
        raise RunError(f"{path} was not measured yet; `atlas_release measure` does it")
    return path


def average(measured: Measured) -> str:
    """The sentence about the run of a thousand facts."""
    run, total = measured.summary.run, measured.summary.ate.iloc[0]
    known = int(run.knowledge["known"].sum())
    return (
        f"On atlas: {len(run.main)} facts, of {known} known and {len(run.knowledge)} asked; clean p {total['clean']:.3f}, corrupted "
        f"{total['corrupted']:.3f}, ATE {total['ate']:.3f} ({total['low']:.3f} to {total['high']:.3f}); "
        f"{run.seconds:.0f} s of wall-clock{run.spread} (`make average`)."
    )


def claims(measured: Measured) -> str:
    """The claims of Section 2 and their verdicts."""
    found = _own_claims(measured)
    table = pd.DataFrame(
        {
            "claim of Section 2": found["claim"],
            "difference on atlas (95 %)": _differences(found),
            "verdict": found["verdict"],
        }
    )
    return as_markdown(table)


def claims_in_full(measured: Measured) -> str:
    """The claims with the paper's numbers and how each is measured."""
    found = _own_claims(measured)
    found.insert(2, "difference (95 %)", _differences(found))
    return as_markdown(found.drop(columns=["difference", "low", "high"]))


def corruption(measured: Measured) -> str:
    """Four of the claims under every other corruption rule."""
    found = measured.summary.claims
    found = found[_of_other_rules(found)]
    rows: dict[str, dict[str, str]] = {}
    for claim, difference, verdict in zip(
        found["claim"], _differences(found), found["verdict"], strict=True
    ):
        rule, what = claim.split(": ")
        rows.setdefault(rule, {"rule": rule})[what] = f"{difference} {verdict}".strip()
    return as_markdown(pd.DataFrame([*rows.values()]))


def _own_claims(measured: Measured) -> pd.DataFrame:
    """The claims about the corruption of the paper."""
    found = measured.summary.claims
    return found[~_of_other_rules(found)].copy()


def _of_other_rules(found: pd.DataFrame) -> pd.Series:
    """Which claims are put to another corruption: `replace: early site`."""
    return found["claim"].str.partition(": ")[0].isin(NOISE_RULES)


def numbers(measured: Measured) -> str:
    """The paper's numbers beside atlas's."""
    found = measured.summary.numbers
    here = [
        f"{row.here:.3f}" + ("" if pd.isna(row.low) else f" ({row.low:.3f} to {row.high:.3f})")
        for row in found.itertuples()
    ]
    paper = found["GPT-2 XL (paper)"].map("{:.3f}".format)
    return as_markdown(
        pd.DataFrame(
            {
                "what": found["what"],
                "GPT-2 XL (paper)": paper,
                "atlas": here,
                "layer": found["layer"],
            }
        )
    )


def gradients(measured: Measured) -> str:
    """How far gradients rank cells as tracing does."""
    found, main = measured.summary.gradients, measured.summary.run.main
    table = pd.DataFrame(
        {
            "method": found["method"],
            "kind": found["kind"],
            "rho": [f"{r.rho:.2f} ({r.low:.2f} to {r.high:.2f})" for r in found.itertuples()],
            "seconds a fact": found["seconds_a_fact"].map("{:.3f}".format),
            "covers": found["covers"],
        }
    )
    seconds = main.info["seconds"] / len(main)
    return (
        "Spearman's rho with the exact effects over the cells of a fact, over facts (95 %). Tracing three kinds exactly with "
        f"{main.info['samples']} samples took {seconds:.2f} s a fact of one worker.\n\n{as_markdown(table)}"
    )


def peaks(measured: Measured) -> str:
    """Where each study puts its peaks."""
    found = measured.summary.rules
    found = found[found["site"] != "after"].rename(columns={"variant": "study"})
    table = found[["study", "metric", "kind", "window", "site"]].assign(
        peak=found["role"].astype(str) + ", layer " + found["layer"].astype(str),
        AIE=[
            f"{r.aie:.3f}" + (f" ({r.low:.3f} to {r.high:.3f})" if r.low == r.low else "")
            for r in found.itertuples()  # A single fact has no interval.
        ],
    )
    share = measured.summary.peak_share
    return (
        f"{as_markdown(table)}\n\nFacts whose largest effect on states before the last token is not at the last subject "
        f"token: {share:.1%}."
    )


def edits(measured: Measured) -> str:
    """The scores of edits of atlas-CounterFact's test records, and the command."""
    found, step = measured.table("edits/table.csv"), measured.step("edits")
    rows = [
        {
            "": NAMES[row["editor"]],
            "S": f"{row['S']:.1f}",
            "efficacy": _score(row, "ES"),
            "paraphrase": _score(row, "PS"),
            "neighbourhood": _score(row, "NS"),
            "the subject's other facts that survive": _score(row, "retention"),
        }
        for _, row in found.iterrows()
    ]
    return (
        f"Of {found['n'].max()} records of *atlas-CounterFact* (`factlens {step[COMMAND]}`, {step[SECONDS] / 60:.1f} minutes with the "
        f"statistics; per cent, ± half of the 95 % interval):\n\n{as_markdown(pd.DataFrame(rows))}"
    )


def records(measured: Measured) -> str:
    """How many records each relation gives."""
    return as_markdown(measured.table("records.csv"))


def counterfact(measured: Measured) -> str:
    """Table 2 of all editors."""
    return table_2(measured.paper.counterfact).markdown()


def zsre(measured: Measured) -> str:
    """Table 1 of all editors."""
    return table_1(measured.paper.zsre).markdown()


def claims_of_edits(measured: Measured) -> str:
    """The claims of Section 3 and their verdicts."""
    paper = measured.paper
    found = section_3(paper.counterfact, paper.zsre, paper.swept)
    table = pd.DataFrame(
        {
            "claim of Section 3": found["claim"],
            "paper": found["paper"],
            "difference on atlas (95 %)": _differences(found),
            "verdict": found["verdict"],
        }
    )
    return as_markdown(table)


def clamps(measured: Measured) -> str:
    """Clamps at the best layer."""
    return as_markdown(_swept(measured.table("clamps/sweep.csv"), "max_norm_ratio"))


def layers(measured: Measured) -> str:
    """Layers and clamps, coarsely."""
    return as_markdown(_swept(measured.table("layers/sweep.csv"), "layer", "max_norm_ratio"))


def tuning(measured: Measured) -> str:
    """What was chosen for each editor, of how many settings, and what that gained."""
    found, step = measured.table("tuning/tuning.csv"), measured.step("tuning")
    rows = [
        {
            "": NAMES[taken["editor"]],
            "taken": "the default" if taken["setting"] == 0 else in_words(taken),
            "S": _score(taken, "S"),
            **{name: _score(taken, name) for name in SCORES},
            "S by default": _score(default, "S"),
        }
        for taken, default in summary(found)
    ]
    return (
        f"{found['how'].iloc[0]} (`factlens {step[COMMAND]}`, {step[SECONDS] / 60:.1f} minutes; per cent, ± half of "
        f"the 95 % interval; all settings are in [editor-tuning.csv](editor-tuning.csv)):\n\n{as_markdown(pd.DataFrame(rows))}"
    )


def _swept(found: pd.DataFrame, *settings: str) -> pd.DataFrame:
    """Every setting with its scores; the one that is taken in bold."""
    taken = best(found).name
    rows = []
    for place, row in found.sort_values([*settings]).iterrows():
        cells = {name.replace("max_norm_ratio", "clamp"): f"{row[name]:g}" for name in settings}
        if place == taken:
            cells = {name: f"**{cell}**" for name, cell in cells.items()}
        rows.append(
            cells | {"S": f"{row['S']:.1f}", **{name: _score(row, name) for name in SCORES}}
        )
    return pd.DataFrame(rows)


def known(measured: Measured) -> str:
    """What the checkpoint knows, by split."""
    total = measured.report["total"]
    rows = [
        (name, f"{total[f'{split}_statements']:,}".replace(",", " "), f"{100 * total[split]:.1f} %")
        for name, split in (("training", "train"), ("held-out", "held"), ("fresh", "fresh"))
    ]
    return as_markdown(pd.DataFrame(rows, columns=["templates", "statements", "known"]))


def kinds(measured: Measured) -> str:
    """The early site by kind of subject."""
    found = measured.table("kinds.csv")
    return as_markdown(
        pd.DataFrame(
            {
                "facts about": found["group"],
                "facts": found["facts"],
                "strongest state": [
                    f"{r.state:.3f} ({r.state_low:.3f} to {r.state_high:.3f})"
                    for r in found.itertuples()
                ],
                "beyond its embedding": [
                    f"{r.beyond:+.3f} ({r.beyond_low:+.3f} to {r.beyond_high:+.3f})"
                    for r in found.itertuples()
                ],
                "at layer": found["layer"],
            }
        )
    )


def seeds(measured: Measured) -> str:
    """The shipped recipe with every seed that was trained, by the measures of the search."""
    found = [
        each
        for each in atlas_results.read_results(measured.trainings)
        if each["variant"] == SHIPPED
    ]
    shown = atlas_results.shown(atlas_results.table(found)).drop(columns="variant")
    return (
        f"Trainings that differ in the seed alone, {len(found)} so far, by the smaller measures with which trainings were compared (240 facts; 24 records "
        "at the best of eight layers and a clamp of 3; docs/atlas.md explains the columns). Seed 0 ships: it was the first that was trained, "
        "and was not picked among others. Minutes are wall-clock of machines that did other work as well: they don't time the recipe.\n\n"
        f"{as_markdown(shown)}"
    )


def _score(row: pd.Series, name: str) -> str:
    """A score with its margin; nothing where no record could be asked."""
    margin = row[f"{name}_margin"]
    if pd.isna(row[name]):
        return ""
    return f"{row[name]:.1f}" + (f" ±{margin:.1f}" if margin > 0 else "")


def _differences(found: pd.DataFrame) -> pd.Series:
    """With their intervals; nothing where there were no facts to compare."""
    shown = [
        f"{r.difference:+.3f}"
        + (f" ({r.low:+.3f} to {r.high:+.3f})" if r.low == r.low else "")  # One alone has none.
        for r in found.itertuples()
    ]
    return pd.Series(shown, index=found.index).where(found["difference"].notna(), "")


BLOCKS: Mapping[str, Callable[[Measured], str]] = {
    "average": average,
    "claims": claims,
    "claims-in-full": claims_in_full,
    "corruption": corruption,
    "numbers": numbers,
    "gradients": gradients,
    "peaks": peaks,
    "edits": edits,
    "records": records,
    "counterfact": counterfact,
    "zsre": zsre,
    "claims-of-edits": claims_of_edits,
    "clamps": clamps,
    "layers": layers,
    "tuning": tuning,
    "known": known,
    "kinds": kinds,
    "seeds": seeds,
}
"""Every block that a document may have."""
OF_CARD = {
    "A thousand facts": average,
    "The claims of the paper's Section 2": claims,
    "The early site by kind of subject": kinds,
    "The recipe with other seeds": seeds,
    "Edits": edits,
    "Edits by layer and clamp, on records that are for choosing": layers,
    "Clamps at the best layer, on more of them": clamps,
}
"""Blocks of the card, by their headings there."""


def of_card(measured: Measured) -> dict[str, str]:
    """The blocks of the card, as its report keeps them."""
    return {heading: write(measured) for heading, write in OF_CARD.items()}


def with_blocks(document: Path, measured: Measured) -> str:
    """The text of a document with its blocks written anew.

    Raises:
        OutputError: it has a block that nobody writes, or one that does not end.
        RunError: something was not measured yet.
    """
    try:
        return filled(document.read_text(encoding="utf-8"), lambda name: BLOCKS[name](measured))
    except ValueError as error:
        raise OutputError(f"{document}: {error}") from None


def filled(text: str, write: Callable[[str], str]) -> str:
    """The text with each of its blocks written anew by `write(name)`.

    Raises:
        ValueError: a block does not end, or nobody writes it.
    """
    found = [*BLOCK.finditer(text)]
    if len(found) != text.count(BEGINNING) or len(found) != text.count(END):
        raise ValueError(f"a block begins with `{BEGINNING}NAME -->` and ends with `{END}`")
    if unknown := [match["name"] for match in found if match["name"] not in BLOCKS]:
        raise ValueError(f"nobody writes a block {unknown[0]!r}; there are {', '.join(BLOCKS)}")
    return BLOCK.sub(lambda match: f"{match[1]}{write(match['name'])}\n{match[4]}", text)
