"""The one-pass engine: a whole layer x token grid in one base pass and a few fork passes.

**Base pass.** One clean and S corrupted rows, once through the model, keeping states, MLP and attention outputs, keys
and values.

**Fork passes.** The run with position i restored at layer l equals its corrupted run below l everywhere, and before i
at every layer. So nothing is run twice: a pass over the positions from i on starts with no rows at all, gains S rows
at each block's output (copies of the corrupted rows in which one state is clean), and attends to the corrupted run's
keys and values before i. Exact, by causality. Cells are cut into passes by position (`passes.py`).

**Windows** fork at their first block's output, which needs no run of its own: it is the corrupted output with the MLP's
clean value put in for its corrupted one. (Restored attention also changes its own block's MLP where the MLP comes
after it; the base pass computes that for all positions at once.) Inside the window the forks' own rows take clean
values. Windows cut at layer 0 share one line of rows until the first of them ends.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from einops import repeat
from torch import Tensor

from factlens import models, runs
from factlens.corruption import spread
from factlens.engines.passes import Line, Pass, cut_into_passes
from factlens.engines.problems import (
    Answers,
    Problem,
    Progress,
    is_out_of_memory,
    no_progress,
)
from factlens.models import Model
from factlens.patches import EMBEDDING, corrupt, fork, substitute
from factlens.plans import is_zero
from factlens.prefixes import KeyValues
from factlens.types import Act, Hooks, Logits


@dataclass
class BaseRun:
    """What the base pass leaves for the fork passes. Row 0 is clean, rows 1..S are corrupted."""

    samples: int
    states: dict[int, Act] = field(default_factory=dict)
    """Block outputs by layer; -1 is what enters block 0."""
    outputs: dict[tuple[str, int], Act] = field(default_factory=dict)
    """("mlp" | "attn", layer) -> what it adds to the stream."""
    attn_restored: dict[int, Act] = field(default_factory=dict)
    """Block outputs [sample, pos, d_model] with only this block's attention restored, at every position."""
    keys: KeyValues = field(default_factory=KeyValues)

    def clean(self, kind: str, layer: int) -> Tensor:
        """Clean values, [pos, d_model]."""
        return self._values(kind, layer)[0]

    def corrupted(self, kind: str, layer: int) -> Tensor:
        """Corrupted values, [sample, pos, d_model]."""
        return self._values(kind, layer)[1:]

    def _values(self, kind: str, layer: int) -> Act:
        return self.states[layer] if kind == "state" else self.outputs[kind, layer]


def run_one_pass(
    model: Model,
    problem: Problem,
    *,
    progress: Progress = no_progress,
    budget: int | None = None,
) -> Answers:
    """Measure every cell of `problem`, running no block twice for the same rows.

    `budget` is the memory, in bytes, that one pass may take; None takes half of what is free. When memory runs out
    all the same, the passes are cut smaller and the unfinished ones run again.
    """
    with runs.fused_activations(model):
        return _run(model, problem, progress, budget)


def _run(model: Model, problem: Problem, progress: Progress, budget: int | None) -> Answers:
    cells, length = problem.cells, problem.tokens.shape[1]
    depth, samples = models.n_layers(model), problem.noise.shape[0]
    base, logits = run_base(model, problem)
    measured = problem.readout(logits)
    restored = repeat(measured[1:], "sample metric -> cell sample metric", cell=len(cells)).clone()

    first_read = length - problem.readout.keep
    todo = cells[~is_zero(cells, problem.subject, first_read, depth).to_numpy(dtype=bool)]
    done = len(cells) - len(todo)
    progress(done, len(cells))
    queue = cut_into_passes(model, todo, length, samples, problem.readout.keep, budget)
    while queue:
        part = queue.pop(0)
        try:
            numbers = _Forks(model, problem, base, part).run()
        except (MemoryError, RuntimeError) as error:
            halves = part.halves()
            if not is_out_of_memory(error) or not halves:
                raise
            queue = [*halves, *queue]
            numbers = None
        if numbers is None:
            torch.cuda.empty_cache()  # Not in the handler, whose traceback still holds the activations.
            continue
        for line, number in numbers:
            restored[list(line.rows_of_cells)] = number
            done += len(line.rows_of_cells)
        progress(done, len(cells))
    return Answers(measured[0], measured[1:], restored, prefix_reuse=bool(base.keys.prepended))


# -- base pass -------------------------------------------------------------------------------------


def run_base(model: Model, problem: Problem) -> tuple[BaseRun, Logits]:
    """Run the clean and the corrupted rows once and keep what forks start from."""
    cells, samples = problem.cells, problem.noise.shape[0]
    length, rows = problem.tokens.shape[1], samples + 1
    base = BaseRun(samples, keys=KeyValues(record=rows))
    noise = spread(problem.noise, problem.subject, length, clean_rows=1)
    tokens = repeat(problem.tokens, "1 pos -> row pos", row=rows)
    stream = runs.embed(model, tokens, corrupt(noise))
    base.states[EMBEDDING] = stream

    kinds, severed = set(cells["kind"]), set(cells["severed"])
    needed = {k for k in ("mlp", "attn") if k in kinds or severed & {k, "both"}}
    rerun_mlp = "attn" in kinds and not models.is_parallel(model)
    hooks: Hooks = []
    depth = models.n_layers(model)
    for layer in range(depth):
        if rerun_mlp:
            hooks += _attn_restored(base, layer, rows, depth)
        for kind in sorted(needed):
            hooks.append(
                (models.site(layer, f"{kind}_out"), _keep(base.outputs, (kind, layer), rows))
            )
        hooks.append((models.site(layer, "resid_post"), _keep(base.states, layer, rows)))
    keep = problem.readout.keep
    stream = _with_copies(stream) if rerun_mlp else stream
    return base, runs.run_stream(model, stream, problem.tokens, hooks, base.keys, keep)


def _keep(store: dict, key: object, rows: int) -> Callable[..., Tensor]:
    def keep(act: Tensor, hook: object = None) -> Tensor:
        store[key] = act[:rows].clone()
        return act

    return keep


def _attn_restored(base: BaseRun, layer: int, rows: int, depth: int) -> Hooks:
    """Beside the corrupted rows, let copies of them run each block with clean attention outputs.

    The copies are dropped after the block and made anew for the next, so that only one block's attention is restored.
    """

    def restore_all(act: Tensor, hook: object = None) -> Tensor:
        clean = act[:1].expand(act.shape[0] - rows, -1, -1)
        return torch.cat([act[:rows], clean])

    def leave(act: Act) -> Tensor:
        base.attn_restored[layer] = act[rows:].clone()
        return _with_copies(act[:rows]) if layer < depth - 1 else act[:rows]

    return [
        (models.site(layer, "attn_out"), restore_all),
        (models.site(layer, "resid_post"), fork(leave)),
    ]


def _with_copies(act: Act) -> Tensor:
    return torch.cat([act, act[1:]])


def _last_position(act: Tensor, hook: object = None) -> Tensor:
    return act[:, -1:]


# -- fork passes -----------------------------------------------------------------------------------


class _Forks:
    """One fork pass while it runs: which lines of S rows are in the batch, in order.

    A class, because the lines present change from block to block and every hook needs them.
    """

    def __init__(self, model: Model, problem: Problem, base: BaseRun, part: Pass) -> None:
        self.model, self.problem, self.base, self.part = model, problem, base, part
        self.start, self.samples = part.start, base.samples
        self.depth, self.length = models.n_layers(model), problem.tokens.shape[1]
        self.present: list[Line] = []
        self.waiting = sorted(part.lines, key=lambda line: line.first)

    def run(self) -> list[tuple[Line, Tensor]]:
        """Run the pass; each line with its [sample, metric] numbers."""
        entering = [line for line in self.waiting if line.first == EMBEDDING]
        # One row carries the pass up to the first fork when none starts at the embedding.
        stream = self.base.states[EMBEDDING][:1, self.start :]
        if entering:
            stream = self._new_rows(entering, EMBEDDING)
            self._admit(entering)
        logits = runs.run_stream(
            self.model,
            stream,
            self.problem.tokens[:, self.start :],
            self._hooks(),
            self.base.keys.reuse(self.start, self._owner),
            self.problem.readout.keep,
        )
        numbers = self.problem.readout(logits)
        return list(zip(self.present, numbers.split(self.samples), strict=True))

    def _admit(self, lines: list[Line]) -> None:
        self.present += lines
        entered = {id(line) for line in lines}
        self.waiting = [line for line in self.waiting if id(line) not in entered]

    def _owner(self, layer: int, rows: int) -> Tensor:
        """Every fork attends to its own sample's corrupted prefix; the carrying row to the clean one."""
        device = self.base.states[EMBEDDING].device
        if not self.present:
            return torch.zeros(rows, dtype=torch.long, device=device)
        return torch.arange(rows, device=device) % self.samples + 1

    def _hooks(self) -> Hooks:
        hooks: Hooks = []
        last = self.depth - 1
        if self.problem.readout.keep == 1 and (name := models.mlp_input_site(self.model, last)):
            # The last block's MLP is read at the last position only; one position broadcasts into the stream.
            hooks.append((name, _last_position))
        for layer in range(self.depth):
            for kind in ("attn", "mlp"):
                if any(line.may_touch(kind, layer) for line in self.part.lines):
                    hooks.append((models.site(layer, f"{kind}_out"), self._outputs(kind, layer)))
            hooks.append((models.site(layer, "resid_post"), fork(self._grow(layer))))
        return hooks

    def _outputs(self, kind: str, layer: int) -> Callable[..., Tensor]:
        """Inside a window a fork's own position takes the clean output; severed, the corrupted one."""

        def patch(act: Tensor, hook: object = None) -> Tensor:
            source, where = act.clone(), torch.zeros(act.shape[:2], dtype=torch.bool)
            for number, line in enumerate(self.present):
                # Counted from the end, because the last block's MLP may hold the last position only.
                at = line.position - self.length
                if not line.touches(kind, layer) or -at > act.shape[1]:
                    continue
                rows = slice(number * self.samples, (number + 1) * self.samples)
                where[rows, at] = True
                if line.restores(kind, layer):
                    source[rows, at] = self.base.clean(kind, layer)[line.position]
                else:
                    source[rows, at] = self.base.corrupted(kind, layer)[:, line.position]
            return substitute(source, where)(act)

        return patch

    def _grow(self, layer: int) -> Callable[[Tensor], Tensor]:
        """At a block's output: let ended windows leave their shared line, and new forks enter."""

        def make(act: Tensor) -> Tensor:
            parts = [act] if self.present else []
            for number, line in enumerate(list(self.present)):
                if halves := line.split_at(layer):
                    parts.append(act[number * self.samples : (number + 1) * self.samples])
                    ended, self.present[number] = halves
                    self.present.append(ended)
            entering = [line for line in self.waiting if line.first == layer]
            if entering:
                parts.append(self._new_rows(entering, layer))
                self._admit(entering)
            if not self.present:
                return act
            return torch.cat(parts) if len(parts) > 1 else parts[0]

        return make

    def _new_rows(self, lines: list[Line], layer: int) -> Tensor:
        """The corrupted rows, once for each line, with the line's own state put in."""
        corrupted = self.base.corrupted("state", layer)[:, self.start :]
        rows = repeat(
            corrupted, "sample pos d_model -> line sample pos d_model", line=len(lines)
        ).clone()
        for number, line in enumerate(lines):
            rows[number, :, line.position - self.start] = self._state(line, layer)
        return rows.flatten(0, 1)

    def _state(self, line: Line, layer: int) -> Tensor:
        """A line's first state, [sample, d_model] or [d_model]: the block's output with its one part restored."""
        if line.kind == "state":
            return self.base.clean("state", layer)[line.position]
        if line.kind == "attn" and not line.severs("mlp") and self.base.attn_restored:
            return self.base.attn_restored[layer][:, line.position]
        # At least in float32, since a bfloat16 sum would be rounded twice more than the model rounds it.
        state = self.base.corrupted("state", layer)[:, line.position]
        wide = torch.promote_types(state.dtype, torch.float32)
        clean = self.base.clean(line.kind, layer)[line.position].to(wide)
        own = self.base.corrupted(line.kind, layer)[:, line.position].to(wide)
        return state.to(wide) + (clean - own)
