"""The one-pass engine: a whole layer x token grid in one base pass and a few fork passes.

**Base pass** (`base_runs.py`). One clean and S corrupted rows, once through the model, keeping states, MLP and
attention outputs, keys and values.

**Fork passes.** The run with position i restored at layer l equals its corrupted run below l everywhere, and before i
at every layer. So nothing is run twice: a pass over the positions from i on starts with no rows at all, gains S rows
at each block's output (copies of the corrupted rows in which one state is clean), and attends to the corrupted run's
keys and values before i. Exact, by causality. Cells are cut into passes by position (`passes.py`).

**Windows** fork at their first block's output, which needs no run of its own: it is the corrupted output with the MLP's
clean value put in for its corrupted one. (Restored attention also changes its own block's MLP where the MLP comes
after it; the base pass computes that for all positions at once.) Inside the window the forks' own rows take clean
values. Windows cut at layer 0 share one line of rows until the first of them ends.

**Several problems** of one shape share all passes: their rows stand side by side in the batch.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from factlens import models, runs
from factlens.engines.base_runs import BaseRun, problems_of, run_base
from factlens.engines.passes import Line, Pass, cut_into_passes, lines_of
from factlens.engines.problems import (
    Answers,
    Problem,
    Progress,
    is_out_of_memory,
    no_progress,
)
from factlens.models import Model
from factlens.patches import EMBEDDING, fork
from factlens.plans import is_zero
from factlens.types import Hooks


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
    return run_together(model, [problem], progress=progress, budget=budget)[0]


def run_together(
    model: Model,
    problems: Sequence[Problem],
    *,
    progress: Progress = no_progress,
    budget: int | None = None,
) -> list[Answers]:
    """`run_one_pass` for several problems of one shape (`Problem.shape`), whose rows share every pass."""
    with runs.fused_activations(model):
        answers = _unless_too_large(model, problems, progress, budget)
    if answers is not None:
        return answers
    torch.cuda.empty_cache()
    middle = len(problems) // 2
    halves = problems[:middle], problems[middle:]
    return [a for half in halves for a in run_together(model, half, budget=budget)]


def _unless_too_large(
    model: Model, problems: Sequence[Problem], progress: Progress, budget: int | None
) -> list[Answers] | None:
    """The answers, or None when memory ran out for several problems: half of them may fit."""
    try:
        return _run(model, problems, progress, budget)
    except (MemoryError, RuntimeError) as error:
        if len(problems) == 1 or not is_out_of_memory(error):
            raise
    return None


def _run(
    model: Model, problems: Sequence[Problem], progress: Progress, budget: int | None
) -> list[Answers]:
    length, samples, keep, direct = problems[0].shape
    depth = models.n_layers(model)
    base, logits = run_base(model, problems)
    measured = [
        problem.readout(rows)
        for problem, rows in zip(problems, logits.split(samples + 1), strict=True)
    ]
    restored, lines, total = [], [], 0
    for number, (problem, numbers) in enumerate(zip(problems, measured, strict=True)):
        untouched = numbers[:1].expand(samples, -1) if direct else numbers[1:]
        restored.append(untouched.expand(len(problem.cells), -1, -1).clone())
        zero = is_zero(problem.cells, problem.subject, length - keep, depth).to_numpy(dtype=bool)
        lines += lines_of(problem.cells[~zero], depth, number)
        total += len(problem.cells)
    done = total - sum(len(line.rows_of_cells) for line in lines)
    progress(done, total)
    queue = cut_into_passes(model, lines, length, samples, keep, budget)
    while queue:
        part = queue.pop(0)
        try:
            answered = _Forks(model, problems, base, part).run()
        except (MemoryError, RuntimeError) as error:
            halves = part.halves()
            if not is_out_of_memory(error) or not halves:
                raise
            queue = [*halves, *queue]
            answered = None
        if answered is None:
            torch.cuda.empty_cache()  # Not in the handler, whose traceback still holds the activations.
            continue
        for line, its_numbers in answered:
            restored[line.fact][list(line.rows_of_cells)] = its_numbers
            done += len(line.rows_of_cells)
        progress(done, total)
    reuse = bool(base.keys.prepended)
    return [Answers(m[0], m[1:], r, reuse) for m, r in zip(measured, restored, strict=True)]


class _Forks:
    """One fork pass while it runs: which lines of S rows are in the batch, in order.

    A class, because the lines present change from block to block and every hook needs them.
    """

    def __init__(
        self, model: Model, problems: Sequence[Problem], base: BaseRun, part: Pass
    ) -> None:
        self.model, self.problems, self.base, self.part = model, problems, base, part
        self.length, self.samples, self.keep, _ = problems[0].shape
        self.start, self.depth = part.start, models.n_layers(model)
        self.present: list[Line] = []
        self.waiting = list(part.lines)
        self.owners = torch.zeros(1, dtype=torch.long, device=base.states[EMBEDDING].device)
        """For each row in the batch the base row whose prefix it attends to: at first that of the carrying row."""

    def run(self) -> list[tuple[Line, Tensor]]:
        """Run the pass; each line with its [sample, metric] numbers."""
        # One row carries the pass up to the first fork when none starts at the embedding.
        stream = self._grow(EMBEDDING)(self.base.states[EMBEDDING][:1, self.start :])
        logits = runs.run_stream(
            self.model,
            stream,
            self.problems[0].tokens[:, self.start :],
            self._hooks(),
            self.base.keys.reuse(self.start, lambda layer, rows: self.owners),
            self.keep,
        )
        return self._read(logits)

    def _read(self, logits: Tensor) -> list[tuple[Line, Tensor]]:
        """Each problem has its own answer token, so each reads its own rows."""
        by_line = logits.unflatten(0, (len(self.present), self.samples))
        found = []
        for fact in dict.fromkeys(line.fact for line in self.present):
            mine = [number for number, line in enumerate(self.present) if line.fact == fact]
            rows = by_line if len(mine) == len(self.present) else by_line[mine]
            numbers = self.problems[fact].readout(rows.flatten(0, 1)).split(self.samples)
            found += [(self.present[n], each) for n, each in zip(mine, numbers, strict=True)]
        return found

    def _hooks(self) -> Hooks:
        hooks: Hooks = []
        last = self.depth - 1
        if self.keep == 1 and (name := models.mlp_input_site(self.model, last)):
            # The last block's MLP is read at the last position only; one position broadcasts into the stream.
            hooks.append((name, _last_position))
        for layer in range(self.depth):
            for kind in ("attn", "mlp"):
                if any(line.may_touch(kind, layer) for line in self.part.lines):
                    hooks.append((models.site(layer, f"{kind}_out"), self._outputs(kind, layer)))
            hooks.append((models.site(layer, "resid_post"), fork(self._grow(layer))))
        return hooks

    def _outputs(self, kind: str, layer: int) -> Callable[..., Tensor]:
        """Inside a window a fork's own position takes the source's output; severed, the baseline's."""

        def patch(act: Tensor, hook: object = None) -> Tensor:
            # The last block's MLP may hold the last position only.
            touched = [
                (number, line)
                for number, line in enumerate(self.present)
                if line.touches(kind, layer) and self.length - line.position <= act.shape[1]
            ]
            changed = act.clone()
            for restored in (True, False):
                chosen = [each for each in touched if each[1].restores(kind, layer) == restored]
                if chosen:
                    self._put(changed, chosen, kind, layer, restored)
            return changed

        return patch

    def _put(
        self, act: Tensor, chosen: list[tuple[int, Line]], kind: str, layer: int, restored: bool
    ) -> None:
        numbers, lines = zip(*chosen, strict=True)
        problems, positions = self._where(lines, act.device)
        rows = self.base.source(problems) if restored else self.base.baseline(problems)
        firsts = torch.tensor(numbers, device=act.device) * self.samples
        own = (firsts[:, None] + torch.arange(self.samples, device=act.device)).flatten()
        # Counted from the end, since `act` may begin at any position.
        act[own, positions - self.length] = self.base.values(kind, layer)[rows, positions]

    def _where(self, lines: Sequence[Line], device: torch.device) -> tuple[Tensor, Tensor]:
        """Each line's problem, and each row's position."""
        positions = torch.tensor([line.position for line in lines], device=device)
        return problems_of(lines, device), positions.repeat_interleave(self.samples)

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
            self.waiting = [line for line in self.waiting if line.first != layer]
            for route in sorted({self._route(line) for line in entering}):
                lines = [line for line in entering if self._route(line) == route]
                parts.append(self._new_rows(lines, route, layer))
                self.present += lines
            if not self.present:
                return act
            if len(parts) > 1 or entering:
                self.owners = self.base.baseline(problems_of(self.present, act.device))
            return torch.cat(parts) if len(parts) > 1 else parts[0]

        return make

    def _route(self, line: Line) -> str:
        """How a line's first state is had: "state", or through an output: "mlp", "attn", or "attn and mlp"."""
        if line.kind == "attn" and not line.severs("mlp") and self.base.attn_restored:
            return "attn and mlp"
        return line.kind

    def _new_rows(self, lines: Sequence[Line], route: str, layer: int) -> Tensor:
        """The baseline rows, once for each line, with the line's own state put in."""
        states = self.base.values("state", layer)[:, self.start :]
        problems, positions = self._where(lines, states.device)
        rows = states.index_select(0, self.base.baseline(problems))
        own = torch.arange(rows.shape[0], device=rows.device)
        rows[own, positions - self.start] = self._state(route, layer, problems, positions)
        return rows

    def _state(self, route: str, layer: int, problems: Tensor, positions: Tensor) -> Tensor:
        """First states of lines, [fork, d_model]: the block's output with one part of it from the source run."""
        baseline, source = self.base.baseline(problems), self.base.source(problems)
        states = self.base.values("state", layer)
        if route == "state":
            return states[source, positions]
        if route == "attn and mlp":
            # The copies lie problem by problem, without the clean rows between them.
            sample = torch.arange(self.samples, device=problems.device)
            copies = (problems[:, None] * self.samples + sample).flatten()
            return self.base.attn_restored[layer][copies, positions]
        # At least in float32, since a bfloat16 sum would be rounded twice more than the model rounds it.
        wide = torch.promote_types(states.dtype, torch.float32)
        outputs = self.base.values(route, layer)
        gain = outputs[source, positions].to(wide) - outputs[baseline, positions].to(wide)
        return (states[baseline, positions].to(wide) + gain).to(states.dtype)


def _last_position(act: Tensor, hook: object = None) -> Tensor:
    return act[:, -1:]
