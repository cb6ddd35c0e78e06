"""The FLOPs that plans and benchmarks count are those that torch counts, and the commands print their tables."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from factlens import models
from factlens.benchmark import needed_flops
from factlens.engines import passes
from factlens.engines.one_pass import run_one_pass
from factlens.scaling import Shape, app, cells_of, invented_problems, peak_memory


@pytest.mark.parametrize("kind", ["state", "mlp"])
def test_needed_flops_are_what_torch_counts(family_model, monkeypatch, kind):
    """Matrix products with weights; the engine is told that starting a block is free, so it joins no positions."""
    model = family_model("gpt2")
    monkeypatch.setattr(passes, "_overhead", lambda model: 0.0)
    (task,) = invented_problems(model, 1, 9, 3, (kind,))
    with FlopCounterMode(display=False) as counter:
        run_one_pass(model, task)
    counted = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counted.items() if op.__name__.split(".")[0] in ("addmm", "mm"))
    expected = needed_flops(models.cfg(model), task.cells, (2, 5), 9, 3)
    assert products == pytest.approx(expected, rel=0.06)
    assert needed_flops(models.cfg(model), task.cells, (2, 5), 10, 3) > 1.06 * expected


def test_a_shape_costs_what_its_model_costs(family_model):
    config = models.cfg(family_model("gpt2"))
    shape = Shape(config.n_layers, config.d_model, config.n_heads, config.d_vocab, 0.0)
    cells = cells_of(9, (2, 5), 4, 2)
    assert needed_flops(shape, cells, (2, 5), 9, 3) == needed_flops(config, cells, (2, 5), 9, 3)
    parts = SimpleNamespace(**{**vars(shape), "d_head": 8, "d_mlp": 1, "n_layers": 4})
    assert needed_flops(parts, cells, (2, 5), 9, 3) < needed_flops(config, cells, (2, 5), 9, 3)


def test_a_run_of_averages_traces_three_kinds_and_cuts_at_one_token():
    cells = cells_of(9, (2, 5), 4, 2)
    assert len(cells) == 9 * (5 + 4 + 4) + 2 * 5
    assert set(cells[cells["severed"] != "none"]["position"]) == {4}


def test_peak_memory_sees_what_is_taken_and_given_back():
    with peak_memory() as peak:
        block = np.ones(60_000_000)
        torch.tensor([block.sum()])
        del block
        import time

        time.sleep(0.02)
    assert 400e6 < peak() < 700e6


def test_the_plan_is_printed_for_every_large_model():
    found = CliRunner().invoke(app, ["plan", "--facts", "10"])
    assert found.exit_code == 0
    rows = [line for line in found.output.splitlines() if line.startswith("| gpt")]
    assert len(rows) == 3
    half = CliRunner().invoke(app, ["plan", "--facts", "10", "--share", "0.2"]).output
    assert half != found.output
    assert CliRunner().invoke(app, ["plan", "--dtype", "int3"]).exit_code != 0
