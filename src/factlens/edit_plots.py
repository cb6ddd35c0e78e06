"""Figures of edits: how the value was found, how alike keys are, what the model says and where, before and after."""

import pandas as pd
import plotly.graph_objects as go

from factlens import styles
from factlens.editors.values import Value
from factlens.errors import PlanError
from factlens.plans import CELL
from factlens.styles import METRIC_NAMES, escape
from factlens.traces import Trace

TERMS = {
    "loss": ("loss (their sum)", "#222222"),
    "nll": ("nll of the new object", "#d55e00"),
    "kl": ("KL from the model before", "#0072b2"),
    "decay": ("weight decay", "#009e73"),
}
"""The terms of Eq. 4 in words, in Okabe and Ito's colours."""
BEFORE, AFTER = "#8c8c8c", "#54278f"
DIVERGING = "RdBu_r"
"""White at 0, red above it, blue below."""
ROW_HEIGHT = 24
HEIGHT = 260
WRITTEN = 12
"""Up to so many rows a matrix has its numbers in its cells."""


def losses(value: Value | pd.DataFrame, *, title: str | None = None) -> go.Figure:
    """The loss at each step of a value's optimisation with its three terms, and beside it the norm of δ (ROME, Eq. 4).

    Args:
        value: from `choose_value`, or its `losses`: `step, loss, nll, kl, decay, norm`.
        title: above the figure; None names the rewrite, where it is known.

    Raises:
        PlanError: a column is missing, or there is no step.
    """
    frame = value.losses if isinstance(value, Value) else value
    styles.check_held(["step", *TERMS, "norm"], list(frame.columns), "column", "frame of losses")
    if frame.empty:
        raise PlanError("the frame of losses has no step, so there is nothing to draw")
    if title is None:
        title = _rewritten(value) if isinstance(value, Value) else "<b>Finding the value</b>"
    figure, _ = styles.grid_of_panels(
        ["loss in nats", "length of the shift δ"],
        heading=title,
        height=HEIGHT,
        shared_yaxes=False,
    )
    for name, (words, colour) in TERMS.items():
        figure.add_trace(_line(frame, name, words, colour), row=1, col=1)
    shift = _line(frame, "norm", "‖δ‖", styles.COLOURS["mlp"])
    figure.add_trace(shift.update(showlegend=False), row=1, col=2)
    figure.update_xaxes(title_text="step", showgrid=False)
    figure.update_yaxes(rangemode="tozero", showgrid=False)
    figure.update_layout(margin={"l": 70, "r": 190})
    return figure


def _rewritten(value: Value) -> str:
    rewrite = value.rewrite
    return (
        f"<b>{escape(rewrite.prompt)}</b> → {escape(rewrite.target)}"
        f"<br><sup>layer {value.layer}, {len(value.losses)} steps</sup>"
    )


def _line(frame: pd.DataFrame, column: str, name: str, colour: str) -> go.Scatter:
    return go.Scatter(
        x=list(frame["step"]),
        y=list(frame[column]),
        mode="lines+markers",
        line={"color": colour, "width": 3 if column == "loss" else 1.5},
        marker={"size": 4},
        name=name,
        hovertemplate=f"step %{{x}}<br>{name} %{{y:.4f}}<extra></extra>",
    )


def matrix(frame: pd.DataFrame, *, measured: str = "cosine", title: str | None = None) -> go.Figure:
    """A square frame as a heatmap, white at 0: how alike the keys of several subjects are, say.

    Args:
        frame: numbers; its index and its columns name the rows and the columns in the same order.
        measured: what the numbers are, for the colour bar.
        title: above the figure; None takes `measured`.

    Raises:
        PlanError: a frame that is not square, or empty.
    """
    if frame.empty or frame.shape[0] != frame.shape[1]:
        raise PlanError(f"a matrix has as many rows as columns, not {frame.shape}")
    values = frame.to_numpy(float)
    top = max(abs(frame.min(axis=None)), abs(frame.max(axis=None)), 1e-9)
    figure, _ = styles.grid_of_panels(
        [""],
        heading=title if title is not None else f"<b>{escape(measured)}</b>",
        height=2 * ROW_HEIGHT * len(frame),
    )
    rows, columns = ([escape(str(name)) for name in names] for names in (frame.index, frame))
    hover = [
        [f"<b>{row}</b>, {column}<br>{escape(measured)} {value:.4f}" for column, value in zip(columns, line, strict=True)]
        for row, line in zip(rows, values, strict=True)
    ]  # fmt: skip
    cells = go.Heatmap(
        z=values,
        colorscale=DIVERGING,
        zmin=-top,
        zmax=top,
        text=hover,
        hovertemplate="%{text}<extra></extra>",
        xgap=1,
        ygap=1,
        colorbar=styles.colour_bar(figure, escape(measured), 1, 1),
    )
    if len(frame) <= WRITTEN:
        cells.update(texttemplate="%{z:.2f}")
    figure.add_trace(cells)
    places = list(range(len(frame)))
    figure.update_xaxes(tickvals=places, ticktext=columns, tickangle=-40, showgrid=False)
    styles.name_rows(figure, rows)
    figure.update_layout(width=260 + max(2 * ROW_HEIGHT * len(frame), styles.PANEL_WIDTH))
    return _room_for(figure, rows, columns)


def _room_for(figure: go.Figure, rows: list[str], columns: list[str]) -> go.Figure:
    """Margins by the longest labels: about six pixels a letter, half of it for labels on the slant."""
    left, below = (6 * max(map(len, names)) for names in (rows, columns))
    added = {"l": 40 + left, "b": 40 + below // 2}
    return figure.update_layout(
        margin=added,
        width=figure.layout.width + added["l"] - 120,
        height=figure.layout.height + added["b"] - 60,
    )


def ranking(
    frame: pd.DataFrame, *, title: str | None = None, measured: str = "p(next token)"
) -> go.Figure:
    """Bars of tokens' probabilities before an edit and after it, in the frame's order from the top.

    Args:
        frame: `token, before, after`; probabilities in [0, 1], or another quantity that `measured` names.
        title: above the figure.
        measured: the name of the axis.

    Raises:
        PlanError: a column is missing, or there is no row.
    """
    styles.check_held(["token", "before", "after"], list(frame.columns), "column", "frame")
    if frame.empty:
        raise PlanError("the frame has no tokens, so there is nothing to rank")
    words = [token_label(str(token)) for token in frame["token"]]
    figure, _ = styles.grid_of_panels(
        [""],
        heading=title if title is not None else "<b>What comes next, before and after</b>",
        height=2 * ROW_HEIGHT * len(frame),
    )
    for column, colour in (("before", BEFORE), ("after", AFTER)):
        figure.add_trace(
            go.Bar(
                x=list(frame[column]),
                # Numbers, not words: two tokens may look the same without their spaces.
                y=list(range(len(frame))),
                orientation="h",
                name=column,
                marker={"color": colour},
                text=[f"<b>{word}</b><br>{column} {x:.4f}" for word, x in zip(words, frame[column], strict=True)],
                textposition="none",
                hovertemplate="%{text}<extra></extra>",
            )
        )  # fmt: skip
    styles.name_rows(figure, words)
    figure.update_xaxes(title_text=escape(measured), rangemode="tozero")
    figure.update_layout(barmode="group", bargap=0.25, margin={"r": 110})
    return figure


def token_label(token: str) -> str:
    """A token as a label: escaped, without the space that separates words, and never nothing."""
    return escape(token.replace("\n", "↵").strip()) or "␣"


# -- traces before and after -----------------------------------------------------------------------


def compared(
    before: Trace,
    after: Trace,
    kind: str = "state",
    *,
    fact: int = 0,
    window: int | None = None,
    severed: str | None = None,
    title: str | None = None,
) -> go.Figure:
    """One fact's effects before an edit, after it, and their difference: token x layer heatmaps (`Trace.compare`).

    The first two share one scale, from 0 up; the third is white at 0. Each trace measures its own answer, which the panels
    name: before the edit the old object, after it the new one, if that is what the model then says.

    Args:
        before: the trace of the model as it was.
        after: the trace of the same prompt under `applied(model, edit)`.
        kind: "state", "mlp" or "attn".
        fact: which fact of both.
        window: which window width, if several were traced; None for the first.
        severed: which severing, if several were traced; None for the first.
        title: above the figure; None names the prompt.

    Raises:
        FactError: no such fact, or traces that share no cell.
        PlanError: a kind, window or severing that the traces do not hold.
    """
    old, new = before.select(fact), after.select(fact)
    both = old.compare(new)
    (panel,) = styles.choose(both, kind, window, severed, holder="trace")
    panel = _strongest_heads(panel)
    words = _words(panel, old.subjects[0])
    figure, places = styles.grid_of_panels(
        [f"before: {_answer(old)}", f"after: {_answer(new)}", "difference: after - before"],
        heading=title if title is not None else _heading(old, panel),
        height=ROW_HEIGHT * len(words),
    )
    top = max(float(panel[["effect", "effect_other"]].max(axis=None)), 1e-9)
    apart = max(float(panel["difference"].abs().max()), 1e-9)
    unit = METRIC_NAMES[str(old.info["metric"])]
    scales = (("effect", 0.0, top), ("effect_other", 0.0, top), ("difference", -apart, apart))
    for (row, column), (name, low, high) in zip(places, scales, strict=True):
        bar = styles.colour_bar(figure, f"effect in {unit}", row, column)
        cells = panel.assign(hover=_hover(panel, words))
        for grid in styles.grids(
            cells, name, "position", list(words), zmin=low, zmax=high, colorbar=bar
        ):
            grid.update(colorscale=DIVERGING if name == "difference" else grid.colorscale)
            figure.add_trace(grid, row=row, col=column)
        figure.update_xaxes(styles.layer_axis(panel), row=row, col=column)
    styles.name_rows(figure, list(words.values()))
    return figure


def _strongest_heads(panel: pd.DataFrame) -> pd.DataFrame:
    """Of a site with heads, the largest effects of any head in each cell, and the difference of those."""
    if "head" not in panel:
        return panel
    cells = panel.groupby([*CELL, "token", "role"], sort=False, as_index=False)
    found = cells[["effect", "effect_other"]].max()
    return found.assign(difference=found["effect_other"] - found["effect"])


def _words(panel: pd.DataFrame, subject: tuple[int, int]) -> dict[int, str]:
    """Row labels by position, starred inside the subject (half-open span)."""
    tokens = panel.drop_duplicates("position").set_index("position")["token"].sort_index()
    return {
        int(at): token_label(word) + ("*" if subject[0] <= at < subject[1] else "")
        for at, word in tokens.items()
    }


def _answer(one: Trace) -> str:
    return f"{METRIC_NAMES[str(one.info['metric'])]}({escape(one.answers[0].strip())})"


def _hover(panel: pd.DataFrame, words: dict[int, str]) -> list[str]:
    return [
        f"<b>{words[cell.position]}</b>, {styles.where(cell.layer)}<br>before {cell.effect:+.4f}"
        f"<br>after {cell.effect_other:+.4f}<br>difference {cell.difference:+.4f}"
        for cell in panel.itertuples(index=False)
    ]


def _heading(trace: Trace, panel: pd.DataFrame) -> str:
    cut = str(panel["severed"].iloc[0])
    severing = "" if cut == "none" else f", {styles.CUTS[cut]}"
    return (
        f"<b>{escape(trace.facts[0].prompt)}</b>"
        f"<br><sup>{escape(str(trace.info['model']))}: effect of {styles.panel_title(panel)}{severing}</sup>"
    )
