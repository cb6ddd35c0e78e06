"""ROME's scores at every layer and token of the subject, beside the AIE of MLP windows (ROME, Figure 5)."""

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go

from factlens import styles
from factlens.average_plots import hover, in_order
from factlens.errors import PlanError
from factlens.line_plots import HEIGHT, ROLE_COLOURS, curve
from factlens.styles import escape

PANELS = {
    "ES": "efficacy (ES)",
    "PS": "generalisation (PS)",
    "NS": "specificity (NS)",
    "S": "S, their harmonic mean",
    "retention": "the subject's other facts kept",
}
"""The scores drawn, and their panels' titles; a score without a value has none."""
ROLES = {
    "subject-first": "first subject",
    "subject-middle": "middle subject",
    "subject-last": "last subject",
    "first-after": "first after",
    "last": "last",
}
"""The tokens of edits by their role in traces, which gives their colours."""
LAST_SUBJECT = "last subject"
PER_ROW = 2
HEADING = 40
"""Height of the heading, in pixels."""
COLUMNS = ("layer", "fact_token", *PANELS, "n")
WARNING = (
    "A layer at which causal tracing finds facts need not be one at which edits succeed: of single facts the one "
    "says next to nothing of the other (Hase et al., 2023)."
)


def sweep(
    found: pd.DataFrame,
    *,
    aie: pd.DataFrame | None = None,
    window: int | None = None,
    correlations: pd.DataFrame | None = None,
    title: str | None = None,
) -> go.Figure:
    """Scores of edits by layer, a line for each token in the band of its 95 % interval, a panel for each score (ROME, Figure 5).

    The caption says over how many records, and warns of reading the layer to edit off a trace (Hase et al., 2023).

    Args:
        found: the frame of `layer_sweeps.by_layer`.
        aie: an averaged frame with MLP windows, whose AIE at the last subject token gets a panel.
        window: which width of those, if several were traced; None for the first.
        correlations: the frame of `layer_sweeps.correlation`, for the caption.
        title: above the figure; None says what it shows.

    Raises:
        PlanError: no such frame, or one without MLP windows at the last subject token.
    """
    if missing := [name for name in COLUMNS if name not in found]:
        raise PlanError(
            f"the frame has no column {', '.join(missing)}; layer_sweeps.by_layer makes one that has"
        )
    scores = [score for score in PANELS if found[score].notna().any()]
    effects = None if aie is None else _effects(aie, window)
    titles = [PANELS[score] for score in scores]
    if effects is not None:
        titles.append(f"{styles.panel_title(effects)}, {LAST_SUBJECT} token")
    heading = title if title is not None else "<b>ROME at each layer and token</b>"
    figure, places = styles.grid_of_panels(
        titles, heading=heading, height=HEIGHT, per_row=PER_ROW, shared_yaxes=False
    )
    for score, place in zip(scores, places, strict=False):
        _draw_score(figure, found, score, place, legend=score == scores[0])
    if effects is not None:
        _draw_effects(figure, effects, places[-1])
    _hide_empty(figure, places)
    _add_caption(figure, _caption(found, correlations))
    return figure


def _draw_score(
    figure: go.Figure, found: pd.DataFrame, score: str, place: tuple[int, int], *, legend: bool
) -> None:
    for token in styles.unique(found["fact_token"]):
        rows = found[found["fact_token"] == token].sort_values("layer")
        rows = rows.assign(
            low=rows[score] - rows[f"{score}_margin"], high=rows[score] + rows[f"{score}_margin"]
        )
        role = ROLES.get(token, str(token))
        colour = ROLE_COLOURS.get(role, styles.OTHER_COLOUR)
        drawn = curve(rows, score, _texts(rows, score, role), role, colour, legend=legend)
        figure.add_traces(drawn, rows=place[0], cols=place[1])
    panel = found.assign(kind="edit")
    figure.update_xaxes(styles.layer_axis(panel), row=place[0], col=place[1])
    figure.update_yaxes(title_text="per cent", range=[-2, 102], row=place[0], col=place[1])


def _draw_effects(figure: go.Figure, effects: pd.DataFrame, place: tuple[int, int]) -> None:
    colour = ROLE_COLOURS[LAST_SUBJECT]  # Colours are tokens' here.
    drawn = curve(effects, "aie", hover(effects), LAST_SUBJECT, colour, legend=False)
    figure.add_traces(drawn, rows=place[0], cols=place[1])
    figure.update_xaxes(styles.layer_axis(effects), row=place[0], col=place[1])
    figure.update_yaxes(title_text="AIE", row=place[0], col=place[1])


def _effects(aie: pd.DataFrame, window: int | None) -> pd.DataFrame:
    (panel,) = styles.choose(in_order(aie), "mlp", window, None, holder="average")
    styles.check_held([LAST_SUBJECT], styles.unique(panel["role"]), "role", "average")
    return panel[panel["role"] == LAST_SUBJECT].sort_values("layer")


def _texts(rows: pd.DataFrame, score: str, role: str) -> list[str]:
    """The exact numbers, for hovering."""
    return [
        f"<b>{escape(role)}</b>, {styles.where(row['layer'])}<br>{PANELS[score]} {row[score]:.1f} "
        f"({row['low']:.1f} to {row['high']:.1f})<br>{row['n']:.0f} records"
        for _, row in rows.iterrows()
    ]


def _caption(found: pd.DataFrame, correlations: pd.DataFrame | None) -> list[str]:
    """The lines below the figure."""
    counts = [
        f"{escape(ROLES.get(token, str(token)))} {group['n'].max():.0f}"
        for token, group in found.groupby("fact_token", sort=False)
    ]
    lines = [
        f"Means over records with 95 % intervals; tokens at which facts are looked up, and records that have them: {', '.join(counts)}.",
        WARNING,
    ]
    if correlations is not None:
        pearson = correlations[correlations["method"] == "pearson"].dropna(subset=["r"])
        said = [
            f"{row.score} {row.r:+.2f} ({row.low:+.2f} to {row.high:+.2f})"
            for row in pearson.itertuples(index=False)
        ]
        lines.insert(
            1,
            f"Pearson's r over layers of edits at the last subject token with the AIE: {', '.join(said) or 'none'}.",
        )
    return lines


def _add_caption(figure: go.Figure, lines: Sequence[str]) -> None:
    below = 60
    height = figure.layout.height + below + 18 * len(lines)
    figure.update_layout(
        margin={"l": 80, "b": 60 + below + 18 * len(lines)},
        height=height,
        # Below the heading: right of the panels it would lie outside of many windows.
        legend={
            "orientation": "h",
            "x": 0,
            "yref": "container",
            "y": 1 - HEADING / height,
            "yanchor": "top",
        },
    )
    figure.add_annotation(
        text="<br>".join(lines),
        xref="paper",
        yref="paper",
        x=0,
        y=0,
        yshift=-below,
        xanchor="left",
        yanchor="top",
        align="left",
        showarrow=False,
    )


def _hide_empty(figure: go.Figure, places: Sequence[tuple[int, int]]) -> None:
    """Places of the last row that no panel fills."""
    down, across = places[-1][0], max(column for _, column in places)
    for column in range(places[-1][1] + 1, across + 1):
        figure.update_xaxes(visible=False, row=down, col=column)
        figure.update_yaxes(visible=False, row=down, col=column)
