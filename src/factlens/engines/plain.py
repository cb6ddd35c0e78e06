"""The plain engine: one forward pass per cell, as the paper's code does.

Each pass has 1 + S rows (clean, then corrupted), all positions and all logits. It is the oracle of the tests, the
baseline of the benchmarks, and the way out for models and sites that the one-pass engine cannot serve. It shares
nothing with that engine but the patches.
"""

from collections.abc import Mapping

import torch
from einops import repeat
from torch import Tensor

from factlens import models, runs
from factlens.corruption import spread
from factlens.engines.problems import METRICS, Answers, Problem, Progress, no_progress
from factlens.models import Model
from factlens.patches import (
    EMBEDDING,
    corrupt,
    restore,
    restore_window,
    sever_attn,
    sever_mlp,
    substitute,
    substitute_head,
)
from factlens.plans import window_layers
from factlens.types import Hooks, Where


def run_plain(
    model: Model,
    problem: Problem,
    *,
    progress: Progress = no_progress,
    lean: bool = False,
) -> Answers:
    """Measure every cell of `problem` by its own forward pass.

    `lean` drops what the official code computes and does not use: the clean row of each pass, and all logits but those
    that are read. It changes no number; benchmarks show it beside the official cost.
    """
    length, clean_rows = problem.tokens.shape[1], 0 if lean else 1
    samples = problem.noise.shape[0]
    rows = clean_rows + samples
    tokens = repeat(problem.tokens, "1 pos -> row pos", row=rows)
    noise = spread(problem.noise, problem.subject, length, clean_rows)
    keep = problem.readout.keep if lean else 0
    sites = _sites(model, problem)

    clean_logits, clean = runs.run_with_cache(model, problem.tokens, sites)
    clean = {name: runs.rows_of(act, rows) for name, act in clean.items()}
    corrupted_logits, corrupted = runs.run_with_cache(model, tokens, sites, corrupt(noise))
    measured = problem.readout(clean_logits)[0], problem.readout(corrupted_logits)[clean_rows:]

    restored = torch.zeros(len(problem.cells), samples, len(METRICS))
    # What runs untouched, what it starts with, and where values are put in from and severed ones frozen at.
    if problem.direct:
        untouched, start, source, frozen = measured[0].expand(samples, -1), [], corrupted, clean
    else:
        untouched, start, source, frozen = measured[1], corrupt(noise), clean, corrupted
    for number, cell in enumerate(problem.cells.itertuples(index=False)):
        if cell.kind == "state" and cell.layer == EMBEDDING and not _in_subject(cell, problem):
            restored[number] = untouched
        else:
            where = torch.zeros(rows, length, dtype=torch.bool)
            where[clean_rows:, cell.position] = True
            hooks = start + _patches(model, cell, source, frozen, where)
            logits = runs.logits_of(model, tokens, hooks, keep)
            restored[number] = problem.readout(logits)[clean_rows:]
        progress(number + 1, len(problem.cells))
    return Answers(*measured, restored)


def _in_subject(cell: object, problem: Problem) -> bool:
    begin, end = problem.subject
    return begin <= cell.position < end  # type: ignore[attr-defined]


def _sites(model: Model, problem: Problem) -> list[str]:
    """The hook points whose clean or corrupted values some cell needs."""
    layers = range(models.n_layers(model))
    names = ["hook_embed"]
    for kind in ("resid_post", "mlp_out", "attn_out"):
        names += [models.site(layer, kind) for layer in layers]
    others = set(problem.cells["kind"]) - {"state", "mlp", "attn"}
    return names + [kind.format(l=layer) for kind in sorted(others) for layer in layers]


def _patches(
    model: Model,
    cell: object,
    source: Mapping[str, Tensor],
    frozen: Mapping[str, Tensor],
    where: Where,
) -> Hooks:
    """Sever first, restore after: the last hook at a site wins."""
    kind, layer, severed = cell.kind, cell.layer, cell.severed  # type: ignore[attr-defined]
    hooks: Hooks = []
    if severed in ("mlp", "both"):
        hooks += sever_mlp(frozen, where)
    if severed in ("attn", "both"):
        hooks += sever_attn(frozen, where)
    if kind == "state":
        return hooks + restore(layer, source, where)
    if kind in ("mlp", "attn"):
        layers = window_layers(layer, cell.window, models.n_layers(model))  # type: ignore[attr-defined]
        return hooks + restore_window(kind, layers, source, where)
    name, head = kind.format(l=layer), getattr(cell, "head", -1)
    if head >= 0:
        return [*hooks, (name, substitute_head(source[name], where, head))]
    return [*hooks, (name, substitute(source[name], where))]
