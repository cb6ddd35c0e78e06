"""Runs that begin at the changed output equal whole runs, gradients included, whatever the family."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from builders import FAMILIES

from factlens import models
from factlens.tails import Reads, adds_to_stream, cut_tails, run_tails, run_whole

LENGTHS, LOOKUPS = (9, 14, 6, 17), (4, 6, 0, 9)
READS = Reads(torch.tensor([0, 0, 1, 2, 2, 3]), torch.tensor([4, 8, 13, 0, 5, 16]))


def ragged(model, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    vocabulary = int(models.cfg(model).d_vocab)
    return [torch.randint(0, vocabulary, (n,), generator=generator) for n in LENGTHS]


def shifts_for(model, size: float = 3.0):
    generator = torch.Generator().manual_seed(1)
    return size * torch.randn(4, int(models.cfg(model).d_model), generator=generator)


def whole(model, layer, rows, shifts, reads=READS):
    """Row by row, without any padding."""
    found = []
    for row, position in zip(reads.rows.tolist(), reads.positions.tolist(), strict=True):
        at = torch.tensor([LOOKUPS[row]])
        logits = run_whole(model, layer, [rows[row]], at, shifts[row : row + 1])
        found.append(logits[0, position])
    return torch.stack(found)


def assert_tails_agree(model, layer):
    """Values and gradients, for a shift that matters."""
    rows, shifts = ragged(model), shifts_for(model)
    cut = cut_tails(model, layer, rows, LOOKUPS, READS)
    ours, theirs = shifts.clone().requires_grad_(), shifts.clone().requires_grad_()
    found = run_tails(model, cut, ours, torch.arange(4), READS).log_softmax(-1)
    wanted = whole(model, layer, rows, theirs).log_softmax(-1)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    found[:, 5].sum().backward()
    wanted[:, 5].sum().backward()
    assert (ours.grad - theirs.grad).norm() < 1e-4 * theirs.grad.norm()
    assert (found - cut.clean.log_softmax(-1)).abs().max() > 0.5  # The shift is seen.


@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shortened_run_is_the_whole_run(family_model, family, layer):
    assert_tails_agree(family_model(family), layer)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt"])
def test_some_of_the_rows_in_any_order_give_their_own_logits(family_model, family):
    model = family_model(family)
    rows, shifts = ragged(model), shifts_for(model)
    cut = cut_tails(model, 1, rows, LOOKUPS, READS)
    chosen = torch.tensor([3, 1])
    reads = Reads(torch.tensor([1, 0]), torch.tensor([13, 16]))
    found = run_tails(model, cut, shifts[chosen], chosen, reads)
    wanted = whole(model, 1, rows, shifts)[[2, 5]]
    torch.testing.assert_close(found.log_softmax(-1), wanted.log_softmax(-1), atol=1e-4, rtol=0)


def test_only_where_a_norm_follows_must_the_layer_itself_run_again(family_model):
    adds = {family: adds_to_stream(family_model(family), 1) for family in FAMILIES}
    assert adds == {family: family != "gemma2" for family in FAMILIES}


MUTANTS = {
    "without the prefix": lambda cut: replace(
        cut, mask=cut.mask & (torch.arange(cut.mask.shape[1]) >= cut.prefix.start)
    ),
    "at other positions": lambda cut: replace(cut, lookups=cut.lookups + 1),
    "begun a block too high": lambda cut: replace(cut, start=cut.start + 1),
    "rows exchanged": lambda cut: replace(cut, stream=cut.stream.flip(0)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_comparison_can_fail(family_model, mutant):
    model = family_model("gpt_neox")  # Rotary: it minds where its tokens stand.
    rows, shifts = ragged(model), shifts_for(model)
    exact = cut_tails(model, 1, rows, LOOKUPS, READS)
    cut = MUTANTS[mutant](exact)
    moved = cut.lookups[READS.rows] - exact.lookups[READS.rows]
    reads = Reads(READS.rows, READS.positions + moved)  # The same tokens all the same.
    found = run_tails(model, cut, shifts, torch.arange(4), reads).log_softmax(-1)
    wanted = whole(model, 1, rows, shifts).log_softmax(-1)
    assert (found - wanted).abs().max() > 1e-2


def test_the_blocks_are_as_they_were_afterwards_also_after_an_error(family_model):
    model = family_model("gpt2")
    rows, shifts = ragged(model), shifts_for(model)
    before = whole(model, 1, rows, shifts * 0)
    cut = cut_tails(model, 1, rows, LOOKUPS, READS)
    with pytest.raises(IndexError):
        run_tails(model, cut, shifts, torch.arange(4), Reads(READS.rows, READS.positions + 90))
    torch.testing.assert_close(whole(model, 1, rows, shifts * 0), before)
