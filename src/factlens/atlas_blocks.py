"""Blocks of documents that are written by measurements: what stands between `<!-- atlas: NAME -->` and `<!-- end -->`.

Each block is a function of what a release measured (`Measured`), so that a number in a document is always one that was measured on the
checkpoint that ships.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from factlens.averages import read_run
from factlens.errors import OutputError
from factlens.files import written_whole
from factlens.studies import NOISE_RULES
from factlens.summaries import Summary
from factlens.terminal import as_markdown

BLOCK = re.compile(r"(<!-- atlas: (?P<name>[a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
SCORES = ("ES", "PS", "NS", "retention")
EDITORS = {
    "none": "unedited",
    "C = identity": "ROME with the identity for C",
    "rome": "ROME",
}


@dataclass(frozen=True)
class Measured:
    """The folder of a release: what `atlas_release measure` left in it, and the checkpoint's report."""

    folder: Path
    report: Mapping[str, Any]
    """`report.json` of the checkpoint."""

    @cached_property
    def summary(self) -> Summary:
        """The run of a thousand facts."""
        return Summary(read_run(self.folder / "average"))

    def table(self, name: str) -> pd.DataFrame:
        """One of the release's tables."""
        return pd.read_csv(self.folder / name)


def average(measured: Measured) -> str:
    """The sentence about the run of a thousand facts."""
    run, total = measured.summary.run, measured.summary.ate.iloc[0]
    known = int(run.knowledge["known"].sum())
    return (
        f"On atlas: {len(run.main)} facts, of {known} known and {len(run.knowledge)} asked; clean p {total['clean']:.3f}, corrupted "
        f"{total['corrupted']:.3f}, ATE {total['ate']:.3f} ({total['low']:.3f} to {total['high']:.3f}); "
        f"{run.seconds:.0f} s of wall-clock on two cores (`make average`)."
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
    rows: dict[str, dict[str, str]] = {}
    for claim, difference, verdict in zip(
        found["claim"], _differences(found), found["verdict"], strict=True
    ):
        rule, _, what = claim.partition(": ")
        if rule in NOISE_RULES:
            rows.setdefault(rule, {"rule": rule})[what] = f"{difference} {verdict}".strip()
    return as_markdown(pd.DataFrame([*rows.values()]))


def _own_claims(measured: Measured) -> pd.DataFrame:
    """The claims about the corruption of the paper."""
    found = measured.summary.claims
    return found[~found["claim"].str.partition(": ")[0].isin(NOISE_RULES)].copy()


def numbers(measured: Measured) -> str:
    """The paper's numbers beside atlas's."""
    found = measured.summary.numbers
    here = [
        f"{row.here:.3f}" + ("" if row.low != row.low else f" ({row.low:.3f} to {row.high:.3f})")
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
        AIE=[f"{r.aie:.3f} ({r.low:.3f} to {r.high:.3f})" for r in found.itertuples()],
    )
    share = measured.summary.peak_share
    return (
        f"{as_markdown(table)}\n\nFacts whose largest effect on states before the last token is not at the last subject "
        f"token: {share:.1%}."
    )


def edits(measured: Measured) -> str:
    """The scores of edits of atlas-CounterFact's test records."""
    found = measured.table("edits/table.csv")
    rows = [
        {
            "": EDITORS[row["editor"]],
            "S": f"{row['S']:.1f}",
            "efficacy": _score(row, "ES"),
            "paraphrase": _score(row, "PS"),
            "neighbourhood": _score(row, "NS"),
            "the subject's other facts that survive": _score(row, "retention"),
        }
        for _, row in found.iterrows()
    ]
    return as_markdown(pd.DataFrame(rows))


def records(measured: Measured) -> str:
    """How many records each relation gives."""
    return as_markdown(measured.table("records.csv"))


def clamps(measured: Measured) -> str:
    """Clamps at the best layer."""
    return as_markdown(_swept(measured.table("clamps/sweep.csv"), "max_norm_ratio"))


def layers(measured: Measured) -> str:
    """Layers and clamps, coarsely."""
    return as_markdown(_swept(measured.table("layers/sweep.csv"), "layer", "max_norm_ratio"))


def _swept(found: pd.DataFrame, *settings: str) -> pd.DataFrame:
    table = found.sort_values([*settings])[[*settings]].rename(columns={"max_norm_ratio": "clamp"})
    table["S"] = found["S"].map("{:.1f}".format)
    for score in SCORES:
        table[score] = found.apply(_score, axis=1, name=score)
    return table


def known(measured: Measured) -> str:
    """What the checkpoint knows, by split."""
    total = measured.report["total"]
    rows = [
        (name, f"{total[f'{split}_statements']:,}".replace(",", " "), f"{100 * total[split]:.1f} %")
        for name, split in (("training", "train"), ("held-out", "held"), ("fresh", "fresh"))
    ]
    return as_markdown(pd.DataFrame(rows, columns=["templates", "statements", "known"]))


def _score(row: pd.Series, name: str) -> str:
    margin = row[f"{name}_margin"]
    return f"{row[name]:.1f}" + (f" ±{margin:.1f}" if margin > 0 else "")


def _differences(found: pd.DataFrame) -> pd.Series:
    """With their intervals; nothing where there were no facts to compare."""
    shown = [f"{r.difference:+.3f} ({r.low:+.3f} to {r.high:+.3f})" for r in found.itertuples()]
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
    "clamps": clamps,
    "layers": layers,
    "known": known,
}
"""Every block that a document may have."""


def filled(text: str, write: Callable[[str], str]) -> str:
    """The text with each of its blocks written anew by `write(name)`."""
    return BLOCK.sub(lambda found: f"{found[1]}{write(found['name'])}\n{found[3]}", text)


def fill(document: Path, measured: Measured) -> list[str]:
    """Write the blocks of a document anew; their names.

    Raises:
        OutputError: it has a block that nobody writes.
    """
    names: list[str] = []

    def write(name: str) -> str:
        if name not in BLOCKS:
            raise OutputError(f"{document} has a block {name!r}; there are {', '.join(BLOCKS)}")
        names.append(name)
        return BLOCKS[name](measured)

    text = filled(document.read_text(encoding="utf-8"), write)
    with written_whole(document) as partial:
        partial.write_text(text, encoding="utf-8")
    return names
