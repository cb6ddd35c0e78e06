"""The base pass of the one-pass engine: the clean and the corrupted runs, once, with all that forks start from.

Several problems of one shape share it. Each has 1 + S rows, one problem after another: its clean run, then its
corrupted ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from einops import repeat
from jaxtyping import Int
from torch import Tensor

from factlens import models, runs
from factlens.corruption import spread
from factlens.engines.passes import Line
from factlens.engines.problems import Problem
from factlens.models import Model
from factlens.patches import EMBEDDING, corrupt, fork
from factlens.prefixes import KeyValues
from factlens.types import Act, Hooks, Logits


@dataclass
class BaseRun:
    """What the base pass leaves for the fork passes.

    A fork is a copy of its *baseline* run in which one state takes its value from the *source* run: the corrupted and
    the clean one, or for direct effects the other way round.
    """

    problems: int
    samples: int
    direct: bool
    states: dict[int, Act] = field(default_factory=dict)
    """Block outputs by layer; -1 is what enters block 0."""
    outputs: dict[tuple[str, int], Act] = field(default_factory=dict)
    """("mlp" | "attn", layer) -> what it adds to the stream."""
    attn_restored: dict[int, Act] = field(default_factory=dict)
    """Block outputs [problem sample, pos, d_model] with only this block's attention from the source run."""
    keys: KeyValues = field(default_factory=KeyValues)

    @property
    def rows(self) -> int:
        """How many rows the base pass has."""
        return self.problems * (self.samples + 1)

    def values(self, kind: str, layer: int) -> Act:
        """States ("state") or outputs ("mlp", "attn") of all rows at one layer, [row, pos, d_model]."""
        return self.states[layer] if kind == "state" else self.outputs[kind, layer]

    def baseline(self, problems: Int[Tensor, " line"]) -> Int[Tensor, " fork"]:
        """For each problem in turn the S rows that its forks copy."""
        return self._clean(problems) if self.direct else self._corrupted(problems)

    def source(self, problems: Int[Tensor, " line"]) -> Int[Tensor, " fork"]:
        """For each problem in turn the S rows that restored values are taken from."""
        return self._corrupted(problems) if self.direct else self._clean(problems)

    def _clean(self, problems: Tensor) -> Tensor:
        return (problems * (self.samples + 1)).repeat_interleave(self.samples)

    def _corrupted(self, problems: Tensor) -> Tensor:
        sample = torch.arange(self.samples, device=problems.device)
        return (problems[:, None] * (self.samples + 1) + 1 + sample).flatten()


def run_base(model: Model, problems: Sequence[Problem]) -> tuple[BaseRun, Logits]:
    """Run the clean and the corrupted rows of all problems once and keep what forks start from."""
    samples, length = problems[0].noise.shape[0], problems[0].tokens.shape[1]
    base = BaseRun(len(problems), samples, problems[0].direct)
    base.keys = KeyValues(record=base.rows)
    noise = torch.cat([spread(each.noise, each.subject, length, clean_rows=1) for each in problems])
    tokens = torch.cat([repeat(p.tokens, "1 pos -> row pos", row=samples + 1) for p in problems])
    stream = runs.embed(model, tokens, corrupt(noise))
    base.states[EMBEDDING] = stream

    kinds = {kind for each in problems for kind in each.cells["kind"]}
    severed = {cut for each in problems for cut in each.cells["severed"]}
    needed = {k for k in ("mlp", "attn") if k in kinds or severed & {k, "both"}}
    rerun_mlp = "attn" in kinds and not models.is_parallel(model)
    hooks: Hooks = []
    depth = models.n_layers(model)
    every = torch.arange(len(problems), device=stream.device)
    for layer in range(depth):
        if rerun_mlp:
            hooks += _attn_restored(base, layer, every, depth)
        for kind in sorted(needed):
            keep = _keep(base.outputs, (kind, layer), base.rows)
            hooks.append((models.site(layer, f"{kind}_out"), keep))
        hooks.append((models.site(layer, "resid_post"), _keep(base.states, layer, base.rows)))
    stream = _with_copies(stream, base.baseline(every)) if rerun_mlp else stream
    read = problems[0].readout.keep
    return base, runs.run_stream(model, stream, problems[0].tokens, hooks, base.keys, read)


def _keep(store: dict, key: object, rows: int) -> Callable[..., Tensor]:
    def keep(act: Tensor, hook: object = None) -> Tensor:
        store[key] = act[:rows].clone()
        return act

    return keep


def _attn_restored(base: BaseRun, layer: int, every: Tensor, depth: int) -> Hooks:
    """Beside the base rows, let copies of the baseline ones run each block with the source's attention outputs.

    The copies are dropped after the block and made anew for the next, so that only one block's attention is restored.
    """

    def restore_all(act: Tensor, hook: object = None) -> Tensor:
        return torch.cat([act[: base.rows], act[base.source(every.to(act.device))]])

    def leave(act: Act) -> Tensor:
        base.attn_restored[layer] = act[base.rows :].clone()
        act = act[: base.rows]
        if layer == depth - 1:
            return act
        return _with_copies(act, base.baseline(every.to(act.device)))

    return [
        (models.site(layer, "attn_out"), restore_all),
        (models.site(layer, "resid_post"), fork(leave)),
    ]


def _with_copies(act: Act, rows: Tensor) -> Tensor:
    return torch.cat([act, act[rows]])


def problems_of(lines: Sequence[Line], device: torch.device) -> Int[Tensor, " line"]:
    """The number of each line's problem."""
    return torch.tensor([line.fact for line in lines], dtype=torch.long, device=device)
