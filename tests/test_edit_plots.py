"""Figures of edits show the numbers that they were given, name what they show, and escape what comes from data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from factlens import edit_plots, trace
from factlens.editors.rome import choose_value
from factlens.errors import FactError, PlanError
from factlens.facts import Rewrite

PROMPT, SUBJECT = "The Eiffel Tower is located in the city of", "The Eiffel Tower"
BAD = "<img src=x onerror=alert(1)>"
ESCAPED = "&lt;img src=x onerror=alert(1)&gt;"


@pytest.fixture(scope="module")
def traced(atlas):
    return trace(atlas, PROMPT, subject=SUBJECT, kinds=("state", "mlp"), window=(1, 3), samples=1)


@pytest.fixture(scope="module")
def value(atlas):
    plan = {"steps": 4, "contexts": ["{}"]}
    return choose_value(atlas, Rewrite(PROMPT, SUBJECT, "Rome"), plan)


def moved(traced, by):
    """The same trace with other effects."""
    return replace(traced, frame=traced.frame.assign(effect=traced.frame["effect"] + by))


# -- losses ----------------------------------------------------------------------------------------


def test_losses_draws_each_term_and_the_norm(value):
    figure = edit_plots.losses(value)
    drawn = {line.name: line for line in figure.data}
    assert len(drawn) == 5
    for column, name in [("loss", "loss (their sum)"), ("kl", "KL from the model before"), ("norm", "‖δ‖")]:  # fmt: skip
        assert list(drawn[name].y) == list(value.losses[column])
    terms = [line.y for line in figure.data if line.name not in ("‖δ‖", "loss (their sum)")]
    assert np.sum(terms, axis=0) == pytest.approx(value.losses["loss"], rel=1e-5)
    assert {line.xaxis for line in figure.data if line.name != "‖δ‖"} == {"x"}
    assert drawn["‖δ‖"].xaxis == "x2"
    assert PROMPT in figure.layout.title.text


def test_losses_of_a_frame_are_those_of_its_value(value):
    one, two = edit_plots.losses(value), edit_plots.losses(value.losses)
    assert [list(line.y) for line in one.data] == [list(line.y) for line in two.data]


def test_losses_refuses_another_frame(value):
    with pytest.raises(PlanError, match="no column kl"):
        edit_plots.losses(value.losses.drop(columns="kl"))
    with pytest.raises(PlanError, match="no step"):
        edit_plots.losses(value.losses.head(0))


# -- matrix and ranking ----------------------------------------------------------------------------


def square(names, values):
    return pd.DataFrame(values, index=names, columns=names)


def test_a_matrix_is_white_at_0_and_keeps_its_order():
    figure = edit_plots.matrix(square(["a", "b"], [[1.0, -0.25], [0.5, 1.0]]))
    (cells,) = figure.data
    assert np.array_equal(cells.z, [[1.0, -0.25], [0.5, 1.0]])
    assert (cells.zmin, cells.zmax) == (-1, 1)
    assert list(figure.layout.yaxis.ticktext) == list(figure.layout.xaxis.ticktext) == ["a", "b"]
    assert figure.layout.yaxis.autorange == "reversed"
    assert "0.5000" in cells.text[1][0]
    assert "<b>b</b>, a" in cells.text[1][0]


def test_a_matrix_has_its_numbers_in_its_cells_while_they_can_be_read():
    small, large = (square(list(range(n)), np.eye(n)) for n in (12, 13))
    assert edit_plots.matrix(small).data[0].texttemplate
    assert not edit_plots.matrix(large).data[0].texttemplate


@pytest.mark.parametrize("frame", [pd.DataFrame(), pd.DataFrame([[1.0, 2.0]])])
def test_what_is_not_square_is_no_matrix(frame):
    with pytest.raises(PlanError, match="as many rows as columns"):
        edit_plots.matrix(frame)


def test_a_ranking_keeps_tokens_apart_that_look_the_same():
    frame = pd.DataFrame({"token": [" Rome", "Rome", "\n", " "], "before": [0.1, 0.2, 0.3, 0.4]})
    figure = edit_plots.ranking(frame.assign(after=frame["before"] / 2))
    before, after = figure.data
    assert list(before.y) == list(after.y) == [0, 1, 2, 3]
    assert list(before.x) == [0.1, 0.2, 0.3, 0.4]
    assert list(after.x) == [0.05, 0.1, 0.15, 0.2]
    assert list(figure.layout.yaxis.ticktext) == ["Rome", "Rome", "↵", "␣"]


def test_a_ranking_refuses_another_frame():
    frame = pd.DataFrame({"token": ["a"], "before": [0.1]})
    with pytest.raises(PlanError, match="no column after"):
        edit_plots.ranking(frame)
    with pytest.raises(PlanError, match="nothing to rank"):
        edit_plots.ranking(frame.assign(after=0.1).head(0))


# -- before and after ------------------------------------------------------------------------------


def drawn_cells(figure, axis):
    """The numbers of one panel, the embedding's column first."""
    return np.hstack([grid.z for grid in figure.data if grid.xaxis == axis])


def test_compared_draws_both_traces_and_their_difference(traced):
    after = moved(traced, 0.25)
    figure = edit_plots.compared(traced, after)
    states = traced.frame[traced.frame["kind"] == "state"]
    wanted = states.pivot(index="position", columns="layer", values="effect").to_numpy()
    before_panel, after_panel, difference = (drawn_cells(figure, axis) for axis in ("x", "x2", "x3"))  # fmt: skip
    assert before_panel == pytest.approx(wanted)
    assert after_panel == pytest.approx(wanted + 0.25)
    assert difference == pytest.approx(np.full_like(wanted, 0.25))
    scales = {grid.xaxis: (grid.zmin, grid.zmax) for grid in figure.data}
    assert scales["x"] == scales["x2"] == (0, pytest.approx(wanted.max() + 0.25))
    assert scales["x3"] == (pytest.approx(-0.25), pytest.approx(0.25))
    assert figure.layout.yaxis.ticktext[0] == "The*"


def test_compared_names_both_answers_and_keeps_its_kind_and_window(traced):
    after = replace(traced, answers=(" Rome",))
    figure = edit_plots.compared(traced, after, "mlp", window=3)
    titles = [each.text for each in figure.layout.annotations]
    assert titles == ["before: p(Paris)", "after: p(Rome)", "difference: after - before"]
    assert "MLP outputs, 3 layers" in figure.layout.title.text
    (one,) = {tuple(grid.colorscale[-1]) for grid in figure.data if grid.xaxis == "x"}
    (two,) = {tuple(grid.colorscale[-1]) for grid in figure.data if grid.xaxis == "x3"}
    assert one != two


def test_compared_refuses_what_is_not_there(traced):
    with pytest.raises(PlanError, match="no kind attn"):
        edit_plots.compared(traced, traced, "attn")
    with pytest.raises(PlanError, match="no window 5"):
        edit_plots.compared(traced, traced, "mlp", window=5)
    with pytest.raises(FactError, match="no fact 1"):
        edit_plots.compared(traced, traced, fact=1)


def test_compared_takes_the_strongest_head_of_each_cell(traced):
    heads = pd.concat(
        [
            traced.frame.assign(head=n, effect=traced.frame["effect"] * scale)
            for n, scale in enumerate((0.5, 1.0))
        ]
    )
    figure = edit_plots.compared(replace(traced, frame=heads), replace(traced, frame=heads))
    states = traced.frame[traced.frame["kind"] == "state"]
    wanted = states.pivot(index="position", columns="layer", values="effect").to_numpy()
    assert drawn_cells(figure, "x") == pytest.approx(np.maximum(wanted, wanted / 2))
    assert drawn_cells(figure, "x3") == pytest.approx(np.zeros_like(wanted))


def test_labels_from_data_are_text(traced, value):
    frame = pd.DataFrame({"token": [BAD], "before": [0.5], "after": [0.5]})
    bad_trace = replace(
        traced,
        facts=(replace(traced.facts[0], prompt=BAD),),
        answers=(BAD,),
        frame=traced.frame.assign(token=BAD),
    )
    rewrite = Rewrite(f"{BAD} is", BAD, BAD)
    bad_value = replace(value, question=replace(value.question, rewrite=rewrite))
    for figure in (
        edit_plots.ranking(frame, measured=BAD),
        edit_plots.matrix(square([BAD], [[1.0]]), measured=BAD),
        edit_plots.compared(bad_trace, bad_trace),
        edit_plots.losses(bad_value),
    ):
        written = figure.to_json(engine="json")
        decoded = written.replace("\\u003c", "<").replace("\\u003e", ">").replace("\\u0026", "&")
        assert ESCAPED in decoded
        assert BAD not in decoded
