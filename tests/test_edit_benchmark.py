"""The benchmark's straightforward way finds our value, its FLOPs are those that torch counts, and its tables are whole."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from builders import FAMILIES
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from factlens import Rewrite, edit_benchmark, models
from factlens.editors.questions import Question, question
from factlens.editors.rome_config import ROMEConfig
from factlens.editors.values import optimise
from factlens.engines.passes import block_weights

CONFIG = ROMEConfig(layer=1, steps=5, stop_loss=0.0, contexts=("{}", "It was so. {}"))
REWRITE = Rewrite("Mount Olga is in", "Mount Olga", "abc")


def asked(lookup: int = 3, rows: int = 4, length: int = 9) -> Question:
    """Rows of one length, so that nothing is padded."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 90, (rows, length), generator=generator)
    starts = (*[length - 1] * (rows - 1), lookup)
    places = (lookup,) * rows
    return Question(REWRITE, tuple(ids), places, tuple(range(rows - 1)), ids[0, :1], starts)


def test_the_straightforward_way_finds_our_key_and_value(family_model, family_folder):
    model = family_model("gpt2")
    plain = AutoModelForCausalLM.from_pretrained(family_folder("gpt2")).eval()
    rows = question(model, REWRITE, CONFIG.contexts)
    (ours,) = optimise(model, [rows], CONFIG)
    key, value = edit_benchmark.straightforward(plain, rows, CONFIG)
    torch.testing.assert_close(ours.key, key, rtol=1e-4, atol=1e-5)
    assert (ours.vector - value).norm() < 1e-3 * value.norm()
    assert ours.shift.norm() > 0.1 * value.norm()
    for wrong in ({"kl_weight": 0.3}, {"weight_decay": 5.0}, {"layer": 2}, {"steps": 4}):
        (other,) = optimise(model, [rows], replace(CONFIG, **wrong))
        assert (other.vector - value).norm() > 1e-3 * value.norm()


@pytest.mark.parametrize(("layer", "lookup"), [(0, 3), (1, 3), (2, 6), (3, 3)])
def test_needed_flops_are_what_torch_counts(family_model, layer, lookup):
    """All that is run twice is the first step, and two tokens to see how the output joins the stream."""
    model, rows, steps = family_model("gpt2"), asked(lookup), 5
    config = models.cfg(model)
    with FlopCounterMode(display=False) as counter:
        optimise(model, [rows], replace(CONFIG, layer=layer, steps=steps), engine="tails")
    counted = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counted.items() if op.__name__.split(".")[0] in ("addmm", "mm"))

    def needed(steps: int) -> float:
        return edit_benchmark.needed_flops(config, rows, layer, steps)

    above = (needed(2) - needed(1)) / 2
    trial = 2 * 2 * 2 * (config.n_layers * block_weights(config) + config.d_model * config.d_vocab)
    assert products == needed(steps) + above + trial


def test_needed_flops_grow_with_what_is_run():
    numbers = {"n_layers": 4, "d_model": 8, "d_head": 4, "n_heads": 2, "d_mlp": 32, "d_vocab": 90}

    def of(rows: Question, layer: int = 1, steps: int = 5, **changes: int) -> float:
        config = SimpleNamespace(**{**numbers, **changes})
        return edit_benchmark.needed_flops(config, rows, layer, steps)

    some, more, earlier = asked(), asked(rows=5), asked(lookup=1)
    assert of(some, 3) < of(some, 2) < of(some, 1) < of(some, 0) < of(earlier, 0)
    assert of(some, steps=1) < of(some) < of(some, d_vocab=91) < of(more, d_vocab=91)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_blocks_mlp_sees_the_positions_that_are_read(family_model, family):
    model, rows = family_model(family), asked()
    seen: list[int] = []
    handle = models.output_module(model, 3).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape[:-1].numel())
    )
    try:
        optimise(model, [rows], replace(CONFIG, steps=3), engine="tails")
    finally:
        handle.remove()
    read, suffix = 4, 4 * 6
    # Two runs of two tokens come first; OPT's MLP has no input of its own.
    assert seen[2:] == [4 * 9, *[suffix] * 3] if family == "opt" else seen[2:] == [read] * 4


def test_the_questions_are_of_the_size_that_is_told(atlas):
    rewrites = edit_benchmark.rewrites(atlas, 16)
    assert len({rewrite.subject for rewrite in rewrites}) == 16
    for rewrite in rewrites:
        rows = question(atlas, rewrite, edit_benchmark.contexts())
        assert list(map(len, rows.rows[:-1])) == [12, *[17] * 10, *[22] * 10]
        assert (rows.lookups[0], len(rows.target)) == (4, 1)


def test_the_table_is_printed_whole(monkeypatch):
    monkeypatch.setattr(edit_benchmark, "STEPS", 2)
    monkeypatch.setattr(edit_benchmark, "TOGETHER", {"atlas": 2})
    monkeypatch.setattr(edit_benchmark, "STATISTICS_TOKENS", {"atlas": 256})
    app = edit_benchmark.typer.Typer()
    app.command()(edit_benchmark.main)
    told = CliRunner().invoke(app, ["--quick", "--device", "cpu"])
    assert told.exit_code == 0, told.output
    tables = [line for line in told.stdout.splitlines() if line.startswith("|")]
    counts = [line.count("|") for line in tables]
    assert counts == [13] * 3 + [8] * 3
    assert re.search(r"\| atlas \| 1 \| .*\d\.\dx.*\| \de-0[5-9] \|$", tables[2])
    refused = CliRunner().invoke(app, ["--shape", "gpt5"])
    assert refused.exit_code == 2
    assert "gpt2-medium" in refused.output


def test_rows_say_shares_and_ratios():
    row = edit_benchmark.Row("tiny", 1, 16, 9.0, 3.0, 1.5, 3.2, 6e9, 4e9, 1e-6)
    assert row.share == 0.5
    shown = edit_benchmark.show(row)
    assert "**3.0x**" in shown
    assert "**2.00x**" in shown
    assert "| 50% | 1e-06 |" in shown
    found = pd.DataFrame(
        {"tokens_per_second": [9.0, 3.0], "layers": 4, "tokens": 99, "difference": 0.0}
    )
    assert "**3.0x**" in edit_benchmark.show_statistics("tiny", found)
