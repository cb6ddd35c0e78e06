"""S of every setting of every editor that was tried, best first: what tuning gained over the default, and how flat S is at the top."""

import pandas as pd
import plotly.graph_objects as go

from factlens import styles
from factlens.styles import escape
from factlens.tunings import in_words

HEIGHT = 220
PER_ROW = 3
MARKS = {
    "tried": {"color": "#8c8c8c", "size": 7, "symbol": "circle"},
    "default": {"color": "#d55e00", "size": 13, "symbol": "circle-open", "line": {"width": 2}},
    "taken": {"color": "#0072b2", "size": 12, "symbol": "star"},
}
"""Every setting, and around or over it what it is besides, in Okabe and Ito's colours."""
COLUMNS = ("editor", "setting", "taken", "S", "S_margin", *("ES", "PS", "NS"), "KL", "n")


def tuning(found: pd.DataFrame, *, title: str | None = None) -> go.Figure:
    """A panel for each editor: S of its settings with 95 % intervals, best first; the default and the one that is taken are marked.

    Args:
        found: the frame of `tunings.tune`.
        title: above the figure; None says what it shows.

    Raises:
        PlanError: a column is missing.
    """
    styles.check_held(COLUMNS, list(found.columns), "column", "table of settings")
    editors = styles.unique(found["editor"])
    heading = title if title is not None else "<b>S of each setting that was tried, best first</b>"
    figure, places = styles.grid_of_panels(
        [escape(name) for name in editors], heading=heading, height=HEIGHT, per_row=PER_ROW
    )
    for name, place in zip(editors, places, strict=True):
        rows = found[found["editor"] == name].sort_values("S", ascending=False, kind="stable")
        rows = rows.assign(rank=range(1, len(rows) + 1))
        marked = {
            "tried": rows,
            "default": rows[rows["setting"] == 0],
            "taken": rows[rows["taken"]],
        }
        for mark, some in marked.items():
            legend = name == editors[0]
            figure.add_trace(_points(some, mark, legend=legend), row=place[0], col=place[1])
    every = max(1, round(len(found) / len(editors) / 8))  # About eight ranks are named.
    figure.update_xaxes(title_text="rank", showgrid=False, dtick=every)
    figure.update_yaxes(title_text="S in per cent", range=[-2, 102], col=1)
    return figure


def _points(rows: pd.DataFrame, mark: str, *, legend: bool) -> go.Scatter:
    errors = {"array": list(rows["S_margin"]), "thickness": 1, "color": "#bbbbbb"}
    return go.Scatter(
        x=list(rows["rank"]),
        y=list(rows["S"]),
        error_y=errors if mark == "tried" else None,
        mode="markers",
        marker=MARKS[mark],
        name=mark,
        legendgroup=mark,
        showlegend=legend,
        text=[_text(row) for _, row in rows.iterrows()],
        hovertemplate="%{text}<extra></extra>",
    )


def _text(row: pd.Series) -> str:
    """The exact numbers, for hovering."""
    what = "default: " if row["setting"] == 0 else ""
    scores = ", ".join(f"{name} {row[name]:.1f}" for name in ("ES", "PS", "NS"))
    return (
        f"<b>{what}{escape(in_words(row))}</b><br>S {row['S']:.1f} ±{row['S_margin']:.1f}<br>{scores}, KL {row['KL']:.3f}"
        f"<br>{row['n']} records"
    )
