"""Results of `atlas_search`: the file they stand in, as a table and as a figure."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from factlens.errors import OutputError
from factlens.files import written_whole

if TYPE_CHECKING:
    import plotly.graph_objects as go

Result = Mapping[str, Any]
"""One training with everything that was measured of it."""
NEEDED = ("variant", "seed", "steps", "tokens", "minutes", "text", "known", "site", "rome")
SETTLED, OPEN = "settled by the last token", "open after the last token"
"""Groups of facts: whether the subject's last token alone settles the object."""
ACROSS = 4
"""Panels of the figure in a row."""
PANEL = (260, 210)
"""Width and height of a panel, in pixels."""


def read_results(path: Path) -> Iterator[Result]:
    """The trainings of a file of results.

    Raises:
        OutputError: it cannot be read, or a line is no result.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8"
        raise OutputError(f"cannot read {path}: {why}") from None
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise OutputError(f"{path}, line {number}: not JSON ({error.msg})") from None
        if missing := [key for key in NEEDED if not isinstance(row, dict) or key not in row]:
            raise OutputError(f"{path}, line {number}: no result, it has no {', '.join(missing)}")
        yield row


def write_results(path: Path, found: Sequence[Result]) -> None:
    """Write results, one a line; of two of one training the later counts.

    Raises:
        OutputError: the place cannot be written.
    """
    kept = {(row["variant"], row["seed"], row["steps"]): row for row in found}
    with written_whole(path) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept.values()), "utf-8")


def table(found: Sequence[Result]) -> pd.DataFrame:
    """One row for each training that knows enough to be traced; effects are shares of probability, at the last subject token unless they say "late".

    Columns: `variant, seed, tokens` (millions), `minutes, train, held` (statements known), `gain` (mean absolute one of the norm
    before block 0's attention; near 0 that attention is switched off), `ATE`, then of the single state
    whose effect is largest: `site` (its effect), `layer`, `embedding` (the embedding's own effect); `beyond` (the largest effect of a
    state minus the embedding's, chosen on one half of the facts and measured on the other), `beyond_low`, `beyond_high`, `open`
    (the same over open facts, those that the subject's last token does not settle: at most half of the subjects with it have the object), `mlp`, `attention` (the largest window of each),
    `mlp_cut`, `attention_cut` (the share of the effect at `layer` that severing takes away), `late` (largest attention window at the last
    token), and ROME at its best layer: `S, edit_layer, retention`.
    """
    frame = pd.DataFrame([_row(one) for one in found if one["site"]])
    return frame.astype({"S": float, "retention": float})


def _row(one: Result) -> dict[str, Any]:
    site = one["site"]
    means = [mean for mean, _, _ in site["state"]]
    layer = max(range(len(means)), key=means.__getitem__)
    nothing = {"beyond_at_peak": [float("nan")]}
    open_facts = one.get("open") or site["groups"].get(OPEN, nothing)
    best = max(one["rome"], key=lambda row: (row["S"] or 0.0, row["retention"] or 0.0))
    return {
        "variant": one["variant"],
        "seed": one["seed"],
        "tokens": one["tokens"] / 1e6,
        "minutes": one["minutes"],
        "train": one["known"]["train"],
        "held": one["known"]["held"],
        "gain": one.get("gains", [float("nan")])[0],
        "ATE": site["ate"][0],
        "site": means[layer],
        "layer": layer,
        "embedding": site["embedding"][0],
        "beyond": site["beyond_at_peak"][0],
        "beyond_low": site["beyond_at_peak"][1],
        "beyond_high": site["beyond_at_peak"][2],
        "open": open_facts["beyond_at_peak"][0],
        "mlp": _largest(site["mlp"]),
        "attention": _largest(site["attention"]),
        "mlp_cut": 1 - site["mlps_severed"][layer][0] / means[layer],
        "attention_cut": 1 - site["attention_severed"][layer][0] / means[layer],
        "late": _largest(site["late_attention"]),
        "S": best["S"],
        "edit_layer": best["layer"],
        "retention": best["retention"],
    }


def _largest(layers: Sequence[Sequence[float]]) -> float:
    return max(mean for mean, _, _ in layers)


def shown(found: pd.DataFrame) -> pd.DataFrame:
    """`table` for readers: rounded, intervals in one cell, shares in per cent."""
    return pd.DataFrame(
        {
            "variant": found["variant"],
            "seed": found["seed"],
            "tokens, M": found["tokens"].map("{:.1f}".format),
            "min": found["minutes"].map("{:.0f}".format),
            "known / held-out": [
                f"{train:.0%} / {held:.0%}"
                for train, held in zip(found["train"], found["held"], strict=True)
            ],
            "gain": found["gain"].map("{:.2f}".format).replace("nan", ""),
            "ATE": found["ATE"].map("{:.2f}".format),
            "state (layer)": [
                f"{site:.3f} (L{layer})"
                for site, layer in zip(found["site"], found["layer"], strict=True)
            ],
            "emb": found["embedding"].map("{:.3f}".format),
            "beyond emb (95 %)": [
                f"{row.beyond:+.3f} ({row.beyond_low:+.3f} to {row.beyond_high:+.3f})"
                for row in found.itertuples()
            ],
            "not settled by the last token": found["open"]
            .map("{:+.3f}".format)
            .replace("+nan", ""),
            "MLP / attention": [
                f"{mlp:.3f} / {attention:.3f}"
                for mlp, attention in zip(found["mlp"], found["attention"], strict=True)
            ],
            "severed MLP / attention takes": [
                f"{mlp:.0%} / {attention:.0%}"
                for mlp, attention in zip(found["mlp_cut"], found["attention_cut"], strict=True)
            ],
            "late attention": found["late"].map("{:.2f}".format),
            "ROME S (layer)": [
                f"{s:.0f} (L{layer})"
                for s, layer in zip(found["S"], found["edit_layer"], strict=True)
            ],
            "retention": found["retention"].map("{:.0f}".format),
        }
    )


def figure(found: Sequence[Result]) -> "go.Figure":
    """A panel for each training that could be traced: effects at the last subject token by layer, ordinary and severed, and the embedding's."""
    from plotly.subplots import make_subplots

    from factlens.styles import escape

    found = [one for one in found if one["site"]]
    rows = -(-len(found) // ACROSS)
    panels = make_subplots(
        rows=rows,
        cols=min(ACROSS, len(found)),
        subplot_titles=[
            escape(f"{one['variant']}, {one['seed']}, {one['tokens'] / 1e6:.1f} M") for one in found
        ],
        shared_yaxes=True,
        horizontal_spacing=0.03,
        vertical_spacing=0.25 / rows if rows > 1 else 0.0,
    )
    for number, one in enumerate(found):
        place = {"row": number // ACROSS + 1, "col": number % ACROSS + 1}
        for trace in _curves(one["site"], legend=number == 0):
            panels.add_trace(trace, **place)
    panels.update_xaxes(dtick=2)
    panels.update_layout(
        width=PANEL[0] * min(ACROSS, len(found)) + 120,
        height=PANEL[1] * rows + 120,
        template="plotly_white",
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1 + 0.3 / rows},
        title="Indirect effect at the last subject token, by layer (variant, seed, tokens)",
    )
    return panels


def _curves(site: Mapping[str, Any], *, legend: bool) -> "Iterator[go.Scatter]":
    import plotly.graph_objects as go

    from factlens.line_plots import DASHES
    from factlens.styles import COLOURS, OTHER_COLOUR

    curves = (
        ("a single state", site["state"], COLOURS["state"], "solid"),
        ("its embedding", [site["embedding"]] * len(site["state"]), OTHER_COLOUR, "dashdot"),
        ("MLPs severed", site["mlps_severed"], COLOURS["mlp"], DASHES["mlp"]),
        ("attention severed", site["attention_severed"], COLOURS["attn"], DASHES["attn"]),
    )
    for name, layers, colour, dash in curves:
        yield go.Scatter(
            x=list(range(len(layers))),
            y=[mean for mean, _, _ in layers],
            name=name,
            legendgroup=name,
            showlegend=legend,
            mode="lines",
            line={"color": colour, "dash": dash},
        )
