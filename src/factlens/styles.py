"""What all figures share: colours, names, axes, and which rows of a frame make a panel."""

from collections.abc import Sequence
from math import ceil

import pandas as pd
import plotly.graph_objects as go
from plotly.colors import hex_to_rgb
from plotly.subplots import make_subplots

from factlens.errors import PlanError
from factlens.patches import EMBEDDING
from factlens.plans import as_tuple

FAMILIES = {"state": "Purples", "mlp": "Greens", "attn": "Reds"}
"""The paper's colours: purple for states, green for MLPs, red for attention."""
COLOURS = {"state": "#54278f", "mlp": "#238b45", "attn": "#cb181d", "both": "#525252"}
"""The same for lines and points, of a kind or of what is severed."""
OTHER_COLOUR = "#08519c"

TITLES = {"state": "a single state", "mlp": "MLP outputs", "attn": "attention outputs"}
CUTS = {
    "none": "ordinary",
    "mlp": "MLPs severed",
    "attn": "attention severed",
    "both": "both severed",
}
METRIC_NAMES = {"prob": "p", "logprob": "log p", "logit_diff": "logit difference", "kl": "KL"}
PANEL_WIDTH = 400
BETWEEN_COLUMNS = 0.09
"""As a share of the figure: room for a colour bar and its title."""
BETWEEN_ROWS = 110
"""In pixels: room for an axis with its title, and for the titles of the next row."""
LEAST_HEIGHT = 110
"""Of a panel in pixels, so that a colour bar has room for its title."""


def escape(text: str) -> str:
    """Text from data as text: plotly reads a subset of HTML in its labels."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def unique(values: pd.Series) -> list:
    """Each value once, in the order of the frame."""
    return list(dict.fromkeys(values))


def check_held(given: Sequence, held: Sequence, what: str, holder: str) -> None:
    """Refuse what `holder` does not hold, and list what it does.

    Raises:
        PlanError: one of `given` is not there.
    """
    if missing := [each for each in given if each not in held]:
        raise PlanError(
            f"the {holder} has no {what} {', '.join(map(str, missing))}; "
            f"it has {', '.join(map(str, held))}"
        )


def choose(
    frame: pd.DataFrame,
    kinds: str | Sequence[str] | None,
    window: int | None,
    severed: str | None,
    *,
    holder: str,
) -> list[pd.DataFrame]:
    """The rows of each panel: one kind, one window and one severing; None takes all kinds, and the first of the others.

    Raises:
        PlanError: something that is not there; `holder` ("trace", "average") is named in it.
    """
    cuts = unique(frame["severed"])
    cut = cuts[0] if severed is None else severed
    check_held([cut], cuts, "severing", holder)
    rows = frame[frame["severed"] == cut]
    present = unique(rows["kind"])
    chosen = present if kinds is None else list(as_tuple(kinds))
    check_held(chosen, present, "kind", holder)
    return [_one_window(rows[rows["kind"] == kind], window, holder) for kind in chosen]


def _one_window(panel: pd.DataFrame, window: int | None, holder: str) -> pd.DataFrame:
    widths = unique(panel["window"])
    if window is None or panel["kind"].iloc[0] == "state":
        return panel[panel["window"] == widths[0]]
    check_held([window], widths, "window", holder)
    return panel[panel["window"] == window]


def part_name(kind: str) -> str:
    """A kind, or a hook point, in words."""
    return escape(TITLES.get(kind, kind))


def panel_title(panel: pd.DataFrame, verb: str = "restoring") -> str:
    """What is done to which part, and over how many layers."""
    kind, window = str(panel["kind"].iloc[0]), int(panel["window"].iloc[0])
    name = f"{verb} {part_name(kind)}"
    return name if kind == "state" or kind not in TITLES else f"{name}, {window} layers"


def grid_of_panels(
    titles: Sequence[str],
    *,
    heading: str,
    height: int,
    per_row: int | None = None,
    shared_yaxes: bool = True,
) -> tuple[go.Figure, list[tuple[int, int]]]:
    """A figure under its heading with a panel for each title, `height` pixels high, and each panel's row and column.

    `per_row` of them stand side by side; None puts all into one row.
    """
    across = min(len(titles), per_row or len(titles))
    down = ceil(len(titles) / across)
    inside = down * max(height, LEAST_HEIGHT) + (down - 1) * BETWEEN_ROWS
    figure = make_subplots(
        cols=across,
        rows=down,
        shared_yaxes=shared_yaxes,
        subplot_titles=list(titles),
        horizontal_spacing=BETWEEN_COLUMNS if across > 1 else 0.0,
        vertical_spacing=BETWEEN_ROWS / inside if down > 1 else 0.0,
    )
    figure.update_layout(
        title={"text": heading, "x": 0.01, "xanchor": "left"},
        template="simple_white",
        width=220 + PANEL_WIDTH * across,
        height=190 + inside,
        margin={"l": 120, "r": 60, "t": 90, "b": 60},
    )
    return figure, [(at // across + 1, at % across + 1) for at in range(len(titles))]


def colour_bar(figure: go.Figure, text: str, row: int, column: int) -> dict:
    """A colour bar at the right edge of one panel."""
    panel = figure.get_subplot(row, column)
    bottom, top = panel.yaxis.domain
    return {
        "x": float(panel.xaxis.domain[1]),
        "y": (bottom + top) / 2,
        "len": 0.9 * (top - bottom),
        "thickness": 10,
        "xpad": 4,
        "title": {"text": text, "side": "right"},
    }


def grids(
    cells: pd.DataFrame, value: str, row: str, rows: Sequence, **style: object
) -> list[go.Heatmap]:
    """One panel: the blocks' grid, and apart from it, on the same scale, the embedding's column.

    Reads `kind, layer, hover` and the columns named by `value` and `row`; `rows` are drawn from the top, whether there
    or not. `style` goes to both grids.
    """
    drawn = []
    for apart in (True, False):
        part = cells[(cells["layer"] == EMBEDDING) == apart]
        if part.empty:
            continue
        wide = part.pivot(index=row, columns="layer", values=[value, "hover"]).reindex(rows)
        layers = [int(layer) for layer in wide[value].columns]
        drawn.append(
            go.Heatmap(
                z=wide[value].to_numpy(float),
                # Edges, not centres: a lone column has no neighbour to take its width from.
                x=[_column(layers[0]) - 0.5, *(_column(layer) + 0.5 for layer in layers)],
                y=list(range(len(rows))),
                colorscale=FAMILIES.get(str(cells["kind"].iloc[0]), "Blues"),
                showscale=not apart,
                text=[list(texts) for texts in wide["hover"].fillna("").to_numpy()],
                hovertemplate="%{text}<extra></extra>",
                xgap=1,
                ygap=1,
                **style,
            )
        )
    return drawn


def layer_axis(panel: pd.DataFrame) -> dict:
    """The x axis of a panel: about eight layers named, and the embedding if it is drawn."""
    layers = sorted(int(layer) for layer in panel["layer"].unique())
    blocks = [layer for layer in layers if layer != EMBEDDING]
    shown = blocks[:: max(1, round(len(blocks) / 8))]
    values, names = [float(layer) for layer in shown], [str(layer) for layer in shown]
    if EMBEDDING in layers:
        values, names = [_column(EMBEDDING), *values], ["emb", *names]
    windowed = panel["kind"].iloc[0] in ("mlp", "attn")
    return {
        "title_text": "middle of the window (layer)" if windowed else "layer",
        "tickvals": values,
        "ticktext": names,
        "showgrid": False,
        "zeroline": False,
    }


def name_rows(figure: go.Figure, labels: Sequence[str]) -> None:
    """The y axes of heatmaps, from the top down; labels stand left of each row of panels."""
    figure.update_yaxes(
        autorange="reversed",
        showgrid=False,
        zeroline=False,
        tickvals=list(range(len(labels))),
        ticktext=list(labels),
    )


def where(layer: int) -> str:
    """A layer in words, for hovering."""
    return "embedding" if layer == EMBEDDING else f"layer {layer}"


def see_through(colour: str, opacity: float = 0.12) -> str:
    """A hex colour as a fill that lines show through."""
    red, green, blue = hex_to_rgb(colour)
    return f"rgba({red}, {green}, {blue}, {opacity})"


def _column(layer: int) -> float:
    return -1.6 if layer == EMBEDDING else float(layer)
