"""A run in numbers: every table and averaged frame that its report shows, computed once, without a model."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd

from factlens import claims
from factlens.averages import Run
from factlens.effects import average_effects, average_total_effects
from factlens.gradients import rank_correlation
from factlens.patches import EMBEDDING
from factlens.peaks import elsewhere, peak_table, peaks
from factlens.studies import GRADIENTS, NOISE_RULES
from factlens.traces import Trace

PAPER = {
    "clean p": 0.270,
    "corrupted p": 0.0847,
    "ATE": 0.186,
    "states, last subject token": 0.087,
    "MLP windows, last subject token": 0.066,
    "attention windows, last subject token": 0.016,
    "attention windows, last token": 0.165 - 0.0847,
}
"""GPT-2 XL, 1 000 facts (ROME, Section 2.2 and Appendix B)."""
INTERVAL = "bootstrap"
"""Effects are skewed, and of a hundred facts Student's t falls short (`docs/average-effects.md`)."""


@dataclass(frozen=True)
class Summary:
    """What a run shows. Every property is a frame; those of studies that were not run are empty."""

    run: Run

    @cached_property
    def aie(self) -> pd.DataFrame:
        """Average indirect effects of the main trace (Figures 2 and 7)."""
        return average_effects(self.run.main, interval=INTERVAL)

    @cached_property
    def ate(self) -> pd.DataFrame:
        """The average total effect: `clean, corrupted, ate, se, low, high, n_facts`."""
        return average_total_effects(self.run.main, interval=INTERVAL)

    @cached_property
    def severed(self) -> pd.DataFrame:
        """AIE of states, ordinary and severed, at the last subject token (Figure 3)."""
        if not self._has("severed"):
            return pd.DataFrame()
        states = self.aie[(self.aie["kind"] == "state") & (self.aie["role"] == "last subject")]
        return pd.concat(
            [states, average_effects(self.run.traces["severed"], interval=INTERVAL)],
            ignore_index=True,
        )

    @cached_property
    def gaps(self) -> pd.DataFrame:
        """Figure 3's gaps, paired within facts."""
        if not self._has("severed"):
            return pd.DataFrame()
        return claims.gaps(self.run.main, self.run.traces["severed"])

    @cached_property
    def claims(self) -> pd.DataFrame:
        """Section 2's claims with their verdicts (`claims.section_2`)."""
        return claims.section_2(self.run.traces, NOISE_RULES)

    @cached_property
    def numbers(self) -> pd.DataFrame:
        """The paper's numbers beside ours: `what, GPT-2 XL, here, low, high, layer`."""
        total = self.ate.iloc[0]
        rows = [
            ("clean p", total["clean"], np.nan, np.nan, ""),
            ("corrupted p", total["corrupted"], np.nan, np.nan, ""),
            ("ATE", total["ate"], total["low"], total["high"], ""),
        ]
        blocks = self.aie[self.aie["layer"] != EMBEDDING]
        for what, kind, role in (
            ("states, last subject token", "state", "last subject"),
            ("MLP windows, last subject token", "mlp", "last subject"),
            ("attention windows, last subject token", "attn", "last subject"),
            ("attention windows, last token", "attn", "last"),
        ):
            cells = blocks[(blocks["kind"] == kind) & (blocks["role"] == role)]
            if len(cells):
                best = cells.loc[cells["aie"].idxmax()]
                rows.append((what, best["aie"], best["low"], best["high"], str(best["layer"])))
        table = pd.DataFrame(rows, columns=["what", "here", "low", "high", "layer"])
        table.insert(1, "GPT-2 XL (paper)", table["what"].map(PAPER))
        return table

    @cached_property
    def peak_share(self) -> float:
        """The share of facts whose largest effect on states before the last token is not at the last subject token."""
        return float(1 - peaks(self.run.main)["at_last_subject"].mean())

    @cached_property
    def elsewhere(self) -> pd.DataFrame:
        """Those facts, strongest first."""
        return elsewhere(self.run.main)

    @cached_property
    def rules(self) -> pd.DataFrame:
        """Where each study puts its peaks, by kind and site (`effects.peak_table`)."""
        tables = [peak_table({"main": self.run.main}, interval=INTERVAL)]
        main = self.run.main
        if "logprob" in main.info["metrics"]:
            tables.append(peak_table({"main": main}, metric="logprob", interval=INTERVAL))
        for name, trace in self._traced().items():
            if trace.info["effect"] == "direct":
                # The largest direct effect is where least is lost: shown is what holding a part takes away.
                name, trace = f"{name}: taken away", _taken_away(trace)
            tables += [
                peak_table({name: trace}, metric=each, interval=INTERVAL)
                for each in trace.info["metrics"]
            ]
        return pd.concat(tables, ignore_index=True)

    @cached_property
    def small_multiples(self) -> pd.DataFrame:
        """AIE of the main trace and of every other corruption, under `corruption`."""
        traces = {"main": self.run.main, **self._traced()}
        names = [name for name in ("main", *NOISE_RULES) if name in traces]
        return pd.concat(
            [
                average_effects(traces[name], interval=INTERVAL).assign(corruption=name)
                for name in names
            ],
            ignore_index=True,
        )

    @cached_property
    def gradients(self) -> pd.DataFrame:
        """Rank correlation of each gradient method with the exact effects, its time, and what that time covers."""
        rows = []
        for name in GRADIENTS:
            if not self._has(name):
                continue
            exact, attributed = self._paired(name)
            table = rank_correlation(exact, attributed.frame)
            options = self.run.config["studies"][name]
            steps = f", {options['steps']} steps" if "steps" in options else ""
            kinds = ", ".join(dict.fromkeys(attributed.frame["kind"]))
            covers = f"{kinds}: {attributed.info['method_samples']} samples{steps}"
            seconds = attributed.info["seconds"] / len(attributed)
            rows.append(table.assign(method=name, seconds_a_fact=seconds, covers=covers))
        if not rows:
            return pd.DataFrame()
        table = pd.concat(rows, ignore_index=True)
        return table[["method", *(c for c in table.columns if c != "method")]]

    def compared(self, method: str) -> pd.DataFrame:
        """Exact effects and attributions of one method, cell by cell: `effect, attribution` and the cells' columns."""
        exact, attributed = self._paired(method)
        keys = ["fact", "kind", "window", "severed", "layer", "position"]
        kept = exact[(exact["layer"] != EMBEDDING) & (exact["role"] != "before subject")]
        return kept.merge(attributed.frame[[*keys, "attribution"]], on=keys)

    @cached_property
    def skipped(self) -> pd.DataFrame:
        """Facts that were asked and not traced, and rows of the fact file that could not be read: `reason, facts`."""
        table = self.run.knowledge
        reasons = table.loc[~table["known"].astype(bool), "reason"].str.split(":").str[0]
        rows = list(reasons.value_counts().items())
        if unused := int((table["known"].astype(bool) & (table["chosen"] < 0)).sum()):
            rows.append(("known, and not drawn", unused))
        if skipped := len(self.run.main.skipped):
            rows.append(("known, and not to be traced", skipped))
        if bad := len(self.run.about.get("bad_rows", [])):
            rows.append(("row of the fact file that cannot be used", bad))
        return pd.DataFrame(rows, columns=["reason", "facts"])

    def _has(self, study: str) -> bool:
        return study in self.run.traces and len(self.run.traces[study]) > 0

    def _traced(self) -> dict[str, Trace]:
        """The studies that are traces of whole prompts, other than the main one."""
        left_out = ("main", "severed", *GRADIENTS)
        return {name: t for name, t in self.run.traces.items() if name not in left_out and len(t)}

    def _paired(self, method: str) -> tuple[pd.DataFrame, Trace]:
        """The main frame's facts that `method` has too, numbered as it numbers them, and what `method` found."""
        attributed = self.run.traces[method]
        number = {fact: at for at, fact in enumerate(self.run.main.facts)}
        theirs: Mapping[int, int] = {
            number[fact]: at for at, fact in enumerate(attributed.facts) if fact in number
        }
        frame = self.run.main.frame
        kept = frame[frame["fact"].isin(theirs)]
        return kept.assign(fact=kept["fact"].map(theirs)), attributed


def _taken_away(trace: Trace) -> Trace:
    """A trace of direct effects turned round: what is lost of the total effect when a part is held corrupted."""
    frame = trace.frame
    lost = frame["prob_corrupted"] + frame["prob_clean"] - frame["prob_restored"]
    effect = frame["prob_clean"] - frame["prob_restored"]
    return replace(trace, frame=frame.assign(prob_restored=lost, effect=effect))
