"""Points of cells measured in two ways: an exact effect against its attribution (ROME, Figure 16)."""

import pandas as pd
import plotly.graph_objects as go

from factlens import styles
from factlens.errors import PlanError
from factlens.styles import escape

NAMED = ("fact", "token", "role", "layer", "window", "severed")
CROWD = 20_000
"""From so many points on the graphics card draws them, as SVG grows slow."""
SIZE = 460


def agreement(frame: pd.DataFrame, x: str, y: str, *, title: str | None = None) -> go.Figure:
    """Each row as a point, the column `y` against the column `x`, coloured by `kind`; dotted where they are equal.

    Args:
        frame: `kind`, `x` and `y`; what else tells cells apart (`fact, token, role, layer, window, severed`) is shown
            when hovered over.
        x: a column of numbers, such as "effect".
        y: another, such as "attribution".
        title: above the figure; None names the two.

    Raises:
        PlanError: no such column, or no row.
    """
    styles.check_held(["kind", x, y], list(frame.columns), "column", "frame")
    if frame.empty:
        raise PlanError("the frame has no rows, so there is nothing to compare")
    figure = go.Figure(
        [
            _points(rows, x, y, len(frame))
            for _, rows in frame.groupby("kind", sort=False, observed=True)
        ]
    )
    least, most = float(frame[x].min()), float(frame[x].max())
    dots = {"dash": "dot", "width": 1.5, "color": "#222"}
    figure.add_shape(type="line", x0=least, y0=least, x1=most, y1=most, line=dots)
    zero = {"zeroline": True, "zerolinewidth": 1, "zerolinecolor": "#bbb"}
    figure.update_xaxes(title_text=escape(x), **zero)
    figure.update_yaxes(title_text=escape(y), **zero)
    heading = f"<b>{escape(y)} against {escape(x)}</b><br><sup>{len(frame)} cells</sup>"
    figure.update_layout(
        title={"text": title if title is not None else heading, "x": 0.01, "xanchor": "left"},
        template="simple_white",
        width=SIZE + 260,
        height=SIZE + 150,
        margin={"l": 80, "r": 180, "t": 90, "b": 60},
    )
    return figure


def _points(rows: pd.DataFrame, x: str, y: str, crowd: int) -> go.Scatter | go.Scattergl:
    kind = str(rows["kind"].iloc[0])
    draw = go.Scattergl if crowd >= CROWD else go.Scatter
    return draw(
        x=list(rows[x]),
        y=list(rows[y]),
        mode="markers",
        marker={
            "size": 5,
            "opacity": 0.5,
            "color": styles.COLOURS.get(kind, styles.OTHER_COLOUR),
        },
        name=styles.part_name(kind),
        text=_hover(rows, x, y),
        hovertemplate="%{text}<extra></extra>",
    )


def _hover(rows: pd.DataFrame, x: str, y: str) -> list[str]:
    named = [name for name in NAMED if name in rows]
    return [
        ", ".join(f"{name} {escape(str(cell[name]))}" for name in named)
        + f"<br>{escape(x)} {cell[x]:+.4f}<br>{escape(y)} {cell[y]:+.4f}"
        for cell in rows.to_dict("records")
    ]
