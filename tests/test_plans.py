"""Windows are the official code's, cells are complete, and what is said to be zero is."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from factlens.engines.passes import Line, Pass, lines_of
from factlens.errors import PlanError
from factlens.plans import plan, window_layers
from factlens.tokens import TokenizedPrompt

PROMPT = TokenizedPrompt(torch.zeros(1, 6, dtype=torch.long), tuple("abcdef"), (1, 3), 1)


@given(st.integers(0, 47), st.integers(1, 60), st.integers(1, 48))
def test_windows_are_those_of_the_papers_code(layer, window, depth):
    layer %= depth
    expected = list(range(max(0, layer - window // 2), min(depth, layer - (-window // 2))))
    assert list(window_layers(layer, window, depth)) == expected
    assert len(expected) <= window
    assert layer in expected
    assert math.ceil(window / 2) == -(-window // 2)


def test_ten_layers_around_17_are_12_to_21():
    assert list(window_layers(17, 10, 48)) == list(range(12, 22))


def test_a_plan_has_every_cell_and_one_embedding_column():
    cells = plan(PROMPT, 4, windows=(1, 3), severed=("none", "mlp"))
    assert len(cells) == 6 * 2 * (5 + 2 * 2 * 4)
    assert not cells.duplicated().any()
    states = cells[cells["kind"] == "state"]
    assert set(states["layer"]) == {-1, 0, 1, 2, 3}
    assert set(states["window"]) == {1}
    assert -1 not in set(plan(PROMPT, 4, include_embedding=False)["layer"])


@given(st.integers(1, 12), st.lists(st.integers(1, 14), min_size=1, max_size=3, unique=True))
def test_every_cell_is_answered_by_exactly_one_line(depth, windows):
    cells = plan(PROMPT, depth, windows=windows, severed=("none", "both"))
    lines = lines_of(cells, depth)
    answered = sorted(row for line in lines for row in line.rows_of_cells)
    assert answered == list(range(len(cells)))
    for line in lines:
        for end, row in zip(line.ends, line.rows_of_cells, strict=True):
            cell = cells.iloc[row]
            layer, window = int(cell["layer"]), int(cell["window"])
            span = window_layers(layer, window, depth)
            if cell["kind"] != "state":
                assert (line.first, end) == (span.start, span.stop)
            assert line.position == cell["position"]


def test_a_shared_line_splits_where_its_first_window_ends():
    line = Line("mlp", "none", 2, 0, (2, 2, 4), (7, 8, 9))
    assert line.split_at(0) is None
    ended, others = line.split_at(1) or (None, None)
    assert ended == Line("mlp", "none", 2, 0, (2, 2), (7, 8))
    assert others == Line("mlp", "none", 2, 0, (4,), (9,))
    assert ended.split_at(1) is None
    assert Pass(2, (line,)).halves() == []
    assert [line.restores("mlp", layer) for layer in range(3)] == [False, True, False]
    assert [others.restores("mlp", layer) for layer in range(5)] == [False, True, True, True, False]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kinds": ("neuron",)}, "state, mlp, attn"),
        ({"kinds": ()}, "nothing to trace"),
        ({"severed": ("x",)}, "none, mlp, attn, both"),
        ({"windows": (0,)}, "number of layers"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(options, words):
    with pytest.raises(PlanError, match=words):
        plan(PROMPT, 4, **options)
