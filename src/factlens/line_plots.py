"""Curves over layers, from averaged frames (ROME, Figures 3 and 7)."""

from collections.abc import Callable, Sequence

import pandas as pd
import plotly.graph_objects as go

from factlens import styles
from factlens.average_plots import heading, hover, in_order, interval, roles_of, scale_name
from factlens.errors import PlanError
from factlens.patches import EMBEDDING
from factlens.plans import SEVERED, as_tuple
from factlens.styles import escape

ROLE_COLOURS = {
    "first subject": "#56b4e9",
    "middle subject": "#009e73",
    "last subject": "#0072b2",
    "first after": "#e69f00",
    "further": "#8c8c8c",
    "last": "#d55e00",
}
"""Okabe and Ito's, which colour-blind readers can tell apart."""
DASHES = {"none": "solid", "mlp": "dash", "attn": "dot", "both": "dashdot"}
"""Severed curves often run on the ordinary one, which shows between their dashes."""
HEIGHT = 260
GAPS = ("severed", "layer", "difference", "low", "high")


def lines(
    aie: pd.DataFrame,
    *,
    roles: str | Sequence[str] | None = None,
    kinds: str | Sequence[str] | None = None,
    window: int | None = None,
    severed: str | None = None,
    shared_scale: bool = True,
    ate: float | None = None,
    title: str | None = None,
) -> go.Figure:
    """The AIE by layer, a line for each role in the band of its interval, a panel for each kind (ROME, Figure 7).

    Args:
        aie: an averaged frame; the embedding is left out.
        roles: which roles; None for all but those before the subject.
        kinds: which kinds, in this order; None for all that are there.
        window: which window width, if several were traced; None for the first.
        severed: which severing; None for the ordinary run if it is there.
        shared_scale: one AIE axis for all panels, so that they can be compared.
        ate: the average total effect, for the title.
        title: above the figure; None says what was averaged.

    Raises:
        PlanError: no averaged frame, several averages in one, or something that the frame does not hold.
    """
    panels = styles.choose(in_order(aie), kinds, window, severed, holder="average")
    present = roles_of(panels)
    chosen = present if roles is None else list(as_tuple(roles))
    styles.check_held(chosen, present, "role", "average")
    figure, places = _panels(
        [styles.panel_title(panel) for panel in panels],
        title if title is not None else heading(panels, "Average indirect effect", ate),
        shared_yaxes=shared_scale,
    )
    named: set[str] = set()
    for (_, column), panel in zip(places, panels, strict=True):
        for role in [role for role in chosen if role in set(panel["role"])]:
            rows = panel[panel["role"] == role].sort_values("layer")
            colour = ROLE_COLOURS.get(role, styles.OTHER_COLOUR)
            drawn = curve(rows, "aie", hover(rows), role, colour, legend=role not in named)
            figure.add_traces(drawn, rows=1, cols=column)
            named.add(role)
        figure.update_xaxes(styles.layer_axis(panel), row=1, col=column)
    figure.update_yaxes(title_text=scale_name(panels[0]), col=1)
    return figure


def severed(
    aie: pd.DataFrame,
    *,
    role: str = "last subject",
    gaps: pd.DataFrame | None = None,
    title: str | None = None,
) -> go.Figure:
    """What restored states do with and without the MLPs (or attention) above them, and the gap (ROME, Figure 3).

    Args:
        aie: an averaged frame with states, ordinary (`severed` "none") and severed; the embedding is left out.
        role: at which token.
        gaps: the difference within each fact, ordinary minus severed, averaged: `severed, layer, difference, low,
            high`. None draws the difference of the two means, which has no interval.
        title: above the figure; None says what was averaged.

    Raises:
        PlanError: no averaged frame, no such role, or nothing to compare.
    """
    frame = in_order(aie)
    states = frame[frame["kind"] == "state"]
    styles.check_held([role], styles.unique(states["role"]), "role", "average of states")
    states = states[states["role"] == role].sort_values("layer")
    cuts = [cut for cut in SEVERED if cut in set(states["severed"])]
    if "none" not in cuts or len(cuts) == 1:
        raise PlanError(
            f"the average's states are severed: {', '.join(cuts)}; this figure compares 'none' with "
            "'mlp', 'attn' or 'both': trace with severed=('none', 'mlp', 'attn')"
        )
    what = f"Average indirect effect of restoring a single state, {escape(role)}"
    figure, _ = _panels(
        ["ordinary and severed", "gap: ordinary minus severed"],
        title if title is not None else heading([states], what),
        shared_yaxes=False,
    )
    between = _gaps_of_means(states, cuts) if gaps is None else _paired(gaps)
    _draw_cuts(figure, 1, states, "aie", hover, legend=True)
    _draw_cuts(figure, 2, between, "difference", _gap_hover, legend=False)
    figure.update_xaxes(styles.layer_axis(states))
    figure.update_yaxes(title_text=scale_name(states), col=1)
    figure.update_yaxes(title_text=f"difference in {scale_name(states)}", col=2)
    return figure


def _draw_cuts(
    figure: go.Figure,
    column: int,
    rows: pd.DataFrame,
    value: str,
    texts: Callable[[pd.DataFrame], list[str]],
    *,
    legend: bool,
) -> None:
    for cut in [cut for cut in SEVERED if cut in set(rows["severed"])]:
        one = rows[rows["severed"] == cut].sort_values("layer")
        colour = styles.COLOURS["state" if cut == "none" else cut]
        drawn = curve(one, value, texts(one), styles.CUTS[cut], colour, legend=legend)
        drawn[1].line.dash = DASHES[cut]
        figure.add_traces(drawn, rows=1, cols=column)


def curve(
    rows: pd.DataFrame, value: str, texts: list[str], name: str, colour: str, *, legend: bool
) -> list[go.Scatter]:
    """The band from `low` to `high` and the line through `value` over `layer`; a click in the legend hides both."""
    name = escape(name)
    known = rows.dropna(subset=["low", "high"])
    layers, low, high = (list(known[column]) for column in ("layer", "low", "high"))
    band = go.Scatter(
        x=[*layers, *reversed(layers)],
        y=[*high, *reversed(low)],
        fill="toself",
        fillcolor=styles.see_through(colour),
        mode="lines",
        # An edge, so that bands that overlap can still be told apart.
        line={"width": 0.5, "color": styles.see_through(colour, 0.6)},
        hoverinfo="skip",
        legendgroup=name,
        showlegend=False,
    )
    line = go.Scatter(
        x=list(rows["layer"]),
        y=list(rows[value]),
        mode="lines+markers",
        line={"color": colour, "width": 2},
        marker={"size": 4},
        name=name,
        text=texts,
        hovertemplate="%{text}<extra></extra>",
        legendgroup=name,
        showlegend=legend,
    )
    return [band, line]


def _gap_hover(rows: pd.DataFrame) -> list[str]:
    return [
        f"<b>{styles.where(row.layer)}</b><br>gap {row.difference:+.4f}{interval(row.low, row.high)}"
        for row in rows.itertuples(index=False)
    ]


def _gaps_of_means(states: pd.DataFrame, cuts: Sequence[str]) -> pd.DataFrame:
    means = states.pivot(index="layer", columns="severed", values="aie")
    gaps = means[[cut for cut in cuts if cut != "none"]].rsub(means["none"], axis=0)
    table = gaps.reset_index().melt(id_vars="layer", value_name="difference", var_name="severed")
    return table.assign(low=float("nan"), high=float("nan"))


def _paired(gaps: pd.DataFrame) -> pd.DataFrame:
    if missing := [name for name in GAPS if name not in gaps]:
        raise PlanError(
            f"gaps has no column {', '.join(missing)}; it needs {', '.join(GAPS)}, and has "
            f"{', '.join(gaps.columns)}"
        )
    gaps = gaps[(gaps["layer"] != EMBEDDING) & (gaps["severed"] != "none")]
    if gaps.duplicated(["severed", "layer"]).any():
        raise PlanError("gaps has several rows of one severing and layer; choose one kind and role")
    styles.check_held(styles.unique(gaps["severed"]), SEVERED[1:], "severing", "figure")
    return gaps


def _panels(
    titles: Sequence[str], heading: str, *, shared_yaxes: bool
) -> tuple[go.Figure, list[tuple[int, int]]]:
    figure, places = styles.grid_of_panels(
        titles, heading=heading, height=HEIGHT, shared_yaxes=shared_yaxes
    )
    figure.update_layout(margin={"l": 80, "r": 160}, legend={"tracegroupgap": 0})
    figure.update_yaxes(zeroline=True, zerolinewidth=1, zerolinecolor="#bbb", showgrid=False)
    return figure, places
