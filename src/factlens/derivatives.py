"""Backward passes through a hooked model: along a path of states, and at every site of one corrupted run."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from einops import einsum, repeat
from jaxtyping import Float
from torch import Tensor

from factlens import models, runs
from factlens.corruption import spread
from factlens.engines.problems import METRICS, Problem
from factlens.models import Model
from factlens.patches import EMBEDDING, corrupt, fork, state_site
from factlens.plans import window_layers
from factlens.types import Act, Hooks, Logits, Tokens


@dataclass(frozen=True)
class StatePath:
    """Where the states of one layer go from, one run for each sample, and to; at least in float32."""

    layer: int
    base: Float[Tensor, "sample pos d_model"]
    clean: Float[Tensor, "1 pos d_model"]
    prob_base: float
    prob_clean: float


def nodes_of(steps: int, *, zero: bool) -> tuple[Float[Tensor, " step"], Float[Tensor, " step"]]:
    """Points on [0, 1] and their weights: Gauss-Legendre in the path's length, from zero in its square root."""
    points, weights = (torch.from_numpy(each) for each in np.polynomial.legendre.leggauss(steps))
    points, weights = (points + 1) / 2, weights / 2
    # From zero the points crowd where it begins: there layer norm turns the smallest states into full ones.
    return (points**2, 2 * points * weights) if zero else (points, weights)


def paths_of(
    model: Model, problem: Problem, layers: Sequence[int], *, zero: bool
) -> Iterator[StatePath]:
    """The path of each layer's states: from the corrupted runs, or from zero, to the clean one."""
    names, tokens = [state_site(layer) for layer in layers], problem.tokens
    logits, clean = runs.run_with_cache(model, tokens, names)
    prob_clean = float(_prob(problem, logits))
    if not zero:
        noise = spread(problem.noise, problem.subject, tokens.shape[1], clean_rows=0)
        rows = runs.rows_of(tokens, noise.shape[0])
        logits, corrupted = runs.run_with_cache(model, rows, names, corrupt(noise))
    for layer, name in zip(layers, names, strict=True):
        # Copies: autograd refuses what was made in inference mode.
        end = clean[name].float().clone()
        if zero:
            base = torch.zeros_like(end)
            with torch.no_grad():
                prob = _prob_from(model, problem, layer, base)
        else:
            base, prob = corrupted[name].float().clone(), _prob(problem, logits)
        yield StatePath(layer, base, end, float(prob.double().mean()), prob_clean)


def integrate(
    model: Model,
    problem: Problem,
    path: StatePath,
    nodes: tuple[Float[Tensor, " step"], Float[Tensor, " step"]],
    batch: int,
) -> dict[str, Any]:
    """The columns of one layer: p(answer) at both ends, and the attribution of each position."""
    samples, steps = path.base.shape[0], nodes[0].shape[0]
    sample = repeat(torch.arange(samples), "sample -> (sample step)", step=steps)
    points, weights = (repeat(each, "step -> (sample step)", sample=samples) for each in nodes)
    total = torch.zeros(path.base.shape[1], dtype=torch.float64)
    for part in torch.arange(samples * steps).split(batch):
        base = path.base[sample[part]]
        way = path.clean - base
        states = (base + points[part].to(way)[:, None, None] * way).requires_grad_()
        prob = _prob_from(model, problem, path.layer, states)
        (gradient,) = torch.autograd.grad(prob.sum(), states)
        each = einsum(gradient, way, "row pos d_model, row pos d_model -> row pos")
        total += einsum(each.double().cpu(), weights[part], "row pos, row -> pos")
    return {
        "prob_clean": path.prob_clean,
        "prob_baseline": path.prob_base,
        "attribution": (total / samples).numpy(),
    }


def _prob_from(model: Model, problem: Problem, layer: int, states: Act) -> Float[Tensor, " row"]:
    """p(answer) of the runs that go on from `states` at `layer`; the blocks below run for one row only."""

    def enter(act: Tensor) -> Tensor:
        # A copy: a block that adds in place must not change what the gradient is taken by.
        return states.to(act.device, act.dtype, copy=True)

    rows = states.shape[0] if layer == EMBEDDING else 1
    tokens = runs.rows_of(problem.tokens, rows)
    return _prob(problem, _logits(model, tokens, [(state_site(layer), fork(enter))]))


# -- attribution patching --------------------------------------------------------------------------


def first_order(
    model: Model, problem: Problem, kinds: Sequence[str]
) -> dict[str, Float[Tensor, "layer pos"]]:
    """(clean - corrupted) . gradient for each kind, layer and position; states begin with the embedding's."""
    noise = spread(problem.noise, problem.subject, problem.tokens.shape[1], clean_rows=1)
    acts: dict[str, Tensor] = {}
    probes: dict[str, Tensor] = {}

    def probing(name: str) -> tuple[str, Any]:
        def probe(act: Tensor, hook: object = None) -> Tensor:
            # The gradient by an added zero: what a hook is given may be a view that the model does not read again.
            acts[name] = act.detach().clone()
            probes[name] = torch.zeros_like(acts[name]).requires_grad_()
            return act + probes[name]

        return name, probe

    depth = models.n_layers(model)
    names = {
        kind: [state_site(layer) for layer in range(EMBEDDING, depth)]
        if kind == "state"
        else [models.site(layer, f"{kind}_out") for layer in range(depth)]
        for kind in kinds
    }
    hooks = corrupt(noise) + [probing(name) for each in names.values() for name in each]
    tokens = runs.rows_of(problem.tokens, noise.shape[0])
    prob = _prob(problem, _logits(model, tokens, hooks))
    gradients = torch.autograd.grad(prob[1:].sum(), list(probes.values()))
    found = {}
    for name, gradient in zip(probes, gradients, strict=True):
        way = acts[name][:1].float() - acts[name][1:].float()
        each = einsum(way, gradient[1:].float(), "row pos d_model, row pos d_model -> row pos")
        found[name] = each.double().mean(dim=0).cpu()
    return {kind: torch.stack([found[name] for name in each]) for kind, each in names.items()}


def summed(
    cells: pd.DataFrame, found: dict[str, Float[Tensor, "layer pos"]], depth: int
) -> list[float]:
    """The attribution of each cell: of a window, the sum over its layers."""
    sums = []
    for kind, window, layer, position in cells[["kind", "window", "layer", "position"]].values:
        if kind == "state":
            sums.append(float(found[kind][layer + 1, position]))
        else:
            layers = window_layers(layer, window, depth)
            sums.append(float(found[kind][layers.start : layers.stop, position].sum()))
    return sums


# -- running with a graph --------------------------------------------------------------------------


@contextlib.contextmanager
def differentiable(model: Model) -> Iterator[None]:
    """Record graphs whatever the caller has switched off, and none of the parameters, which come back as found."""
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in wanting:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad(), runs.fused_activations(model):
            yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


def _logits(model: Model, tokens: Tokens, hooks: Hooks) -> Float[Tensor, "fork keep d_vocab"]:
    """Logits after the last token, with their graph; a hook may have made more rows of those of `tokens`."""
    runner, tokens = cast(Any, model), tokens.to(models.device_of(model))
    if models.is_bridge(model):
        return runner.run_with_hooks(tokens, fwd_hooks=hooks, logits_to_keep=1)

    def cut(act: Tensor, hook: object = None) -> Tensor:
        return act[:, -1:]

    top = models.site(models.n_layers(model) - 1, "resid_post")
    return runner.run_with_hooks(tokens, fwd_hooks=[*hooks, (top, cut)])


def _prob(problem: Problem, logits: Logits) -> Float[Tensor, " row"]:
    return problem.readout(logits)[:, METRICS.index("prob")]
