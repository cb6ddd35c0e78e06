"""Frames to plotly figures. Nothing is computed here but where to draw.

A trace draws single facts (`heatmap`), an averaged frame the paper's Figures 2, 3 and 7 (`heatmap`, `severed`,
`lines`) and small multiples (`models`); stored frames draw without a model. Of edits: `losses`, `matrix`, `ranking`, and
`compared` for a trace before and after; `sweep` draws Figure 5, `tuning` the settings of editors. `save` writes a figure to a file.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from factlens import average_plots, trace_plots
from factlens.average_plots import models as models
from factlens.edit_plots import compared as compared
from factlens.edit_plots import losses as losses
from factlens.edit_plots import matrix as matrix
from factlens.edit_plots import ranking as ranking
from factlens.errors import PlanError
from factlens.images import save as save
from factlens.line_plots import lines as lines
from factlens.line_plots import severed as severed
from factlens.scatter_plots import agreement as agreement
from factlens.styles import escape as escape
from factlens.sweep_plots import sweep as sweep
from factlens.traces import Trace
from factlens.tuning_plots import tuning as tuning

__all__ = [
    "agreement",
    "compared",
    "escape",
    "heatmap",
    "lines",
    "losses",
    "matrix",
    "models",
    "ranking",
    "save",
    "severed",
    "sweep",
    "tuning",
]


def heatmap(
    result: Trace | pd.DataFrame,
    *,
    fact: int | None = None,
    kinds: str | Sequence[str] | None = None,
    window: int | None = None,
    severed: str | None = None,
    shared_scale: bool = False,
    include_embedding: bool | None = None,
    ate: float | None = None,
    title: str | None = None,
) -> go.Figure:
    """Heatmaps over layers, one for each kind: of a trace's single fact, or of an averaged frame.

    Of a trace (ROME, Figure 1e-g): tokens x layers. Subject tokens are starred and the embedding control is drawn
    apart, left of layer 0. Colours show what the answer's probability (or the trace's metric) rises to when the part is
    restored, from the corrupted run's value up, as in the paper; hover shows the exact values.

    Of an averaged frame (ROME, Figure 2): roles x layers. Colours show the AIE from 0 up, so that a negative one looks
    like 0; hover shows its exact value, its interval and how many facts it is over.

    Args:
        result: a trace, or the frame of `average_effects`.
        fact: which fact of a trace; None for the first.
        kinds: which kinds, in this order; None for all that are there.
        window: which window width, if several were traced; None for the first.
        severed: which severing, if several were traced; None for the first, or the ordinary run of an average.
        shared_scale: one colour scale for all panels, so that they can be compared.
        include_embedding: draw the embedding; None draws it for a trace and, as in the paper, not for an average.
        ate: an average's total effect, for its title.
        title: above the figure; None names the fact and its answer, or what was averaged.

    Raises:
        FactError: no such fact.
        PlanError: something that is not there, or an averaged frame that is none or holds several averages.
    """
    chosen: dict[str, Any] = {
        "kinds": kinds,
        "window": window,
        "severed": severed,
        "shared_scale": shared_scale,
    }
    if isinstance(result, Trace):
        if ate is not None:
            raise PlanError("ate is for averages; the title of a single fact has its own effect")
        return trace_plots.heatmap(
            result,
            fact=fact or 0,
            include_embedding=include_embedding is not False,
            title=title,
            **chosen,
        )
    if fact is not None:
        raise PlanError(f"an average has no fact {fact}; draw single facts from their trace")
    return average_plots.heatmap(
        result, include_embedding=include_embedding is True, ate=ate, title=title, **chosen
    )
