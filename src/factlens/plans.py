"""Plans: the frame of cells to measure. A trace is its plan with columns added.

One row is one cell: columns `fact` (number), `kind` ("state", "mlp", "attn", or a hook name with `{l}`), `window`
(width in layers; 1 for states), `severed` ("none", "mlp", "attn", "both"), `layer` (-1 is the embedding), `position`,
`token` (text), `role`, and `head` where sites are traced per head.
"""

from collections.abc import Sequence
from math import ceil

import pandas as pd

from factlens.errors import PlanError
from factlens.patches import EMBEDDING
from factlens.tokens import TokenizedPrompt

KINDS = ("state", "mlp", "attn")
SEVERED = ("none", "mlp", "attn", "both")
CELL = ["kind", "window", "severed", "layer", "position"]
"""Columns that tell one cell of a fact from another."""


def window_layers(layer: int, window: int, n_layers: int) -> range:
    """The layers of a window around `layer`: `max(0, l - w//2) .. min(L, l + ceil(w/2)) - 1`.

    Ten layers around l are l-5 .. l+4, cut at the ends (ROME's code).
    """
    return range(max(0, layer - window // 2), min(n_layers, layer + ceil(window / 2)))


def as_tuple(value: object) -> tuple:
    """One value or several, as several, each once."""
    return (value,) if isinstance(value, str | int) else tuple(dict.fromkeys(value))  # type: ignore


def check_choices(kinds: Sequence[str], windows: Sequence[int], severed: Sequence[str]) -> None:
    """Refuse what does not exist, and list what does.

    Raises:
        PlanError: an unknown kind or severing, or a window that is no positive number of layers.
    """
    for name, given, known in (("kind", kinds, KINDS), ("severing", severed, SEVERED)):
        if wrong := [each for each in given if each not in known]:
            raise PlanError(
                f"no {name} {', '.join(map(repr, wrong))}; there are {', '.join(known)}"
            )
    if wrong_windows := [w for w in windows if not isinstance(w, int) or w < 1]:
        raise PlanError(f"a window is a number of layers from 1 up, not {wrong_windows[0]!r}")
    if not kinds or not windows or not severed:
        raise PlanError(
            f"nothing to trace: give a kind ({', '.join(KINDS)}), a window and a severing"
        )


def plan(
    prompt: TokenizedPrompt,
    n_layers: int,
    *,
    kinds: Sequence[str] = KINDS,
    windows: Sequence[int] = (10,),
    severed: Sequence[str] = ("none",),
    include_embedding: bool = True,
    fact: int = 0,
) -> pd.DataFrame:
    """Every token x layer cell of one prompt, for each kind, window and severing.

    States have one more column than the paper's grid, the embedding (layer -1), unless `include_embedding` is off.
    """
    check_choices(kinds, windows, severed)
    roles = prompt.roles
    rows = [
        (fact, kind, window, cut, layer, position, prompt.words[position], roles[position])
        for kind in kinds
        for window in (windows if kind != "state" else (1,))
        for cut in severed
        for layer in range(EMBEDDING if kind == "state" and include_embedding else 0, n_layers)
        for position in range(len(prompt.words))
    ]
    return pd.DataFrame(rows, columns=["fact", *CELL, "token", "role"])


def plan_sites(
    prompt: TokenizedPrompt,
    n_layers: int,
    sites: Sequence[str],
    heads: dict[str, int],
    *,
    severed: Sequence[str] = ("none",),
    fact: int = 0,
) -> pd.DataFrame:
    """Cells of other hook points, such as `blocks.{l}.attn.hook_z`; one per head where `heads` says how many."""
    check_choices(KINDS, (1,), severed)
    roles = prompt.roles
    rows = [
        (fact, name, 1, cut, layer, position, prompt.words[position], roles[position], head)
        for name in sites
        for cut in severed
        for layer in (range(n_layers) if "{l}" in name else (0,))
        for head in (range(heads[name]) if heads.get(name) else (-1,))
        for position in range(len(prompt.words))
    ]
    return pd.DataFrame(rows, columns=["fact", *CELL, "token", "role", "head"])


def is_zero(
    cells: pd.DataFrame, subject: tuple[int, int], first_read: int, n_layers: int
) -> pd.Series:
    """Cells whose effect is exactly zero, by causality, so that no run is needed.

    Positions before the subject are clean anyway; an embedding outside the subject was never corrupted; and what only
    the last block writes before `first_read`, the first position whose logits are read, goes nowhere.
    """
    begin, end = subject
    position, layer, kind = cells["position"], cells["layer"], cells["kind"]
    first = layer.where(kind == "state", (layer - cells["window"] // 2).clip(lower=0))
    embedded = (layer == EMBEDDING) & ((position < begin) | (position >= end))
    unread = (first == n_layers - 1) & (position < first_read)
    return (position < begin) | embedded | unread
