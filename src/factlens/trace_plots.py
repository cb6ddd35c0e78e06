"""Figures of single facts, from a trace."""

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go

from factlens import styles
from factlens.engines.problems import SIGNS
from factlens.patches import EMBEDDING
from factlens.plans import CELL
from factlens.styles import METRIC_NAMES, escape
from factlens.traces import Trace

ROW_HEIGHT = 24
VERBS = {"indirect": "restoring", "direct": "corrupting"}
DONE = {"indirect": "restored", "direct": "without it"}
"""What was done to each part, by the effect that was traced."""


def heatmap(
    trace: Trace,
    *,
    fact: int = 0,
    kinds: str | Sequence[str] | None = None,
    window: int | None = None,
    severed: str | None = None,
    shared_scale: bool = False,
    include_embedding: bool = True,
    title: str | None = None,
) -> go.Figure:
    """Token x layer heatmaps of one fact's effects (ROME, Figure 1e-g); `plots.heatmap` says what the arguments are.

    Raises:
        FactError: no such fact.
        PlanError: something the trace does not hold.
    """
    one = trace.select(fact)
    frame = one.frame if include_embedding else one.frame[one.frame["layer"] != EMBEDDING]
    panels = styles.choose(frame, kinds, window, severed, holder="trace")
    metric, effect = str(one.info["metric"]), str(one.info.get("effect", "indirect"))
    low = float(frame[f"{metric}_corrupted"].iloc[0])
    # The end of the scale away from the corrupted run: above it, or below for what falls (KL).
    pick = min if SIGNS.get(metric, 1.0) < 0 else max
    tops = [pick([low, *panel[f"{metric}_restored"]]) for panel in panels]
    if shared_scale:
        tops = [pick(tops)] * len(tops)
    words = _words(panels[0], one.subjects[0])
    figure, places = styles.grid_of_panels(
        [styles.panel_title(panel, VERBS[effect]) for panel in panels],
        heading=title if title is not None else _heading(one, str(panels[0]["severed"].iloc[0])),
        height=ROW_HEIGHT * len(words),
    )
    measured = f"{METRIC_NAMES[metric]}({escape(one.answers[0].strip())})"
    for (row, column), panel, top in zip(places, panels, tops, strict=True):
        cells = _strongest_heads(panel)
        cells = cells.assign(hover=_hover(cells, words, metric, low, effect))
        scale = {
            "zmin": min(low, top),
            "zmax": max(low, top, min(low, top) + 1e-9),
            "reversescale": top < low,
            "colorbar": styles.colour_bar(figure, measured, row, column),
        }
        for grid in styles.grids(cells, f"{metric}_restored", "position", list(words), **scale):
            figure.add_trace(grid, row=row, col=column)
        figure.update_xaxes(styles.layer_axis(panel), row=row, col=column)
    styles.name_rows(figure, list(words.values()))
    return figure


def _words(panel: pd.DataFrame, subject: tuple[int, int]) -> dict[int, str]:
    """Row labels by position: each token as text, starred inside the subject (half-open span)."""
    tokens = panel.drop_duplicates("position").set_index("position")["token"].sort_index()
    return {
        int(at): escape(word.replace("\n", "↵").strip() or "␣")
        + ("*" if subject[0] <= at < subject[1] else "")
        for at, word in tokens.items()
    }


def _strongest_heads(panel: pd.DataFrame) -> pd.DataFrame:
    """Of a site with heads, the largest values of any head in each cell."""
    if "head" not in panel:
        return panel
    return panel.groupby([*CELL, "token", "role"], sort=False, as_index=False).max()


def _hover(
    cells: pd.DataFrame, words: dict[int, str], metric: str, low: float, effect: str
) -> list[str]:
    name = f"{METRIC_NAMES[metric]} {DONE[effect]}"
    return [
        f"<b>{words[cell.position]}</b>, {styles.where(cell.layer)}"
        f"<br>{name} {getattr(cell, f'{metric}_restored'):.4f}<br>corrupted {low:.4f}"
        f"<br>effect {cell.effect:+.4f}<br>sd over samples {cell.sample_sd:.4f}"
        for cell in cells.itertuples(index=False)
    ]


def _heading(trace: Trace, severed: str) -> str:
    total = trace.totals().iloc[0]
    cut = "" if severed == "none" else f", {styles.CUTS[severed]}"
    name = METRIC_NAMES[str(trace.info["metric"])]
    answer = escape(trace.answers[0].strip())
    return (
        f"<b>{escape(trace.facts[0].prompt)}</b> → {answer}"
        f"<br><sup>{escape(str(trace.info['model']))}: {name} clean {total['clean']:.3f}, corrupted "
        f"{total['corrupted']:.3f}{cut}</sup>"
    )
