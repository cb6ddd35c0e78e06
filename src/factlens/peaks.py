"""Where effects peak: fact by fact, and on average under each rule (REFERENCE: exceptions to the early site)."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from factlens.effects import average_effects, average_total_effects
from factlens.errors import PlanError
from factlens.measurements import Traced, checked, listed, own_metric, refuse_mixing, with_effect
from factlens.patches import EMBEDDING
from factlens.traces import Trace

SITES = {
    "subject": ("first subject", "middle subject", "last subject"),
    "after": ("first after", "further"),
    "last": ("last",),
}
PEAK_COLUMNS = ["variant", "metric", "kind", "window", "severed", "site", "role", "layer"]
PEAK_COLUMNS += ["aie", "low", "high", "n_facts", "ate"]


def peaks(traced: Traced, *, kind: str = "state", metric: str | None = None) -> pd.DataFrame:
    """Each fact's cell of largest effect: `fact, layer, position, token, role, effect, at_last_subject`.

    Among unsevered cells of the blocks (not the embedding) from the subject on, of the first window if there are
    several. The prompt's last token is left out, where restoring the last state gives the whole TE by construction,
    unless it is the last subject token.

    Raises:
        PlanError: no such cells, or several models, noises and the like.
    """
    frame = with_effect(checked(traced, ["token"]), metric)
    among = frame[(frame["kind"] == kind) & (frame["severed"] == "none")]
    among = among[among["layer"] > EMBEDDING]
    if among.empty:
        raise PlanError(
            f"no unsevered cells of kind {kind!r} in a block; there are the kinds {listed(frame['kind'].unique())} "
            f"with the severings {listed(frame['severed'].unique())}"
        )
    among = among[among["window"] == among["window"].iloc[0]]
    refuse_mixing(among, ("head",))
    among = among[~among["role"].isin(["before subject", "last"]) & among["effect"].notna()]
    best = among.loc[among.groupby("fact")["effect"].idxmax()].reset_index(drop=True)
    found = best[["fact", "layer", "position", "token", "role", "effect"]]
    return found.assign(at_last_subject=found["role"] == "last subject")


def elsewhere(trace: Trace, *, kind: str = "state", metric: str | None = None) -> pd.DataFrame:
    """The facts that peak anywhere but at the last subject token, strongest first, with what they say.

    Returns `fact, prompt, subject, answer`, then the columns of `peaks`.

    Raises:
        PlanError: as `peaks`.
    """
    found = peaks(trace, kind=kind, metric=metric)
    found = found[~found["at_last_subject"]].sort_values("effect", ascending=False)
    facts = [trace.facts[number] for number in found["fact"]]
    found.insert(1, "prompt", [fact.prompt for fact in facts])
    found.insert(2, "subject", [fact.subject for fact in facts])
    found.insert(3, "answer", [trace.answers[number] for number in found["fact"]])
    return found.reset_index(drop=True)


def peak_table(
    traces: Mapping[str, Traced],
    *,
    interval: str = "normal",
    metric: str | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Where the AIE peaks under each named variant: noise rules, metrics, windows, models side by side.

    Returns `variant, metric, kind, window, severed, site, role, layer, aie, low, high, n_facts, ate`: for each kind,
    window and severing the largest AIE among the subject's roles, after the subject, and at the last token, the
    embedding left out. The interval is that of the cell, not corrected for its having been picked as the largest.

    Raises:
        PlanError: as `average_effects`.
    """
    if not traces:
        raise PlanError("nothing to compare: give traces by name, such as {'gaussian': trace}")
    options: dict[str, Any] = {"interval": interval, "resamples": resamples, "seed": seed}
    sites = {role: site for site, roles in SITES.items() for role in roles}
    tables = []
    for variant, traced in traces.items():
        measured = metric or own_metric(traced)
        total = average_total_effects(traced, metric=measured, **options)["ate"].iloc[0]
        averaged = average_effects(traced, metric=measured, **options)
        averaged = averaged[(averaged["layer"] > EMBEDDING) & averaged["aie"].notna()]
        averaged = averaged.assign(site=averaged["role"].astype(object).map(sites))
        groups = averaged.groupby(["kind", "window", "severed", "site"], sort=False)
        best = averaged.loc[groups["aie"].idxmax()]
        tables.append(best.assign(variant=variant, metric=measured, ate=total))
    return pd.concat(tables, ignore_index=True)[PEAK_COLUMNS]
