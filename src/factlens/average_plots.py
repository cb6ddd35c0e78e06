"""Heatmaps of averages over facts, from the frame of `effects.average_effects` (ROME, Figure 2).

Columns read: `kind, window, severed, layer, role, aie, low, high, n_facts`, and where they are there and have one value
`model`, `noise`, `rule` (named in titles) and `metric` (named in scales).
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from factlens import styles
from factlens.errors import PlanError
from factlens.patches import EMBEDDING
from factlens.plans import KINDS, SEVERED
from factlens.styles import escape
from factlens.tokens import ROLES

CELL = ("kind", "window", "severed", "layer", "role")
MEASURED = ("aie", "low", "high", "n_facts")
ROW_HEIGHT = 34
PER_ROW = 3


def heatmap(
    aie: pd.DataFrame,
    *,
    kinds: str | Sequence[str] | None = None,
    window: int | None = None,
    severed: str | None = None,
    shared_scale: bool = False,
    include_embedding: bool = False,
    ate: float | None = None,
    title: str | None = None,
) -> go.Figure:
    """Role x layer heatmaps of the AIE, one for each kind; `plots.heatmap` says what the arguments are.

    Raises:
        PlanError: no averaged frame, several averages in one, or something that the frame does not hold.
    """
    frame = in_order(aie, include_embedding=include_embedding)
    panels = styles.choose(frame, kinds, window, severed, holder="average")
    return _drawn(
        panels,
        [styles.panel_title(panel) for panel in panels],
        title if title is not None else heading(panels, "Average indirect effect", ate),
        shared_scale=shared_scale,
    )


def models(
    aie: pd.DataFrame,
    *,
    column: str = "model",
    kind: str = "state",
    window: int | None = None,
    severed: str | None = None,
    shared_scale: bool = False,
    by_depth: bool = False,
    title: str | None = None,
) -> go.Figure:
    """A role x layer heatmap of the AIE for each model, or for each value of another column, three in a row.

    Args:
        aie: averaged frames put together, told apart by `column`; the embedding is left out.
        column: what differs between panels: "model", "noise", "metric", "window" and so on.
        kind: which kind.
        window: which window width, if several were traced; None for the first.
        severed: which severing; None for the ordinary run if it is there.
        shared_scale: one colour scale for all panels, so that they can be compared.
        by_depth: layers as a share of the model's depth, so that models of different depth line up.
        title: above the figure; None names what was restored.

    Raises:
        PlanError: no averaged frame, or something that the frame does not hold.
    """
    frame = in_order(aie, apart=column)
    values = [each for each in styles.unique(aie[column]) if (frame[column] == each).any()]
    panels = [
        styles.choose(
            frame[frame[column] == value], kind, window, severed, holder=f"average of {value}"
        )[0]
        for value in values
    ]
    one_width = len({int(panel["window"].iloc[0]) for panel in panels}) == 1
    part = styles.panel_title(panels[0]) if one_width else f"restoring {styles.part_name(kind)}"
    figure = _drawn(
        panels,
        [
            _value_title(column, value, panel, with_window=not one_width)
            for value, panel in zip(values, panels, strict=True)
        ],
        title
        if title is not None
        else heading(panels, f"Average indirect effect of {part}", counted=False),
        shared_scale=shared_scale,
    )
    if by_depth:
        _scale_to_depth(figure, panels)
    return figure


def in_order(
    aie: Any, *, include_embedding: bool = False, apart: str | None = None
) -> pd.DataFrame:
    """An averaged frame in the order of figures: kinds and severings as in `plans`, no tokens before the subject.

    `apart` is a column whose values are drawn apart, so that each may hold an average.

    Raises:
        PlanError: no averaged frame, or several averages in one.
    """
    if not isinstance(aie, pd.DataFrame):
        raise PlanError(
            f"this figure draws an averaged frame, not a {type(aie).__name__}; average_effects makes one"
        )
    cell = list(dict.fromkeys([*CELL, apart] if apart else CELL))
    if missing := [name for name in (*cell, *MEASURED) if name not in aie]:
        raise PlanError(
            f"the averaged frame has no column {', '.join(missing)}; it has {', '.join(aie.columns)} "
            "(average_effects makes one from a trace)"
        )
    frame = aie[aie["role"] != ROLES[0]]
    if not include_embedding:
        frame = frame[frame["layer"] != EMBEDDING]
    if frame.empty:
        raise PlanError(
            "the averaged frame has nothing to draw: no block's row from the subject on"
        )
    _check_one(frame, cell)
    return _sorted(_sorted(frame, "severed", SEVERED), "kind", KINDS)


def roles_of(panels: Sequence[pd.DataFrame]) -> list[str]:
    """The roles that are there, in the order of the paper's Figure 2; others after them."""
    return styles.unique(_sorted(pd.concat(panels), "role", ROLES)["role"])


def hover(rows: pd.DataFrame) -> list[str]:
    """The exact numbers of each row."""
    return [
        f"<b>{escape(str(row.role))}</b>, {styles.where(row.layer)}<br>AIE {row.aie:+.4f}"
        f"{interval(row.low, row.high)}<br>{row.n_facts:.0f} facts"
        for row in rows.itertuples(index=False)
    ]


def interval(low: float, high: float) -> str:
    """A line for the interval, if there is one."""
    return "" if pd.isna(low) else f"<br>95 % interval {low:+.4f} to {high:+.4f}"


def scale_name(rows: pd.DataFrame) -> str:
    """AIE, and in what unless it is the paper's probability."""
    metrics = styles.unique(rows["metric"]) if "metric" in rows else []
    if len(metrics) != 1 or metrics[0] == "prob":
        return "AIE"
    return f"AIE ({escape(styles.METRIC_NAMES.get(metrics[0], str(metrics[0])))})"


def heading(
    panels: Sequence[pd.DataFrame], what: str, ate: float | None = None, *, counted: bool = True
) -> str:
    """`what` was averaged, and over what: the model, the corruption, how many facts, what was severed."""
    rows = pd.concat(panels)
    said = [
        escape(str(rows[name].iloc[0]))
        for name in ("model", "noise", "rule")
        if name in rows and rows[name].nunique(dropna=False) == 1
    ]
    if counted:
        said.append(f"{rows['n_facts'].max():.0f} facts")
    if ate is not None:
        said.append(f"ATE {ate:.3f}")
    cuts = styles.unique(rows["severed"])
    if len(cuts) == 1 and cuts[0] != "none":
        said.append(escape(styles.CUTS.get(cuts[0], str(cuts[0]))))
    return f"<b>{what}</b>" + (f"<br><sup>{', '.join(said)}</sup>" if said else "")


def _drawn(
    panels: Sequence[pd.DataFrame], titles: Sequence[str], title: str, *, shared_scale: bool
) -> go.Figure:
    """Heatmaps from 0 up, as in the paper: what is below 0 takes the colour of 0."""
    roles = roles_of(panels)
    scaled = [pd.concat(panels)] * len(panels) if shared_scale else panels
    figure, places = styles.grid_of_panels(
        titles, heading=title, height=ROW_HEIGHT * len(roles), per_row=PER_ROW
    )
    for (row, column), panel, rows in zip(places, panels, scaled, strict=True):
        bar = styles.colour_bar(figure, scale_name(panel), row, column)
        cells = panel.assign(hover=hover(panel))
        scale = {"zmin": 0.0, "zmax": max(1e-9, float(rows["aie"].max())), "colorbar": bar}
        for grid in styles.grids(cells, "aie", "role", roles, **scale):
            figure.add_trace(grid, row=row, col=column)
        figure.update_xaxes(styles.layer_axis(panel), row=row, col=column)
    styles.name_rows(figure, [escape(str(role)) for role in roles])
    return figure


def _value_title(column: str, value: object, panel: pd.DataFrame, *, with_window: bool) -> str:
    said = [str(value) if column == "model" else f"{column} {value}"]
    if with_window and column != "window":
        said.append(f"window {panel['window'].iloc[0]}")
    said.append(f"{panel['n_facts'].max():.0f} facts")
    return escape(", ".join(said))


def _scale_to_depth(figure: go.Figure, panels: Sequence[pd.DataFrame]) -> None:
    for grid, panel in zip(figure.data, panels, strict=True):
        n_layers = int(panel["layer"].max()) + 1
        grid.x = [(edge + 0.5) / n_layers for edge in grid.x]
    ticks = [0.0, 0.25, 0.5, 0.75, 1.0]
    figure.update_xaxes(title_text="depth (share of layers)", tickvals=ticks, ticktext=ticks)


def _check_one(frame: pd.DataFrame, cell: list[str]) -> None:
    most = int(frame.groupby(cell, dropna=False, observed=True).size().max())
    if most == 1:
        return
    # What tells averages apart has few values; what was measured has one for nearly every row.
    several = [
        f"{name} ({', '.join(map(str, styles.unique(frame[name])))})"
        for name in frame.columns.difference([*cell, *MEASURED, "se"], sort=False)
        if 1 < frame[name].nunique(dropna=False) <= most
    ]
    raise PlanError(
        f"the frame holds {most} averages of one cell, of several {' and '.join(several) or 'rows'}; "
        "choose one, or draw each in a panel of its own with plots.models(frame, column=...)"
    )


def _sorted(frame: pd.DataFrame, column: str, order: Sequence[str]) -> pd.DataFrame:
    rank = {name: at for at, name in enumerate(order)}
    ranks = [rank.get(value, len(rank)) for value in frame[column]]
    return frame.iloc[sorted(range(len(frame)), key=ranks.__getitem__)]
