"""Cutting a plan's cells into fork passes: which positions run together, and how much fits in memory."""

from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import accumulate
from math import ceil
from typing import Any

import pandas as pd
import psutil
import torch

from factlens import models
from factlens.models import Model
from factlens.plans import window_layers

BLOCK_OVERHEAD_FLOPS = {"cpu": 2e8, "cuda": 1e10}
"""What starting one more block costs, in FLOPs that the machine could have done meanwhile: reading weights and
launching kernels. It decides whether neighbouring positions share a pass."""


TOGETHER = 32
"""Most problems that share passes."""
WORTH_STARTING = 10
"""A pass should do this many times the work that starting its blocks costs."""


@dataclass(frozen=True)
class Line:
    """S rows of a fork pass (one run per noise sample), and the cells that they answer.

    Window cells of one position that are cut at layer 0 share a line until the first ends: `ends` holds, for each
    cell, the layer after its last restored one. A state is a window that is over as soon as it starts.
    """

    kind: str
    severed: str
    position: int
    first: int
    """The block at whose output the line forks."""
    ends: tuple[int, ...]
    rows_of_cells: tuple[int, ...]
    """Where the results go: numbers of rows of the plan."""
    fact: int = 0
    """Which of the problems that share the pass."""

    def restores(self, kind: str, layer: int) -> bool:
        """Whether the clean output of `kind` goes in at `layer`. The first layer's is in the forked state already."""
        return self.kind == kind and self.first < layer < self.ends[0]

    def severs(self, kind: str) -> bool:
        """Whether outputs of `kind` are frozen at their corrupted values."""
        return self.severed in (kind, "both")

    def touches(self, kind: str, layer: int) -> bool:
        """Whether the outputs of `kind` at `layer` are replaced."""
        return layer > self.first and (self.restores(kind, layer) or self.severs(kind))

    def may_touch(self, kind: str, layer: int) -> bool:
        """Whether this line, or a part that leaves it, ever touches `kind` at `layer`."""
        inside = self.kind == kind and layer < self.ends[-1]
        return layer > self.first and (inside or self.severs(kind))

    def split_at(self, layer: int) -> "tuple[Line, Line] | None":
        """After `layer`: the cells whose window ended there, and those that go on; None if all do the same."""
        if self.ends[0] == self.ends[-1] or self.ends[0] != layer + 1:
            return None
        leaving = sum(end == layer + 1 for end in self.ends)
        return self._part(0, leaving), self._part(leaving, len(self.ends))

    def _part(self, begin: int, end: int) -> "Line":
        rows = self.rows_of_cells[begin:end]
        return replace(self, ends=self.ends[begin:end], rows_of_cells=rows)


@dataclass(frozen=True)
class Pass:
    """Lines that run together, over the positions from `start` on."""

    start: int
    lines: tuple[Line, ...]

    def halves(self) -> "list[Pass]":
        """Two passes of half the lines each, low layers first; none if there is nothing to halve."""
        if len(self.lines) < 2:
            return []
        lines = sorted(self.lines, key=lambda line: line.first)
        middle = len(lines) // 2
        return [_pass(lines[:middle]), _pass(lines[middle:])]


def _pass(lines: list[Line]) -> Pass:
    return Pass(min(line.position for line in lines), tuple(lines))


def lines_of(cells: pd.DataFrame, n_layers: int, fact: int = 0) -> list[Line]:
    """The fewest lines that answer `cells`: one for each distinct run, windows that start together sharing one.

    `rows_of_cells` are the labels of the frame's index, so that a part of a plan still knows its places.
    """
    found: dict[tuple, list[tuple[int, int]]] = defaultdict(list)
    for cell in cells[["kind", "window", "severed", "layer", "position"]].itertuples():
        row, kind, window, severed, layer, position = cell
        if kind == "state":
            first, end = int(layer), int(layer) + 1
        else:
            layers = window_layers(int(layer), int(window), n_layers)
            first, end = layers.start, layers.stop
        # Over when it starts: nothing to share, and no block in which to split.
        alone = end == first + 1
        found[kind, severed, int(position), first, alone].append((end, int(row)))
    lines = []
    for (kind, severed, position, first, _), members in found.items():
        members.sort()
        ends, rows = zip(*members, strict=True)
        lines.append(Line(kind, severed, position, first, ends, rows, fact))
    return lines


def cut_into_passes(
    model: Model,
    lines: list[Line],
    length: int,
    samples: int,
    keep: int,
    budget: int | None = None,
) -> list[Pass]:
    """Cut `lines` into passes: positions grouped for the least work, each pass within `budget` bytes.

    One pass per position runs the fewest tokens; neighbours are joined where the tokens saved cost less than starting
    every block once more (late positions, small models).
    """
    allowed = free_memory(model) // 2 if budget is None else budget
    queue = [
        _pass(group)
        for group in _group_positions(lines, length, samples, _block_flops(model), _overhead(model))
    ]
    fitting: list[Pass] = []
    while queue:
        part = queue.pop(0)
        halves = part.halves()
        if halves and pass_bytes(model, part, length, samples, keep) > allowed:
            queue = [*halves, *queue]
        else:
            fitting.append(part)
    return fitting


def _group_positions(
    lines: list[Line], length: int, samples: int, block_flops: float, overhead: float
) -> list[list[Line]]:
    """Contiguous groups of positions of least cost, by dynamic programming from the last position back."""
    at: dict[int, list[Line]] = defaultdict(list)
    for line in lines:
        at[line.position].append(line)
    positions = sorted(at)
    depth = 1 + max((line.ends[-1] for line in lines), default=0)
    # Blocks run by the lines of each position; a shared line counts once more for each of its ends.
    work = [
        sum(depth - line.first - 1 + len(set(line.ends)) - 1 for line in at[p]) for p in positions
    ]
    until = [0, *accumulate(work)]
    best: list[tuple[float, int]] = [(0.0, 0)] * (len(positions) + 1)
    for begin in range(len(positions) - 1, -1, -1):
        tokens = length - positions[begin]
        options = [
            (
                depth * overhead
                + (until[end] - until[begin]) * samples * tokens * block_flops
                + best[end][0],
                end,
            )
            for end in range(begin + 1, len(positions) + 1)
        ]
        best[begin] = min(options)
    groups, begin = [], 0
    while begin < len(positions):
        end = best[begin][1]
        groups.append([line for p in positions[begin:end] for line in at[p]])
        begin = end
    return groups


def _block_flops(model: Model) -> float:
    """FLOPs of one block for one token: two for each weight of its matrices."""
    return 2.0 * block_weights(models.cfg(model))


def block_weights(config: Any) -> int:
    """Entries of the matrices of one block: attention's four and the MLP's two or three.

    `config` is a TransformerLens configuration, or anything with its numbers.
    """
    d_model, d_mlp = int(config.d_model), int(config.d_mlp)
    kv_heads = getattr(config, "n_key_value_heads", None) or config.n_heads
    attention = d_model * int(config.d_head) * 2 * (int(config.n_heads) + int(kv_heads))
    return attention + d_model * d_mlp * (3 if getattr(config, "gated_mlp", False) else 2)


def _overhead(model: Model) -> float:
    return BLOCK_OVERHEAD_FLOPS["cpu" if models.device_of(model).type == "cpu" else "cuda"]


def pass_bytes(model: Model, part: Pass, length: int, samples: int, keep: int) -> int:
    """Memory at the widest point of a pass: a block's activations, or the logits."""
    config = models.cfg(model)
    runs = sum(len(set(line.ends)) for line in part.lines) * samples
    # The MLP's hidden layer before, in and after its activation; the stream, its norm, queries, keys and values.
    width = 4 * int(config.d_mlp) + 12 * int(config.d_model)
    heads, span = int(config.n_heads), length - part.start
    # Keys and values with their prefix, gathered and then joined; scores before, in and after their softmax.
    attention = 4 * length * heads * int(config.d_head) + 3 * heads * span * length
    block = runs * (span * width + attention) * models.dtype_of(model).itemsize
    logits = runs * keep * int(config.d_vocab) * (models.dtype_of(model).itemsize + 4)
    return max(block, logits)


def lines_together(
    model: Model, lines: list[Line], length: int, samples: int, keep: int, budget: int | None = None
) -> int:
    """How many problems with such `lines` should share their passes, at most `TOGETHER`.

    As many as fit, while one position's work of a single problem is so little that starting blocks costs more than
    a small part of it: always on a GPU, on a CPU for small models only.
    """
    allowed = free_memory(model) // 2 if budget is None else budget
    positions = {line.position for line in lines}
    if not positions:
        return TOGETHER
    runs = sum(len(set(line.ends)) for line in lines) * samples / len(positions)
    work = runs * length / 2 * _block_flops(model) / 2  # Forks enter on the way: half the blocks.
    wanted = ceil(WORTH_STARTING * _overhead(model) / work)
    config = models.cfg(model)
    width = 4 * int(config.d_model) * int(config.n_layers)  # States, two outputs, keys with values.
    stored = (samples + 1) * length * width * models.dtype_of(model).itemsize
    widest = pass_bytes(model, _pass(lines), length, samples, keep)
    return max(1, min(TOGETHER, wanted, allowed // (stored + widest)))


def free_memory(model: Model) -> int:
    """Bytes that are free where the model runs."""
    device = models.device_of(model)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(psutil.virtual_memory().available)
