"""The engines agree with the paper's code, with each other, with a second implementation, and with their laws."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from builders import FAMILIES
from conftest import ORACLE
from oracles import SlowTracer

from factlens import models, runs
from factlens.engines import one_pass as one_pass_module
from factlens.engines.one_pass import run_one_pass, run_together
from factlens.engines.passes import Line
from factlens.engines.plain import run_plain
from factlens.engines.problems import Problem, Readout
from factlens.plans import plan, window_layers
from factlens.tokens import tokenize
from factlens.tracing import trace

PROMPT, SUBJECT = "x abcd eft", "abcd"
CUTS = ("none", "mlp", "attn", "both")


def problem_of(model, *, windows=(3,), severed=CUTS, more=(), samples=2, scale=1.0, **options):
    """A traced prompt on a small random model; the answer is what the model ranks first.

    `more` are further window widths, unsevered.
    """
    prompt = tokenize(models.tokenizer(model), PROMPT, SUBJECT)
    depth = models.n_layers(model)
    cells = plan(prompt, depth, windows=windows, severed=severed, **options)
    if more:
        others = plan(prompt, depth, kinds=("mlp", "attn"), windows=more)
        cells = pd.concat([cells, others], ignore_index=True)
    shape = (samples, prompt.subject[1] - prompt.subject[0], int(models.cfg(model).d_model))
    noise = torch.from_numpy(np.random.default_rng(3).standard_normal(shape)) * scale
    top = int(runs.logits_of(model, prompt.ids)[0, -1].argmax())
    return Problem(prompt.ids, prompt.subject, noise, cells, Readout(torch.tensor([top])))


def some_cells(problem, share: float):
    """A share of a problem's cells, drawn over the whole grid: their numbers, and the problem of these alone."""
    count = round(share * len(problem.cells))
    drawn = np.sort(np.random.default_rng(0).permutation(len(problem.cells))[:count])
    return drawn, replace(problem, cells=problem.cells.iloc[drawn].reset_index(drop=True))


def assert_engines_agree(model, problem, one_pass=run_one_pass, share: float = 1 / 3):
    """The plain engine takes most of the tests' time, so it runs a share of the cells."""
    drawn, fewer = some_cells(problem, share)
    expected, found = run_plain(model, fewer), one_pass(model, problem)
    prob, logprob = (
        (found.restored[drawn][..., metric] - expected.restored[..., metric]).abs().max()
        for metric in (0, 1)
    )
    assert prob < 1e-5
    assert logprob < 1e-4
    torch.testing.assert_close(found.clean[:2], expected.clean[:2], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.corrupted[:, 0], expected.corrupted[:, 0], atol=1e-5, rtol=0)
    return expected


# -- parity with the paper's code --------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle_arrays():
    return np.load(ORACLE / "tracing.npz", allow_pickle=False)


@pytest.mark.parametrize(
    ("case", "engine"),
    [
        ("c0", "one-pass"),
        ("c1", "one-pass"),
        ("c0", "plain"),
        pytest.param("c1", "plain", marks=pytest.mark.slow),
    ],
)
def test_every_table_of_the_papers_code_is_reproduced(oracle_model, oracle_arrays, case, engine):
    arrays = oracle_arrays
    options = {
        "subject": str(arrays[f"{case}.subject"]),
        "noise": "rome",
        "noise_level": float(arrays["noise_level"]),
        "include_embedding": False,
        "engine": engine,
    }
    prompt = str(arrays[f"{case}.prompt"])
    traced = trace(oracle_model, prompt, window=(1, 3, 4, 5, 10), **options)
    cut = trace(oracle_model, prompt, kinds="state", severed=("mlp", "attn"), **options)
    frame = pd.concat([traced.frame, cut.frame])
    tables = {"states": ("state", 1, "none")}
    for kind in ("mlp", "attn"):
        tables |= {kind: (kind, 10, "none")}
        tables |= {f"{kind}_w{w}": (kind, w, "none") for w in (1, 3, 4, 5)}
        tables |= {f"sev_{kind}_same_noise": ("state", 1, kind)}
    assert traced.engine == engine
    assert traced.frame["prob_clean"].iloc[0] == pytest.approx(
        arrays[f"{case}.high_score"], abs=1e-5
    )
    assert traced.frame["prob_corrupted"].iloc[0] == pytest.approx(
        arrays[f"{case}.low_score"], abs=1e-5
    )
    for name, (kind, window, severed) in tables.items():
        grid = grid_of(frame, kind, window, severed)
        np.testing.assert_allclose(grid, arrays[f"{case}.{name}"], atol=1e-5, err_msg=name)
    shifted = grid_of(frame, "state", 1, "none")[:, ::-1]
    assert np.abs(shifted - arrays[f"{case}.states"]).max() > 0.05, "the check must be able to fail"


def grid_of(frame: pd.DataFrame, kind: str, window: int, severed: str) -> np.ndarray:
    cells = frame[
        (frame["kind"] == kind) & (frame["window"] == window) & (frame["severed"] == severed)
    ]
    return cells.pivot(index="position", columns="layer", values="prob_restored").to_numpy()


def test_the_official_draws_are_repeated_bit_for_bit(oracle_arrays):
    from factlens.corruption import draw

    expected = oracle_arrays["c0.noise_pass1"]
    level = float(oracle_arrays["noise_level"])
    assert np.array_equal(draw("rome", level, expected.shape, seed=0).numpy(), expected)
    assert not np.array_equal(draw("gaussian", level, expected.shape, seed=0).numpy(), expected)


# -- the engines agree -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_equals_plain_for_every_family(family_model, family):
    model = family_model(family)
    share = 1 / 2 if family == "gpt2" else 1 / 6
    expected = assert_engines_agree(model, problem_of(model, more=(1, 10)), share=share)
    probs = expected.restored[..., 0]
    assert probs.max() - probs.min() >= 0.05, "a flat grid would hide a wrong engine"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_traced_by_one_pass_with_prefix_reuse(family_model, family):
    traced = trace(family_model(family), PROMPT, subject=SUBJECT, samples=1, noise_level=1.0)
    assert (traced.engine, traced.prefix_reuse, traced.fallback_reason) == ("one-pass", True, None)


@pytest.mark.parametrize("window", [1, 2, 3, 5])
def test_windows_that_start_together_share_rows_and_still_end_apart(family_model, window):
    model = family_model("gpt2")
    assert_engines_agree(model, problem_of(model, windows=(window,)))


def test_a_multi_token_answer_is_read_at_several_positions(family_model):
    model = family_model("gpt2")
    problem = problem_of(model, windows=(3,))
    answer = torch.tensor([int(problem.readout.answer[0]), 5, 9])
    tokens = torch.cat([problem.tokens, answer[None, :-1]], dim=1)
    assert_engines_agree(model, replace(problem, tokens=tokens, readout=Readout(answer)))


@pytest.mark.parametrize("budget", [1, pytest.param(60_000, marks=pytest.mark.slow), 10**9])
def test_any_cut_into_passes_gives_the_same_numbers(family_model, budget):
    model = family_model("gpt_neox")
    problem = problem_of(model)
    whole, cut = run_one_pass(model, problem), run_one_pass(model, problem, budget=budget)
    torch.testing.assert_close(cut.restored[..., 0], whole.restored[..., 0], atol=1e-6, rtol=0)


def test_the_smallest_budget_really_cuts(family_model):
    from factlens.engines.passes import cut_into_passes, lines_of

    model = family_model("gpt_neox")
    lines = lines_of(problem_of(model).cells, models.n_layers(model))
    counts = [len(cut_into_passes(model, lines, 10, 2, 1, budget)) for budget in (1, 10**9)]
    assert counts[0] > 10 * counts[1]


def test_running_out_of_memory_halves_the_pass_and_goes_on(family_model, monkeypatch):
    model, failed = family_model("gpt2"), []
    problem = problem_of(model, severed=("none",))
    run = one_pass_module._Forks.run

    def once(self):
        if not failed:
            failed.append(len(self.part.lines))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self)

    whole = run_one_pass(model, problem)
    monkeypatch.setattr(one_pass_module._Forks, "run", once)
    again = run_one_pass(model, problem)
    assert failed
    torch.testing.assert_close(again.restored[..., 0], whole.restored[..., 0], atol=1e-6, rtol=0)


def test_other_runtime_errors_are_not_taken_for_memory(family_model, monkeypatch):
    def broken(self):
        raise RuntimeError("a bug")

    monkeypatch.setattr(one_pass_module._Forks, "run", broken)
    model = family_model("gpt2")
    with pytest.raises(RuntimeError, match="a bug"):
        run_one_pass(model, problem_of(model))


@pytest.mark.slow
def test_the_lean_plain_engine_changes_no_number(family_model):
    model = family_model("gptj")
    problem = problem_of(model, windows=(3,), severed=("none", "both"))
    full, lean = run_plain(model, problem), run_plain(model, problem, lean=True)
    torch.testing.assert_close(lean.restored[..., 0], full.restored[..., 0], atol=1e-6, rtol=0)


def test_bfloat16_is_traced_with_softmax_in_float32(family_folder):
    model = models.load_model(family_folder("gpt2"), dtype=torch.bfloat16)
    problem = problem_of(model, windows=(3,), severed=("none",))
    gap = run_one_pass(model, problem).restored[..., 0] - run_plain(model, problem).restored[..., 0]
    assert models.dtype_of(model) == torch.bfloat16
    assert gap.abs().max() < 0.05


# -- mutants: each must fail the test above ----------------------------------------------------------


@pytest.mark.parametrize("step", [-1, 1])
def test_a_fork_one_layer_off_is_caught(family_model, monkeypatch, step):
    state = one_pass_module._Forks._state

    def off(self, route, layer, problems, positions):
        return state(self, route, min(max(0, layer + step), self.depth - 1), problems, positions)

    monkeypatch.setattr(one_pass_module._Forks, "_state", off)
    assert_mutant_fails(family_model("gpt2"))


@pytest.mark.parametrize("step", [-1, 1])
def test_a_fork_one_position_off_is_caught(family_model, monkeypatch, step):
    state = one_pass_module._Forks._state

    def off(self, route, layer, problems, positions):
        return state(self, route, layer, problems, (positions + step).clamp(max=self.length - 1))

    monkeypatch.setattr(one_pass_module._Forks, "_state", off)
    assert_mutant_fails(family_model("gpt2"))


@pytest.mark.parametrize("step", [-1, 1])
def test_a_window_one_layer_off_is_caught(family_model, monkeypatch, step):
    def wrong(self, kind, layer):
        return self.kind == kind and self.first < layer < self.ends[0] + step

    monkeypatch.setattr(Line, "restores", wrong)
    assert_mutant_fails(family_model("gpt2"))


def test_clean_and_corrupted_swapped_is_caught(family_model, monkeypatch):
    swapped = one_pass_module.BaseRun.baseline
    monkeypatch.setattr(one_pass_module.BaseRun, "source", swapped)
    assert_mutant_fails(family_model("gpt2"))


def assert_mutant_fails(model):
    problem = problem_of(model)
    with pytest.raises(AssertionError):
        assert_engines_agree(model, problem)


def test_prefix_reuse_is_counted_not_claimed(family_model, monkeypatch):
    """Without the prefix the numbers are wrong and the answers say that none was reused."""
    model = family_model("gpt2")
    problem = problem_of(model, severed=("none",))
    assert run_one_pass(model, problem).prefix_reuse

    def forgetful(self, layer, keys, values, axis):
        if self.record:
            self.stored[layer] = (keys[: self.record].clone(), values[: self.record].clone())
        return keys, values

    monkeypatch.setattr("factlens.prefixes.KeyValues.update", forgetful)
    assert not run_one_pass(model, problem).prefix_reuse
    assert_mutant_fails(model)


def test_auto_falls_back_to_plain_when_the_engines_disagree(family_folder, monkeypatch):
    swapped = one_pass_module.BaseRun.baseline
    model = models.load_model(family_folder("gpt2"))
    monkeypatch.setattr(one_pass_module.BaseRun, "source", swapped)
    traced = trace(model, PROMPT, subject=SUBJECT, samples=1, noise_level=1.0, kinds="state")
    assert traced.engine == "plain"
    assert "differs from the plain one" in str(traced.fallback_reason)


# -- a second implementation -------------------------------------------------------------------------


@pytest.mark.parametrize("severed", CUTS)
def test_plain_hugging_face_hooks_give_the_same_numbers(family_folder, family_model, severed):
    from transformers import AutoModelForCausalLM

    model = family_model("gpt2")
    problem = problem_of(model, windows=(3,), severed=(severed,), include_embedding=False)
    slow = SlowTracer(
        AutoModelForCausalLM.from_pretrained(family_folder("gpt2")).eval(),
        problem.tokens,
        problem.subject,
        problem.noise,
    )
    found = run_one_pass(model, problem).restored[..., 0].mean(dim=1)
    answer = int(problem.readout.answer[0])
    chosen = range(0, len(problem.cells), 7)
    for number in chosen:
        cell = problem.cells.iloc[number]
        layer, position = int(cell["layer"]), int(cell["position"])
        layers = [layer]
        if cell["kind"] != "state":
            layers = list(window_layers(layer, int(cell["window"]), 4))
        expected = slow.restored(cell["kind"], layers, position, severed, answer)
        assert found[number].item() == pytest.approx(expected, abs=1e-5), dict(cell)


# -- laws --------------------------------------------------------------------------------------------


def test_without_noise_every_run_is_the_clean_run(family_model):
    model = family_model("gemma2")
    answers = run_one_pass(model, problem_of(model, scale=0.0))
    clean = answers.clean[0].expand_as(answers.restored[..., 0])
    torch.testing.assert_close(answers.restored[..., 0], clean, atol=1e-6, rtol=0)
    noisy = run_one_pass(model, problem_of(model, scale=1.0))
    assert (noisy.restored[..., 0] - clean).abs().max() > 0.05, "with noise it must not be"


def test_a_cell_alone_equals_the_cell_in_its_batch(family_model):
    model = family_model("qwen3")
    problem = problem_of(model, windows=(3,))
    together = run_one_pass(model, problem).restored[..., 0]
    for number in range(0, len(problem.cells), 37):
        alone = replace(problem, cells=problem.cells.iloc[[number]].reset_index(drop=True))
        found = run_one_pass(model, alone).restored[0, :, 0]
        torch.testing.assert_close(found, together[number], atol=1e-6, rtol=0)


def test_positions_before_the_subject_have_no_effect_in_the_plain_engine_either(family_model):
    model = family_model("gpt2")
    problem = problem_of(model, windows=(3,))
    plain = run_plain(model, problem)
    before = torch.tensor((problem.cells["position"] < problem.subject[0]).tolist())
    effect = (plain.restored[..., 0] - plain.corrupted[:, 0]).abs()
    assert effect[before].max() < 1e-6
    assert effect[~before].max() > 0.05


# -- several problems share passes -------------------------------------------------------------------


def several(model, **options):
    """Three prompts of one length with their own subjects, noise and answers."""
    made = []
    for prompt, subject, seed in (
        ("x abcd eft", "abcd", 3),
        ("qu bz vwxm", "bz", 4),
        ("mnop q r s", "mnop", 5),
    ):
        tokens = tokenize(models.tokenizer(model), prompt, subject)
        cells = plan(tokens, models.n_layers(model), windows=(3,), severed=CUTS)
        size = (2, tokens.subject[1] - tokens.subject[0], int(models.cfg(model).d_model))
        noise = torch.from_numpy(np.random.default_rng(seed).standard_normal(size))
        top = int(runs.logits_of(model, tokens.ids)[0, -1].argmax())
        made.append(Problem(tokens.ids, tokens.subject, noise, cells, Readout(torch.tensor([top]))))
    return [replace(each, **options) for each in made]


# The direct effect shares everything with the indirect one but the rows it starts from: two families say enough.
@pytest.mark.parametrize(
    ("family", "direct"),
    [
        ("gpt2", False),
        ("gemma2", False),
        ("gemma2", True),
        *(
            pytest.param(family, direct, marks=pytest.mark.slow)
            for family, direct in (
                ("gptj", False),
                ("opt", False),
                ("qwen3", False),
                ("gpt2", True),
            )
        ),
    ],
)
def test_problems_traced_together_are_each_traced_alone(family_model, family, direct):
    model = family_model(family)
    problems = several(model, direct=direct)
    together = run_together(model, problems)
    for problem, found in zip(problems, together, strict=True):
        drawn, fewer = some_cells(problem, 1 / 10)
        alone = run_plain(model, fewer)
        torch.testing.assert_close(
            found.restored[drawn][..., :2], alone.restored[..., :2], atol=1e-4, rtol=0
        )
        torch.testing.assert_close(found.corrupted[:, 0], alone.corrupted[:, 0], atol=1e-5, rtol=0)
    gap = (
        together[0].restored[..., 0] - together[1].restored[: len(problems[0].cells), :, 0]
    ).abs()
    assert gap.max() > 0.05, "the problems must differ, or mixing them up would not show"


def test_rows_of_another_problem_are_caught(family_model, monkeypatch):
    monkeypatch.setattr(
        "factlens.engines.one_pass.problems_of",
        lambda lines, device: torch.zeros(len(lines), dtype=torch.long),
    )
    model = family_model("gpt2")
    problems = several(model)
    found = run_together(model, problems)[1]
    gap = found.restored[..., 0] - run_plain(model, problems[1]).restored[..., 0]
    assert gap.abs().max() > 0.01


def test_problems_too_large_to_share_are_traced_in_halves(family_model, monkeypatch):
    model, sizes = family_model("gpt2"), []
    problems = several(model)
    whole = run_together(model, problems)
    base = one_pass_module.run_base

    def small_memory(model, problems):
        sizes.append(len(problems))
        if len(problems) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return base(model, problems)

    monkeypatch.setattr(one_pass_module, "run_base", small_memory)
    halves = run_together(model, problems)
    assert sizes[0] == 3
    assert sizes.count(1) == 3
    for one, other in zip(whole, halves, strict=True):
        torch.testing.assert_close(one.restored[..., 0], other.restored[..., 0], atol=1e-6, rtol=0)


# -- direct effects ----------------------------------------------------------------------------------


def test_holding_the_last_state_leaves_nothing_and_an_early_position_everything(family_model):
    """Closed forms: nothing flows past the last state; what holds no noise is the clean run."""
    model = family_model("gpt2")
    problem = replace(problem_of(model, severed=("none",)), direct=True)
    answers = run_one_pass(model, problem)
    cells = problem.cells
    last = (cells["kind"] == "state") & (cells["layer"] == 3) & (cells["position"] == 9)
    before = cells["position"] < problem.subject[0]
    held = answers.restored[torch.tensor(last.tolist())][..., 0]
    torch.testing.assert_close(held[0], answers.corrupted[:, 0], atol=1e-6, rtol=0)
    free = answers.restored[torch.tensor(before.tolist())][..., 0]
    torch.testing.assert_close(free, answers.clean[0].expand_as(free), atol=1e-6, rtol=0)
    assert (held - answers.clean[0]).abs().max() > 0.05
