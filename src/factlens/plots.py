"""Frames to plotly figures. Nothing is computed here but where to draw."""

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from factlens.engines.problems import SIGNS
from factlens.errors import PlanError
from factlens.patches import EMBEDDING
from factlens.plans import CELL
from factlens.traces import Trace

FAMILIES = {"state": "Purples", "mlp": "Greens", "attn": "Reds"}
"""The paper's colours: purple for states, green for MLPs, red for attention."""

TITLES = {"state": "a single state", "mlp": "MLP outputs", "attn": "attention outputs"}
METRIC_NAMES = {"prob": "p", "logprob": "log p", "logit_diff": "logit difference", "kl": "KL"}
ROW_HEIGHT, PANEL_WIDTH = 24, 400


def heatmap(
    trace: Trace,
    *,
    fact: int = 0,
    kinds: Sequence[str] | None = None,
    window: int | None = None,
    severed: str | None = None,
    shared_scale: bool = False,
    title: str | None = None,
) -> go.Figure:
    """Token x layer heatmaps of one fact's effects, one for each kind (ROME, Figure 1e-g).

    Subject tokens are starred and the embedding control is drawn apart, left of layer 0. Colours show what the
    answer's probability (or the trace's metric) rises to when the part is restored, from the corrupted run's value
    up, as in the paper; hover shows the exact values.

    Args:
        fact: which fact of the trace.
        kinds: which kinds, in this order; None for all that were traced.
        window: which window width, if several were traced; None for the first.
        severed: which severing, if several were traced; None for the first.
        shared_scale: one colour scale for all panels, so that they can be compared.
        title: above the figure; None names the fact and its answer.

    Raises:
        PlanError: something the trace does not hold.
    """
    one = trace.select(fact)
    frame = one.frame
    present = list(dict.fromkeys(frame["kind"]))
    chosen = list(kinds) if kinds is not None else present
    if missing := [kind for kind in chosen if kind not in present]:
        raise PlanError(f"the trace has no kind {', '.join(missing)}; it has {', '.join(present)}")
    cuts = list(dict.fromkeys(frame["severed"]))
    cut = cuts[0] if severed is None else severed
    if cut not in cuts:
        raise PlanError(f"the trace has no severing {cut!r}; it has {', '.join(cuts)}")
    panels = [_cells(frame, kind, cut, window) for kind in chosen]
    metric = str(one.info["metric"])
    value = f"{metric}_restored"
    low = float(frame[f"{metric}_corrupted"].iloc[0])
    # The end of the scale away from the corrupted run: above it, or below for what falls (KL).
    pick = min if SIGNS.get(metric, 1.0) < 0 else max
    tops = [pick([low, *panel[value]]) for panel in panels]
    titles = [_panel_title(panel) for panel in panels]
    figure = make_subplots(
        cols=len(panels),
        rows=1,
        shared_yaxes=True,
        subplot_titles=titles,
        horizontal_spacing=0.09 if len(panels) > 1 else 0.0,
    )
    words = _words(panels[0], one.subjects[0])
    for column, panel in enumerate(panels, start=1):
        top = pick(tops) if shared_scale else tops[column - 1]
        bar: dict = {"x": _right_edge(figure, column), "len": 0.9, "thickness": 10, "xpad": 4}
        bar["title"] = {
            "text": f"{METRIC_NAMES[metric]}({escape(one.answers[0].strip())})",
            "side": "right",
        }
        for grid in _grids(panel, words, metric, low, top, bar):
            figure.add_trace(grid, row=1, col=column)
        figure.update_xaxes(
            title_text="layer"
            if panel["kind"].iloc[0] == "state"
            else "middle of the window (layer)",
            tickvals=_ticks(panel)[0],
            ticktext=_ticks(panel)[1],
            showgrid=False,
            zeroline=False,
            row=1,
            col=column,
        )
    figure.update_yaxes(autorange="reversed", showgrid=False, zeroline=False)
    figure.update_yaxes(tickvals=list(range(len(words))), ticktext=words, row=1, col=1)
    figure.update_layout(
        title={
            "text": title if title is not None else _title(one, cut),
            "x": 0.01,
            "xanchor": "left",
        },
        template="simple_white",
        width=220 + PANEL_WIDTH * len(panels),
        height=190 + ROW_HEIGHT * len(words),
        margin={"l": 120, "r": 60, "t": 90, "b": 60},
    )
    return figure


def escape(text: str) -> str:
    """Text from data as text: plotly reads a subset of HTML in its labels."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _cells(frame: pd.DataFrame, kind: str, severed: str, window: int | None) -> pd.DataFrame:
    cells = frame[(frame["kind"] == kind) & (frame["severed"] == severed)]
    widths = list(dict.fromkeys(cells["window"]))
    if kind == "state" or window is None:
        return cells[cells["window"] == widths[0]]
    if window not in widths:
        raise PlanError(f"the trace has no window {window}; it has {', '.join(map(str, widths))}")
    return cells[cells["window"] == window]


def _words(panel: pd.DataFrame, subject: tuple[int, int]) -> list[str]:
    """Row labels: each token as text, starred inside the subject (half-open span)."""
    tokens = panel.drop_duplicates("position").sort_values("position")["token"]
    return [
        escape(word.replace("\n", "↵").strip() or "␣")
        + ("*" if subject[0] <= at < subject[1] else "")
        for at, word in enumerate(tokens)
    ]


def _grids(
    panel: pd.DataFrame, words: list[str], metric: str, low: float, top: float, bar: dict
) -> list[go.Heatmap]:
    """One panel: the blocks' grid, and apart from it, on the same scale, the embedding's column."""
    if "head" in panel:
        panel = panel.groupby([*CELL, "token", "role"], sort=False, as_index=False).max()
    drawn = []
    for apart in (True, False):
        cells = panel[(panel["layer"] == EMBEDDING) == apart]
        if cells.empty:
            continue
        keys = {"index": "position", "columns": "layer"}
        value = cells.pivot(**keys, values=f"{metric}_restored")
        layers = [int(layer) for layer in value.columns]
        drawn.append(
            go.Heatmap(
                z=value.to_numpy(),
                # Edges, not centres: a lone column has no neighbour to take its width from.
                x=[_column(layers[0]) - 0.5, *(_column(layer) + 0.5 for layer in layers)],
                y=list(range(len(words))),
                zmin=min(low, top),
                zmax=max(low, top, min(low, top) + 1e-9),
                reversescale=top < low,
                colorscale=FAMILIES.get(str(panel["kind"].iloc[0]), "Blues"),
                showscale=not apart,
                colorbar=bar,
                text=_hover(cells, words, metric, low),
                hovertemplate="%{text}<extra></extra>",
                xgap=1,
                ygap=1,
            )
        )
    return drawn


def _hover(cells: pd.DataFrame, words: list[str], metric: str, low: float) -> list[list[str]]:
    name = METRIC_NAMES[metric]
    text = [
        f"<b>{words[cell.position]}</b>, "
        + ("embedding" if cell.layer == EMBEDDING else f"layer {cell.layer}")
        + f"<br>{name} restored {getattr(cell, f'{metric}_restored'):.4f}<br>corrupted {low:.4f}"
        + f"<br>effect {cell.effect:+.4f}<br>sd over samples {cell.sample_sd:.4f}"
        for cell in cells.itertuples(index=False)
    ]
    table = cells.assign(hover=text).pivot(index="position", columns="layer", values="hover")
    return [list(row) for row in table.to_numpy()]


def _column(layer: int) -> float:
    return -1.6 if layer == EMBEDDING else float(layer)


def _ticks(panel: pd.DataFrame) -> tuple[list[float], list[str]]:
    layers = sorted(int(layer) for layer in panel["layer"].unique())
    blocks = [layer for layer in layers if layer != EMBEDDING]
    step = max(1, round(len(blocks) / 8))
    shown = blocks[::step]
    values, names = [float(layer) for layer in shown], [str(layer) for layer in shown]
    if EMBEDDING in layers:
        values, names = [_column(EMBEDDING), *values], ["emb", *names]
    return values, names


def _right_edge(figure: go.Figure, column: int) -> float:
    axis = "xaxis" if column == 1 else f"xaxis{column}"
    return float(figure.layout[axis].domain[1])


def _panel_title(panel: pd.DataFrame) -> str:
    kind, window = str(panel["kind"].iloc[0]), int(panel["window"].iloc[0])
    name = f"restoring {escape(TITLES.get(kind, kind))}"
    return name if kind == "state" or kind not in TITLES else f"{name}, {window} layers"


def _title(trace: Trace, severed: str) -> str:
    total = trace.totals().iloc[0]
    cut = {
        "none": "",
        "mlp": ", MLPs severed",
        "attn": ", attention severed",
        "both": ", both severed",
    }
    name = METRIC_NAMES[str(trace.info["metric"])]
    answer = escape(trace.answers[0].strip())
    return (
        f"<b>{escape(trace.facts[0].prompt)}</b> → {answer}"
        f"<br><sup>{escape(str(trace.info['model']))}: {name} clean {total['clean']:.3f}, corrupted "
        f"{total['corrupted']:.3f}{cut[severed]}</sup>"
    )
