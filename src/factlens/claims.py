"""The claims of ROME's Section 2 put to a run, each as a paired difference with its interval and a verdict.

Every claim is a difference within facts, so that what varies between facts drops out. Where a claim is about a peak,
its layer is chosen on one half of the facts and its effect measured on the other, both ways round: a peak picked and
measured on the same facts would be too high.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass

import numpy as np
import pandas as pd

from factlens.effects import fact_effects
from factlens.errors import PlanError
from factlens.facts import Fact
from factlens.intervals import Estimate, mean_interval
from factlens.measurements import with_effect
from factlens.patches import EMBEDDING
from factlens.traces import Trace

SEEN, OPPOSITE, UNDECIDED, UNTESTABLE = "seen", "opposite", "undecided", "not testable here"
FEWEST = 50
"""Facts below which an interval is not to be trusted: of 20, 95 % intervals cover 80 % (`tests/test_effects.py`)."""
Compared = tuple[pd.Series, str]
"""Paired differences, one a fact, and how they were had."""
RESOLUTION = 1e-6
"""What probabilities are computed to; smaller differences are none."""
COLUMNS = ["claim", "paper", "difference", "low", "high", "n_facts", "verdict", "how"]
OTHERS = ("first subject", "middle subject", "first after", "further")
"""The roles that the early site is compared with."""


def verdict(found: Estimate) -> str:
    """ "seen" when the 95 % interval lies wholly on the paper's side of zero, "opposite" when wholly on the other."""
    if found.n < FEWEST or not np.isfinite([found.low, found.high]).all():
        return UNTESTABLE
    if found.low > RESOLUTION:
        return SEEN
    return OPPOSITE if found.high < -RESOLUTION else UNDECIDED


@dataclass(frozen=True)
class Grids:
    """One trace's effects per fact, as tables of facts x layers, the embedding as layer -1."""

    table: pd.DataFrame
    """Rows (kind, window, severed, layer, role), columns facts; under each role that a token has."""
    single: pd.DataFrame
    """The states under one role for each token, the later: rows (layer, role), columns facts."""

    def of(self, kind: str, role: str, severed: str = "none") -> pd.DataFrame:
        """Facts x layers of one kind and role, of the first window there is.

        Raises:
            LookupError: the trace has no such cells.
        """
        wanted = {"kind": kind, "role": role, "severed": severed}
        levels = self.table.index.to_frame()
        rows = self.table[np.logical_and.reduce([levels[n] == v for n, v in wanted.items()])]
        if rows.empty:
            raise LookupError(f"no {kind} at {role} with severing {severed}")
        window = rows.index.get_level_values("window")[0]
        return rows.xs(window, level="window").droplevel(["kind", "severed", "role"]).T

    def blocks(self, kind: str, role: str, severed: str = "none") -> pd.DataFrame:
        """`of`, without the embedding."""
        table = self.of(kind, role, severed)
        return table[[layer for layer in table.columns if layer != EMBEDDING]]

    def other(self, role: str) -> pd.DataFrame:
        """Facts x layers of the states at a role, without tokens that are also the last subject token or the last.

        Raises:
            LookupError: fewer than `FEWEST` facts have such a token.
        """
        if role not in self.single.index.get_level_values("role"):
            raise LookupError(f"no state at {role}")
        table = self.single.xs(role, level="role").T.dropna(how="all")
        if len(table) < FEWEST:
            raise LookupError(f"only {len(table)} facts have a token with the role {role}")
        return table


def grids(trace: Trace, metric: str | None = None) -> Grids:
    """The effects of each fact of a trace. Columns name the facts themselves, since traces number theirs apart."""
    names = {number: fact_label(fact) for number, fact in enumerate(trace.facts)}
    frame = with_effect(trace.frame, metric)
    states = (frame["kind"] == "state") & (frame["severed"] == "none") & (frame["layer"] >= 0)
    single = frame[states].groupby(["layer", "role", "fact"])["effect"].mean().unstack()
    return Grids(
        fact_effects(trace, metric=metric).rename(columns=names), single.rename(columns=names)
    )


def peak(table: pd.DataFrame) -> pd.Series:
    """Each fact's effect at the layer of largest mean effect over the *other* half of the facts."""
    table, halves = _halves(table)
    found = pd.Series(np.nan, index=table.index)
    for half in (halves, ~halves):
        found[half] = table.loc[half, table[~half].mean().idxmax()]
    return found


def peak_layers(table: pd.DataFrame) -> str:
    """The layers that the two halves chose, for a reader."""
    table, halves = _halves(table)
    chosen = {int(table[half].mean().idxmax()) for half in (halves, ~halves)}
    return " and ".join(map(str, sorted(chosen)))


def _halves(table: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
    """The facts that have such cells, and every second of them; their order is that of a random draw."""
    table = table.dropna(how="all")
    if len(table) < 2 or not len(table.columns):
        raise LookupError(f"{len(table)} facts and {len(table.columns)} layers are too few")
    return table, np.arange(len(table)) % 2 == 0


# -- what is compared ------------------------------------------------------------------------------


def early_site(of: Grids) -> Compared:
    """The peak at the last subject token above the strongest other token's."""
    own = of.blocks("state", "last subject")
    peaks = {}
    for role in OTHERS:
        try:
            peaks[role] = peak(of.other(role))
        except LookupError:
            continue
    if not peaks:
        raise LookupError(f"no other role before the last token has {FEWEST} facts")
    rival = max(peaks, key=lambda role: peaks[role].mean())
    how = f"layer {peak_layers(own)}, against the strongest other role before the last token ({rival})"
    return peak(own) - peaks[rival], how


def beyond_identity(of: Grids) -> Compared:
    """The early site's peak above what the token's embedding gives back by itself."""
    own = of.blocks("state", "last subject")
    embedding = of.of("state", "last subject")[EMBEDDING]
    return peak(own) - embedding, f"layer {peak_layers(own)} minus emb"


def in_the_middle(of: Grids) -> Compared:
    """The best of the middle half of the layers above the first: the site is built up, not there from the start."""
    own = of.blocks("state", "last subject")
    depth, first = len(own.columns), own.columns[0]
    middle = own[own.columns[max(1, depth // 4) : max(2, depth - depth // 4)]]
    how = f"layer {peak_layers(middle)}, the best of {_span(list(middle.columns))}, minus layer {first}"
    return peak(middle) - own[first], how


def mlp_over_attention(of: Grids) -> Compared:
    """MLP windows above attention windows at the last subject token."""
    return _peaks_compared(of, "mlp", "attn", "last subject")


def attention_over_mlp(of: Grids) -> Compared:
    """Attention windows above MLP windows at the last token."""
    return _peaks_compared(of, "attn", "mlp", "last")


def _peaks_compared(of: Grids, one: str, other: str, role: str) -> Compared:
    first, second = of.blocks(one, role), of.blocks(other, role)
    how = f"{one} at layer {peak_layers(first)} minus {other} at layer {peak_layers(second)}"
    return peak(first) - peak(second), how


def late_site(of: Grids) -> Compared:
    """States of the last token above those of the last subject token, in the last quarter of the layers.

    Without the very last layer, where restoring the last token's state is the total effect by construction.
    """
    own, early = of.blocks("state", "last"), of.blocks("state", "last subject")
    depth = len(own.columns)
    layers = [own.columns[at] for at in range(depth - max(2, depth // 4), depth - 1)]
    how = f"mean of layers {_span(layers)} (the last of {depth} is TE by construction), last token minus last subject token"
    return own[layers].mean(axis=1) - early[layers].mean(axis=1), how


def _span(layers: list) -> str:
    return f"{layers[0]}" if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"


def severed_gap(of: Grids, cut: Grids, kind: str, *, upper: bool = False) -> Compared:
    """What severing takes from the state at the last subject token, in the lowest third of the layers.

    Or in the upper half, without the last two layers: above those nothing that the last token reads can be severed.
    """
    ordinary = of.blocks("state", "last subject")
    severed = cut.blocks("state", "last subject", kind)
    layers = list(ordinary.columns)
    low = layers[: max(1, len(layers) // 3)]
    some = layers[len(layers) // 2 : -2] if upper else low
    if not some:
        raise LookupError(f"{len(layers)} layers are too few to tell upper from lower ones")
    return (ordinary[some] - severed[some]).mean(axis=1), f"mean of layers {_span(some)}"


def gaps(main: Trace, severed: Trace) -> pd.DataFrame:
    """Figure 3's gaps with their paired intervals: `severed, layer, difference, low, high, n_facts`."""
    of, cut = grids(main), grids(severed)
    ordinary, rows = of.blocks("state", "last subject"), []
    for kind in ("mlp", "attn"):
        without = cut.blocks("state", "last subject", kind)
        for layer in ordinary.columns:
            found = mean_interval(ordinary[layer] - without[layer])
            rows.append((kind, int(layer), found.mean, found.low, found.high, found.n))
    return pd.DataFrame(rows, columns=["severed", "layer", "difference", "low", "high", "n_facts"])


def concentration(frame: pd.DataFrame, column: str) -> pd.Series:
    """The share of each fact's absolute effects on states that lies at the last subject token.

    Of the blocks, from the subject on, the last token left out.
    """
    kept = frame[(frame["kind"] == "state") & (frame["severed"] == "none") & (frame["layer"] >= 0)]
    kept = kept[~kept["role"].isin(["before subject", "last"])]
    size = kept[column].abs()
    own = size.where(kept["role"] == "last subject", 0.0).groupby(kept["fact"]).sum()
    return own / size.groupby(kept["fact"]).sum()


def over_gradients(main: Trace, attributed: Trace) -> Compared:
    """How much more tracing gathers at the last subject token than integrated gradients do."""
    other = _by_fact(attributed, concentration(attributed.frame, "attribution"))
    exact = _by_fact(main, concentration(main.frame, "effect")).reindex(other.index)
    how = (
        "share of absolute effect on states before the last token that lies at the last subject token: tracing "
        f"{exact.mean():.2f} ({main.info['samples']} samples), gradients {other.mean():.2f} "
        f"({attributed.info['method_samples']} samples)"
    )
    return exact - other, how


def _by_fact(trace: Trace, values: pd.Series) -> pd.Series:
    """Indexed by the fact itself, since traces of a run number their facts apart."""
    labels = [fact_label(trace.facts[number]) for number in values.index]
    return pd.Series(values.to_numpy(), index=labels)


def fact_label(fact: Fact) -> str:
    """What the rows of the tables are called: traces of a run number their facts apart."""
    return "\0".join(map(str, astuple(fact)))


# -- the table -------------------------------------------------------------------------------------


def section_2(traces: Mapping[str, Trace], noise_rules: Iterable[str] = ()) -> pd.DataFrame:
    """Every claim of Section 2: `claim, paper, difference, low, high, n_facts, verdict, how`.

    Differences are in units of the main trace's metric (but shares where the claim says so), positive where the paper
    is right. Intervals are BCa bootstrap over facts.

    Args:
        traces: by study: "main", and where they were run "severed", "integrated gradients", and the noise rules.
        noise_rules: the studies that corrupt in another way.
    """
    main, metric = traces["main"], str(traces["main"].info["metric"])
    of = grids(main)
    rows = [
        _row(
            "early site at the last subject token", "8.7 % AIE at layer 15", lambda: early_site(of)
        ),
        _row(
            "the early site says more than the token's identity",
            "(no control)",
            lambda: beyond_identity(of),
        ),
        _row(
            "the early site is stronger in the middle layers than at the first",
            "layer 15 of 48",
            lambda: in_the_middle(of),
        ),
        _row(
            "MLPs over attention at the early site",
            "6.6 % against 1.6 %",
            lambda: mlp_over_attention(of),
        ),
        _row("late site at the last token", "Figure 2a", lambda: late_site(of)),
        _row("attention over MLPs at the late site", "Figure 2c", lambda: attention_over_mlp(of)),
    ]
    if "severed" in traces:
        rows += _severing(of, grids(traces["severed"]))
    for rule in noise_rules:
        if rule in traces and len(traces[rule]):
            rows += _same_picture(rule, grids(traces[rule], metric))
    if "integrated gradients" in traces and len(traces["integrated gradients"]):
        rows.append(
            _row(
                "tracing says more than integrated gradients: it points to the last subject token",
                "Figure 16",
                lambda: over_gradients(main, traces["integrated gradients"]),
            )
        )
    return pd.DataFrame(rows, columns=COLUMNS)


def _severing(of: Grids, cut: Grids) -> list[tuple]:
    def falling() -> Compared:
        low, how = severed_gap(of, cut, "mlp")
        high, upper = severed_gap(of, cut, "mlp", upper=True)
        return low - high, f"{how} minus {upper}"

    def none_for_attention() -> Compared:
        mlp, how = severed_gap(of, cut, "mlp")
        attn, _ = severed_gap(of, cut, "attn")
        own = mean_interval(attn, interval="bootstrap")
        known = "is" if own.low <= 0 <= own.high else "is not"
        return mlp - attn, (
            f"gap of MLPs minus gap of attention, {how}; attention's own gap {own.mean:+.4f} ({own.low:+.4f} to "
            f"{own.high:+.4f}) {known} compatible with none"
        )

    return [
        _row(
            "severing MLPs takes the effect of low layers",
            "Figure 3",
            lambda: severed_gap(of, cut, "mlp"),
        ),
        _row("severing MLPs takes less of upper layers", "Figure 3", falling),
        _row("no similar gap when attention is severed", "Figure 3", none_for_attention),
    ]


def _same_picture(rule: str, of: Grids) -> list[tuple]:
    made: list[tuple[str, Callable[[Grids], Compared]]] = [
        ("early site", early_site),
        ("it says more than the token's identity", beyond_identity),
        ("MLPs over attention there", mlp_over_attention),
        ("attention over MLPs at the late site", attention_over_mlp),
    ]
    return [_row(f"{rule}: {name}", "Appendix B.4", lambda f=f: f(of)) for name, f in made]  # type: ignore[misc]


def _row(claim: str, paper: str, compare: Callable[[], Compared]) -> tuple:
    try:
        values, how = compare()
        found = mean_interval(values.dropna(), interval="bootstrap")
    except (LookupError, PlanError) as error:
        return claim, paper, np.nan, np.nan, np.nan, 0, UNTESTABLE, str(error)
    said = verdict(found)
    if said == UNTESTABLE:
        how = f"{found.n} facts are too few; {how}"
    return claim, paper, found.mean, found.low, found.high, found.n, said, how
