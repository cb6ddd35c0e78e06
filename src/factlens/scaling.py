"""`python -m factlens.scaling`: facts per minute, how cost grows, memory at peak, and what a large model would take.

python -m factlens.scaling throughput    # facts of one length together, alone, and one forward per cell
python -m factlens.scaling growth        # seconds and FLOPs against T, L, S and d_model; --figure growth.png
python -m factlens.scaling plan          # GPT-2 XL, GPT-J and NeoX-20B, a thousand facts, from FLOPs and a rate
"""

import contextlib
import ctypes
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import psutil
import torch
import typer

from factlens import models, plots, runs
from factlens.benchmark import build, matrix_rate, needed_flops
from factlens.engines.one_pass import run_together
from factlens.engines.plain import run_plain
from factlens.engines.problems import Problem, Readout
from factlens.facts import bundled_facts
from factlens.knowledge import known_facts
from factlens.models import Model
from factlens.plans import KINDS, plan
from factlens.terminal import print_markdown
from factlens.tokens import TokenizedPrompt
from factlens.tracing import trace

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that its cost depends on, under TransformerLens's names."""

    n_layers: int
    d_model: int
    n_heads: int
    d_vocab: int
    weight_bytes: float
    """Of the whole model, in 2-byte types."""

    @property
    def d_head(self) -> int:
        """Of each head."""
        return self.d_model // self.n_heads

    @property
    def d_mlp(self) -> int:
        """Of the MLP's hidden layer."""
        return 4 * self.d_model


PLANNED = {
    "gpt2-xl": Shape(48, 1600, 25, 50257, 3.1e9),
    "gpt-j-6b": Shape(28, 4096, 16, 50400, 12.1e9),
    "gpt-neox-20b": Shape(44, 6144, 64, 50432, 41.1e9),
}
PEAK_RATES = {"float32": 67e12, "tf32": 494e12, "bfloat16": 989e12}
"""FLOP per second of an H200 by its data sheet, dense."""
LENGTH, SUBJECT, SAMPLES = 12, (2, 6), 10
"""Of a usual prompt of known_1000."""


def cells_of(length: int, subject: tuple[int, int], depth: int, window: int) -> pd.DataFrame:
    """What `factlens average` traces of a fact: three kinds at every token, and both severed curves."""
    ids = torch.zeros(1, length, dtype=torch.long)
    prompt = TokenizedPrompt(ids, tuple("x" * length), subject, 1)
    whole = plan(prompt, depth, windows=(window,))
    cut = plan(prompt, depth, kinds=("state",), severed=("mlp", "attn"))
    return pd.concat([whole, cut[cut["role"] == "last subject"]], ignore_index=True)


def invented_problems(
    model: Model, count: int, length: int, samples: int, kinds: tuple[str, ...]
) -> list[Problem]:
    """Prompts of random tokens, of one length."""
    generator = torch.Generator().manual_seed(1)
    depth, window = models.n_layers(model), max(1, min(10, models.n_layers(model) // 2))
    made = []
    for _ in range(count):
        ids = torch.randint(0, int(models.cfg(model).d_vocab), (1, length), generator=generator)
        prompt = TokenizedPrompt(ids, tuple("x" * length), (2, 5), 1)
        cells = plan(prompt, depth, kinds=kinds, windows=(window,), include_embedding=False)
        shape = (samples, 3, int(models.cfg(model).d_model))
        noise = torch.randn(shape, dtype=torch.float64, generator=generator) * 0.06
        top = int(runs.logits_of(model, ids, keep=1)[0, -1].argmax())
        made.append(Problem(ids, (2, 5), noise, cells, Readout(torch.tensor([top]))))
    return made


@contextlib.contextmanager
def peak_memory() -> Iterator[Callable[[], float]]:
    """The most memory that a `with` block took above what was taken before, in bytes."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield lambda: float(torch.cuda.max_memory_allocated() - before)
        return
    process = psutil.Process()
    with contextlib.suppress(OSError, AttributeError):  # Elsewhere than on glibc.
        ctypes.CDLL("libc.so.6").malloc_trim(
            0
        )  # What was freed and not given back would hide what is taken.
    before, highest, ended = process.memory_info().rss, [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.002):
            highest[0] = max(highest[0], process.memory_info().rss - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: float(highest[0])
    finally:
        ended.set()
        watcher.join()


def timed(run: Callable[[], Any]) -> float:
    """Seconds of a call, the GPU's work included."""
    begun = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def _place(device: str | None, threads: int | None) -> str:
    if threads:
        torch.set_num_threads(threads)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{place}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    return place


Device = Annotated[str | None, typer.Option(help="cpu or cuda.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads.")]


@app.command()
def throughput(
    facts: Annotated[int, typer.Option(help="Known facts of atlas to trace.")] = 96,
    every: Annotated[int, typer.Option(help="Plain is timed on every n-th cell.")] = 16,
    shape: Annotated[
        list[str] | None, typer.Option(help="GPT-2 shapes with random weights besides.")
    ] = None,
    together: Annotated[int, typer.Option(help="Prompts of such a shape that share passes.")] = 4,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Facts per minute, three kinds: sharing passes, each fact alone, and one forward pass per cell."""
    place = _place(device, threads)
    rows = []
    model = build(models.BUNDLED, place, getattr(torch, dtype))
    known = known_facts(model, bundled_facts("held", one_per_fact=True))
    chosen = known[:: max(1, len(known) // facts)][:facts]
    trace(model, chosen[:8])
    shared = timed(lambda: trace(model, chosen)) / len(chosen)
    alone = timed(lambda: [trace(model, fact) for fact in chosen]) / len(chosen)
    few = chosen[:: max(1, len(chosen) // 12)]
    problems = [_problem_of(model, fact) for fact in few]
    some = [replace(p, cells=p.cells.iloc[::every].reset_index(drop=True)) for p in problems]
    plain = every * timed(lambda: [run_plain(model, p) for p in some]) / len(some)
    rows.append(("atlas, real facts", len(chosen), shared, alone, plain))
    for name in shape or []:
        model = build(name, place, getattr(torch, dtype))
        task = invented_problems(model, together, 14, 10, KINDS)
        run_together(model, task[:1])
        shared = timed(lambda m=model, t=task: run_together(m, t)) / together  # type: ignore[misc]
        alone = timed(lambda m=model, t=task: [run_together(m, [p]) for p in t]) / together  # type: ignore[misc]
        part = replace(task[0], cells=task[0].cells.iloc[:: every * 4].reset_index(drop=True))
        plain = every * 4 * timed(lambda m=model, p=part: run_plain(m, p))  # type: ignore[misc]
        rows.append((f"{name}, random weights", together, shared, alone, plain))
    print_markdown(
        pd.DataFrame(
            [
                (name, count, f"{60 / s:.1f}", f"{60 / a:.1f}", f"{60 / p:.2f}", f"{a / s:.2f}x", f"**{p / s:.1f}x**")
                for name, count, s, a, p in rows
            ],
            columns=["model", "facts", "together", "alone", "plain", "together / alone", "together / plain"],
        )
    )  # fmt: skip
    print("\nFacts per minute: states, MLP and attention windows, 10 noise samples.")


def _problem_of(model: Model, fact: Any) -> Problem:
    traced = trace(model, fact)
    ids = torch.tensor([models.tokenizer(model)(fact.prompt)["input_ids"]])
    noise = torch.zeros(
        10, traced.subjects[0][1] - traced.subjects[0][0], int(models.cfg(model).d_model)
    )
    answer = int(runs.logits_of(model, ids, keep=1)[0, -1].argmax())
    return Problem(ids, traced.subjects[0], noise.double() + 0.1, traced.frame, Readout(torch.tensor([answer])))  # fmt: skip


@app.command()
def growth(
    rounds: Annotated[
        int, typer.Option(help="Times each point is measured; the median counts.")
    ] = 3,
    figure: Annotated[Path | None, typer.Option(help="Also draw it: .html, .png, .svg.")] = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Seconds, FLOPs and memory of all three kinds as T, L, S and d_model grow, one at a time."""
    place = _place(device, threads)
    centre = {"T": 14, "L": 8, "S": 10, "d_model": 256}
    points = {"T": (7, 14, 28, 56), "L": (4, 8, 16, 32), "S": (5, 10, 20, 40), "d_model": (128, 256, 512, 1024)}  # fmt: skip
    table = pd.DataFrame(
        [
            _point(name, {**centre, name: value}, rounds, place)
            for name, values in points.items()
            for value in values
        ]
    )
    slopes = {
        name: np.polyfit(np.log(part["value"]), np.log(part["seconds"]), 1)[0]
        for name, part in table.groupby("grows", sort=False)
    }
    print(
        "Around T=14, L=8, S=10, d_model=256, vocabulary 1 000; windows of half the layers, at most 10.\n"
    )
    print_markdown(
        table.assign(
            seconds=table["seconds"].map("{:.3f}".format),
            GFLOP=(table["flops"] / 1e9).map("{:.1f}".format),
            share=table["share"].map("{:.0%}".format),
            MiB=(table["bytes"] / 2**20).map("{:.0f}".format),
        )[["grows", "value", "seconds", "GFLOP", "share", "MiB"]]
    )
    said = ", ".join(f"{name} {slope:.2f}" for name, slope in slopes.items())
    print(f"\nExponents of the time (slope in log-log): {said}")
    if figure is not None:
        print(plots.save(_growth_figure(table), figure))


def _point(name: str, numbers: dict[str, int], rounds: int, place: str) -> dict[str, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=numbers["d_model"],
        n_layer=numbers["L"],
        n_head=max(1, numbers["d_model"] // 64),
        n_positions=128,
        vocab_size=1000,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    hf_model = GPT2LMHeadModel(config).to(place)
    model = models.wrap_model(hf_model, models.tokenizer(models.load_model(device="cpu")), name)
    (task,) = invented_problems(model, 1, numbers["T"], numbers["S"], KINDS)
    with peak_memory() as peak:
        run_together(model, [task])
        taken = peak()
    seconds = statistics.median(timed(lambda: run_together(model, [task])) for _ in range(rounds))
    flops = needed_flops(models.cfg(model), task.cells, (2, 5), numbers["T"], numbers["S"])
    share = flops / statistics.median(matrix_rate(model) for _ in range(3)) / seconds
    value = numbers[name]
    return {"grows": name, "value": value, "seconds": seconds, "flops": flops, "share": share, "bytes": taken}  # fmt: skip


def _growth_figure(table: pd.DataFrame) -> Any:
    import plotly.express as px

    drawn = px.line(
        table, x="value", y="seconds", facet_col="grows", log_x=True, log_y=True, markers=True,
        template="simple_white", labels={"value": "", "seconds": "seconds a fact"}, width=1100, height=340,
    )  # fmt: skip
    drawn.update_xaxes(matches=None, showticklabels=True)
    for note in drawn.layout.annotations:
        note.text = note.text.split("=")[-1]
    for column, (_, part) in enumerate(table.groupby("grows", sort=False), start=1):
        drawn.update_xaxes(
            tickvals=list(part["value"]), ticktext=list(map(str, part["value"])), col=column
        )
    return drawn


@app.command(name="plan")
def plan_command(
    facts: Annotated[int, typer.Option(help="How many.")] = 1000,
    share: Annotated[float, typer.Option(help="Of the peak rate that the engine reaches.")] = 0.4,
    dtype: Annotated[str, typer.Option(help="float32, tf32 or bfloat16.")] = "bfloat16",
    rate: Annotated[
        float | None, typer.Option(help="FLOP per second of your device, instead of an H200's.")
    ] = None,
) -> None:
    """What `factlens average` needs on large models: FLOPs, forward passes saved, hours on one device and on 8."""
    if dtype not in PEAK_RATES:
        raise typer.BadParameter(f"no rate for {dtype!r}; there are {', '.join(PEAK_RATES)}")
    speed = share * (rate or PEAK_RATES[dtype])
    rows = []
    for name, shape in PLANNED.items():
        cells = cells_of(LENGTH, SUBJECT, shape.n_layers, 10)
        flops = needed_flops(shape, cells, SUBJECT, LENGTH, SAMPLES)
        plain = _plain_flops(shape, len(cells))
        seconds = facts * flops / speed
        size = 4 if dtype != "bfloat16" else 2
        rows.append(
            (
                name,
                f"{flops / 1e12:.1f}",
                f"{plain / flops:.1f}x",
                _duration(seconds),
                _duration(seconds / 8),
                _duration(facts * plain / speed),
                f"{shape.weight_bytes * size / 2 / 2**30:.0f}",
                f"{_base_bytes(shape, size) / 2**30:.2f}",
            )
        )
    print(
        f"{facts} facts of {LENGTH} tokens, subject at tokens 2-5, {SAMPLES} samples, windows of 10; {dtype} at "
        f"{speed / 1e12:.0f} TFLOP/s ({share:.0%} of {(rate or PEAK_RATES[dtype]) / 1e12:.0f}).\n"
    )
    columns = ["model", "TFLOP a fact", "plain / one-pass FLOPs", "one device", "8 devices", "plain, one device", "weights, GiB", "base run a fact, GiB"]  # fmt: skip
    print_markdown(pd.DataFrame(rows, columns=columns))


def _plain_flops(shape: Any, cells: int) -> float:
    """One forward pass of 11 rows per cell, all positions and all logits, as the official code runs it."""
    from factlens.engines.passes import block_weights

    token = shape.n_layers * block_weights(shape) + shape.d_model * shape.d_vocab
    return 2.0 * (cells + 2) * (SAMPLES + 1) * LENGTH * token


def _base_bytes(shape: Shape, size: int) -> int:
    """States, MLP and attention outputs, keys and values of one fact's clean and corrupted rows."""
    return (SAMPLES + 1) * LENGTH * shape.n_layers * 6 * shape.d_model * size


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return (
        f"{minutes:.0f} min"
        if minutes < 120
        else f"{minutes / 60:.{0 if math.log10(minutes) > 3 else 1}f} h"
    )


if __name__ == "__main__":
    app()
