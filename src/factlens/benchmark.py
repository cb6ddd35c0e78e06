"""`make bench`: the one-pass engine against one forward pass per cell, in one process, alternating.

A ratio of two ways measured beside each other means something on any machine; seconds do not. `plain` pays what the
official code pays (11 rows, all positions, all logits), `lean plain` only what it needs (10 rows, the last logits).
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any

import pandas as pd
import torch
import typer

from factlens import models, runs
from factlens.engines.one_pass import run_one_pass
from factlens.engines.passes import block_weights, cut_into_passes, lines_of
from factlens.engines.plain import run_plain
from factlens.engines.problems import Answers, Problem, Readout
from factlens.models import Model
from factlens.plans import is_zero, plan
from factlens.tokens import TokenizedPrompt

SHAPES: dict[str, dict[str, int]] = {
    "gpt2-small": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-xl": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
}
LENGTH, SUBJECT, SAMPLES, WINDOW = 14, (2, 5), 10, 10
"""A prompt of 14 tokens with its subject at tokens 2-4."""
EVERY = {"gpt2-medium": 8, "gpt2-xl": 32}
"""Of large shapes plain is timed on every n-th cell, and its time multiplied: each cell costs one forward pass."""


@dataclass(frozen=True)
class Row:
    """One line of the table. Times in seconds, medians over the rounds."""

    shape: str
    kind: str
    plain: float
    lean: float
    one_pass: float
    flops: float
    """FLOPs by `needed_flops`: what remains when no block runs twice for the same rows."""
    rate: float
    """FLOP per second of this machine in a matrix product of the model's size, measured beside it."""
    difference: float
    """Largest difference in log-probability between plain and one-pass."""

    @property
    def share(self) -> float:
        """The part of its time that one-pass would need if it were nothing but matrix products."""
        return self.flops / self.rate / self.one_pass


def build(shape: str, device: str, dtype: torch.dtype) -> Model:
    """The bundled model, or random weights of a GPT-2 shape."""
    if shape == models.BUNDLED:
        return models.load_model(device=device, dtype=dtype)
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    with torch.device(device):
        hf_model = GPT2LMHeadModel(GPT2Config(**SHAPES[shape], attn_implementation="eager"))
    return models.wrap_model(hf_model.to(dtype), models.tokenizer(models.load_model()), shape)


def problem(model: Model, kind: str, window: int = WINDOW) -> Problem:
    """All token x layer cells of one kind, without the embedding, which the paper's grid has not."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, int(models.cfg(model).d_vocab), (1, LENGTH), generator=generator)
    prompt = TokenizedPrompt(ids, tuple(f"token {i}" for i in range(LENGTH)), SUBJECT, 1)
    cells = plan(
        prompt, models.n_layers(model), kinds=(kind,), windows=(window,), include_embedding=False
    )
    shape = (SAMPLES, SUBJECT[1] - SUBJECT[0], int(models.cfg(model).d_model))
    noise = torch.randn(shape, dtype=torch.float64, generator=generator) * 0.06
    top = int(runs.logits_of(model, ids, keep=1)[0, -1].argmax())
    return Problem(ids, SUBJECT, noise, cells, Readout(torch.tensor([top])))


def needed_flops(
    config: Any, cells: pd.DataFrame, subject: tuple[int, int], length: int, samples: int
) -> float:
    """FLOPs of the matrix products when no block runs twice for the same rows: 2 for each weight, token and run.

    Counts the base pass, each distinct run from the block after its fork to the last, over the positions from its own
    on (in the last block only attention there, and the MLP at the last position), and one unembedding for each run.
    Attention scores, norms and activations are left out. `config` is a TransformerLens configuration, or anything with
    its numbers; `subject` is half-open.
    """
    depth, d_model, block = int(config.n_layers), int(config.d_model), block_weights(config)
    mlp = block - 4 * d_model * int(config.d_head) * int(config.n_heads)
    cells = cells[~is_zero(cells, subject, length - 1, depth).to_numpy(dtype=bool)]
    weights = 0.0
    runs = 0
    for line in lines_of(cells, depth):
        span = length - line.position
        starts = [line.first, *(end - 1 for end in sorted(set(line.ends))[:-1])]
        for start in starts:
            runs += 1
            middle = max(0, depth - 2 - start)
            weights += middle * span * block
            if start < depth - 1:
                weights += span * (block - mlp) + mlp
    base = (samples + 1) * depth * length * block
    unembed = (samples * runs + samples + 1) * d_model * int(config.d_vocab)
    return 2.0 * (samples * weights + base + unembed)


def matrix_rate(model: Model) -> float:
    """FLOP per second of a product of the size of the MLP's input matrix with 1 280 tokens."""
    d_model, d_mlp = int(models.cfg(model).d_model), int(models.cfg(model).d_mlp)
    device, dtype = models.device_of(model), models.dtype_of(model)
    left = torch.randn(1280, d_model, device=device, dtype=dtype)
    right = torch.randn(d_model, d_mlp, device=device, dtype=dtype)
    times = []
    for _ in range(12):
        begun = _now(device)
        for _ in range(4):
            torch.mm(left, right)
        times.append((_now(device) - begun) / 4)
    return 2.0 * 1280 * d_model * d_mlp / statistics.median(times)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _timed(device: torch.device, run: Callable[[], Answers]) -> tuple[float, Answers]:
    begun = _now(device)
    answers = run()
    return _now(device) - begun, answers


def measure(shape: str, model: Model, kind: str, rounds: int) -> Row:
    """Both ways in turn, `rounds` times after one that does not count for one-pass."""
    task, device = problem(model, kind), models.device_of(model)
    every = EVERY.get(shape, 1)
    sampled = replace(task, cells=task.cells.iloc[::every].reset_index(drop=True))
    run_one_pass(model, task)
    times: dict[str, list[float]] = {"plain": [], "lean": [], "one_pass": []}
    rates, gap = [], 0.0
    for _ in range(rounds):
        rates.append(matrix_rate(model))
        seconds, fast = _timed(device, lambda: run_one_pass(model, task))
        times["one_pass"].append(seconds)
        # A second time, because it is short beside plain and its share is what we look at.
        times["one_pass"].append(_timed(device, lambda: run_one_pass(model, task))[0])
        rates.append(matrix_rate(model))
        seconds, slow = _timed(device, lambda: run_plain(model, sampled))
        times["plain"].append(seconds * every)
        seconds, _ = _timed(device, lambda: run_plain(model, sampled, lean=True))
        times["lean"].append(seconds * every)
        both = fast.restored[::every, :, 1] - slow.restored[..., 1]
        gap = max(gap, float(both.abs().max()))
    middle: dict[str, Any] = {name: statistics.median(each) for name, each in times.items()}
    flops = needed_flops(models.cfg(model), task.cells, SUBJECT, LENGTH, SAMPLES)
    rate = statistics.median(rates)
    return Row(shape, kind, **middle, flops=flops, rate=rate, difference=gap)


HEADER = (
    "| shape | kind | plain, s | lean plain, s | one-pass, s | plain / one-pass | lean / one-pass "
    "| TFLOP needed | share of matrix rate | passes | max diff. log p |"
)


def show(row: Row, passes: int) -> str:
    """One row as Markdown."""
    return (
        f"| {row.shape} | {row.kind} | {row.plain:.1f} | {row.lean:.1f} | {row.one_pass:.2f} "
        f"| **{row.plain / row.one_pass:.1f}x** | {row.lean / row.one_pass:.1f}x "
        f"| {row.flops / 1e12:.3f} | {row.share:.0%} | {passes} | {row.difference:.0e} |"
    )


def main(
    shapes: Annotated[
        list[str] | None, typer.Option("--shape", help="atlas, gpt2-small, …")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Alternations per row.")] = 3,
    quick: Annotated[bool, typer.Option(help="atlas only, one round.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "float32",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
) -> None:
    """Compare one-pass with plain; prints a Markdown table."""
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    if threads:
        torch.set_num_threads(threads)
    known = [models.BUNDLED, *SHAPES]
    if wrong := [each for each in shapes or [] if each not in known]:
        raise typer.BadParameter(f"no shape {wrong[0]!r}; there are {', '.join(known)}")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"no dtype {dtype!r}; there are float32, bfloat16, float16")
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    usual = ["atlas", "gpt2-small", "gpt2-medium", *(["gpt2-xl"] if where != "cpu" else [])]
    chosen = ["atlas"] if quick else (shapes or usual)
    console.print(
        f"T={LENGTH}, S={SAMPLES}, subject at tokens 2-4, window {WINDOW}, {dtype}, {where}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; plain timed on every "
        f"{EVERY['gpt2-medium']}th cell of gpt2-medium and every {EVERY['gpt2-xl']}th of gpt2-xl"
    )
    console.print(HEADER, markup=False)
    console.print("|---" * HEADER.count(" | ") + "|---|", markup=False)
    for shape in chosen:
        model = build(shape, where, getattr(torch, dtype))
        for kind in ("state", "mlp", "attn"):
            row = measure(shape, model, kind, 1 if quick else rounds)
            task = problem(model, kind)
            todo = task.cells[
                ~is_zero(task.cells, SUBJECT, LENGTH - 1, models.n_layers(model)).to_numpy(bool)
            ]
            lines = lines_of(todo, models.n_layers(model))
            passes = cut_into_passes(model, lines, LENGTH, SAMPLES, 1)
            console.print(show(row, len(passes)), markup=False)
        del model


if __name__ == "__main__":
    typer.run(main)
