"""Figures hold a frame's numbers exactly, refuse what it does not hold, and show text from data as text."""

import base64
import json
import re
import shutil
import struct
import sys
import zlib
from collections import defaultdict

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from factlens import Fact, average_plots, images, plots, scatter_plots, trace
from factlens.errors import OutputError, PlanError
from factlens.tokens import ROLES
from factlens.traces import Trace

KINDS = {"state": (1,), "mlp": (1, 3), "attn": (1, 3)}
LAYERS = range(4)
FACTS = [
    Fact("The Space Needle is located in the city of", "The Space Needle", "Seattle"),
    Fact("The Eiffel Tower is located in the city of", "The Eiffel Tower", "Paris"),
    Fact("The capital of France is", "France", "Paris"),
]
EVIL = "<i>owned</i>&amp;<script>alert(1)</script>"
needs_browser = pytest.mark.skipif(
    shutil.which("chromium") is None, reason="needs Debian's chromium"
)


def averaged(seed=0, **more):
    """An averaged frame of every kind, window, severing, layer and role, in no order; all numbers differ."""
    cells = [
        (kind, window, cut, layer, role)
        for kind, windows in KINDS.items()
        for window in windows
        for cut in ("none", "mlp", "attn")
        for layer in ([-1, *LAYERS] if kind == "state" else LAYERS)
        for role in ROLES
    ]
    draws = np.random.default_rng(seed)
    frame = pd.DataFrame(cells, columns=["kind", "window", "severed", "layer", "role"])
    aie = draws.normal(0.1, 0.2, len(frame))
    margin = draws.uniform(0.01, 0.1, len(frame))
    frame = frame.assign(
        aie=aie, se=margin / 1.96, low=aie - margin, high=aie + 2 * margin, n_facts=40, **more
    )
    return frame.sample(frac=1, random_state=seed).reset_index(drop=True)


@pytest.fixture(scope="module")
def aie():
    return averaged()


@pytest.fixture(scope="module")
def traced(atlas):
    return trace(atlas, FACTS, samples=2, severed=("none", "mlp"), window=3)


def expected(aie, kind, window=1, cut="none", value="aie", roles=ROLES[1:]):
    """Role x layer by looking each cell up, one at a time."""
    found = {
        (row.kind, row.window, row.severed, row.layer, row.role): getattr(row, value)
        for row in aie.itertuples()
    }
    return np.array([[found[kind, window, cut, layer, role] for layer in LAYERS] for role in roles])


def texts_of(figure):
    """Every text of a figure, its arrays included."""

    def walk(part):
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict):
            for each in part.values():
                yield from walk(each)
        elif isinstance(part, list):
            for each in part:
                yield from walk(each)

    shown = json.loads(figure.to_json())
    shown["layout"].pop("template")
    return list(walk(shown))


def titles_of(figure):
    return [note.text for note in figure.layout.annotations]


# -- Figure 2 --------------------------------------------------------------------------------------


def test_the_heatmap_holds_every_average_exactly_with_roles_in_the_papers_order(aie):
    figure = plots.heatmap(aie)
    assert len(figure.data) == 3
    for grid, kind in zip(figure.data, ("state", "mlp", "attn"), strict=True):
        assert np.array_equal(grid.z, expected(aie, kind, grid_window(aie, kind)))
    assert list(figure.layout.yaxis.ticktext) == list(ROLES[1:])
    assert figure.layout.yaxis.autorange == "reversed"
    assert [grid.colorscale[-1][1] for grid in figure.data] == [
        "rgb(63,0,125)",
        "rgb(0,68,27)",
        "rgb(103,0,13)",
    ]


def grid_window(aie, kind):
    """The first window of a kind's ordinary rows, as they stand in the frame."""
    rows = aie[(aie["kind"] == kind) & (aie["severed"] == "none") & (aie["layer"] >= 0)]
    return rows[rows["role"] != ROLES[0]]["window"].iloc[0]


def test_colours_start_at_zero_and_negative_averages_keep_their_value(aie):
    for grid in plots.heatmap(aie, window=3).data:
        z = np.array(grid.z)
        assert z.min() < 0, "the frame has negative averages, so the scale must cut something"
        assert (grid.zmin, grid.zmax) == (0.0, z.max())
    own, shared = plots.heatmap(aie), plots.heatmap(aie, shared_scale=True)
    assert len({grid.zmax for grid in own.data}) == 3
    assert {grid.zmax for grid in shared.data} == {max(grid.zmax for grid in own.data)}


def test_hover_gives_the_average_its_interval_and_how_many_facts(aie):
    figure = plots.heatmap(aie, kinds="state")
    row = aie.query("kind == 'state' and severed == 'none' and layer == 2 and role == 'further'")
    text = figure.data[0].text[ROLES[1:].index("further")][2]
    for value in ("aie", "low", "high"):
        assert f"{row[value].iloc[0]:+.4f}" in text
    assert "further" in text
    assert "layer 2" in text
    assert "40 facts" in text


def test_the_embedding_is_left_out_or_drawn_apart(aie):
    assert len(plots.heatmap(aie, kinds=["state"]).data) == 1
    figure = plots.heatmap(aie, kinds=["state"], include_embedding=True)
    embedding, blocks = figure.data
    assert max(embedding.x) < min(blocks.x)
    assert (embedding.zmin, embedding.zmax) == (blocks.zmin, blocks.zmax)
    row = aie.query("kind == 'state' and severed == 'none' and layer == -1 and role == 'last'")
    assert embedding.z[-1][0] == row["aie"].iloc[0]
    assert "emb" in figure.layout.xaxis.ticktext


def test_window_and_severing_choose_the_panels_and_stand_in_the_titles(aie):
    figure = plots.heatmap(aie, window=3, severed="mlp", ate=0.25)
    assert np.array_equal(figure.data[0].z, expected(aie, "state", 1, "mlp"))
    assert np.array_equal(figure.data[1].z, expected(aie, "mlp", 3, "mlp"))
    assert titles_of(figure) == [
        "restoring a single state",
        "restoring MLP outputs, 3 layers",
        "restoring attention outputs, 3 layers",
    ]
    for said in ("40 facts", "ATE 0.250", "MLPs severed"):
        assert said in figure.layout.title.text
    assert plots.heatmap(aie, title="mine").layout.title.text == "mine"


def test_a_kind_that_was_not_severed_is_left_out_of_the_severed_figure(aie):
    states = aie[(aie["kind"] == "state") | (aie["severed"] == "none")]
    assert len(plots.heatmap(states).data) == 3
    assert len(plots.heatmap(states, severed="mlp").data) == 1
    with pytest.raises(PlanError, match="has no kind attn; it has state"):
        plots.heatmap(states, severed="mlp", kinds=["attn"])


def test_an_average_that_is_not_there_stays_empty(aie):
    gone = (aie["role"] == "further") & (aie["layer"] == 1) & (aie["kind"] == "state")
    figure = plots.heatmap(aie[~gone], kinds=["state"])
    z, row = np.array(figure.data[0].z), ROLES[1:].index("further")
    assert np.isnan(z[row, 1])
    assert np.isnan(z).sum() == 1
    assert figure.data[0].text[row][1] == ""


def test_roles_may_be_an_ordered_categorical(aie):
    roles = pd.Categorical(aie["role"], ROLES, ordered=True)
    assert plots.heatmap(aie.assign(role=roles)).to_json() == plots.heatmap(aie).to_json()
    assert plots.lines(aie.assign(role=roles)).to_json() == plots.lines(aie).to_json()


def test_a_real_average_is_drawn_as_a_slow_second_count_gives_it(traced):
    by = ["kind", "window", "severed", "layer", "role"]
    per_fact = traced.frame.groupby([*by, "fact"])["effect"].mean()
    stats = per_fact.groupby(by).agg(["mean", "sem", "count"]).reset_index()
    stats = stats.rename(columns={"mean": "aie", "count": "n_facts"})
    frame = stats.assign(low=stats["aie"] - stats["sem"], high=stats["aie"] + stats["sem"])
    figure = plots.heatmap(frame)
    roles = list(figure.layout.yaxis.ticktext)
    assert roles == [role for role in ROLES[1:] if role in set(traced.frame["role"])]
    effects = defaultdict(lambda: defaultdict(list))
    for row in traced.frame.itertuples():
        if row.severed == "none":
            effects[row.kind, row.role, row.layer][row.fact].append(row.effect)
    for grid, kind in zip(figure.data, ("state", "mlp", "attn"), strict=True):
        for at, role in enumerate(roles):
            for layer in range(8):
                means = [sum(each) / len(each) for each in effects[kind, role, layer].values()]
                assert grid.z[at][layer] == pytest.approx(sum(means) / len(means), abs=1e-12)
                assert f">{len(means)} facts" in grid.text[at][layer]
    assert "2 facts" in figure.data[0].text[roles.index("middle subject")][0], (
        "France has no middle"
    )


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "there"),
    [
        ({"kinds": ["head"]}, "state, mlp, attn"),
        ({"severed": "both"}, "none, mlp, attn"),
        ({"window": 7}, "3, 1|1, 3"),
    ],
)
def test_a_choice_that_is_not_there_lists_what_is(aie, wrong, there):
    for draw in (plots.heatmap, plots.lines):
        with pytest.raises(PlanError, match=f"the average has no .*it has ({there})"):
            draw(aie, **wrong)


def test_several_averages_in_one_frame_are_refused_and_named(aie):
    both = pd.concat([averaged(0, model="small"), averaged(1, model="large")])
    for draw in (plots.heatmap, plots.lines, plots.severed):
        with pytest.raises(PlanError, match=r"2 averages of one cell, .*model \(small, large\)"):
            draw(both)
        draw(both[both["model"] == "large"])


def test_a_frame_that_was_not_averaged_is_refused(aie, traced):
    with pytest.raises(PlanError, match=r"no column aie, low, high, n_facts.*average_effects"):
        plots.heatmap(traced.frame)
    with pytest.raises(PlanError, match="nothing to draw"):
        plots.heatmap(aie[aie["layer"] < 0])
    with pytest.raises(PlanError, match="not a Trace"):
        average_plots.in_order(traced)


def test_arguments_of_the_other_heatmap_are_refused(aie, traced):
    with pytest.raises(PlanError, match="no fact 1"):
        plots.heatmap(aie, fact=1)
    with pytest.raises(PlanError, match="for averages"):
        plots.heatmap(traced, ate=0.5)
    assert plots.heatmap(traced, fact=1).to_json() == plots.heatmap(traced.select(1)).to_json()


# -- single facts ----------------------------------------------------------------------------------


def test_a_traces_embedding_can_be_left_out(traced):
    assert len(plots.heatmap(traced).data) == 4
    assert len(plots.heatmap(traced, include_embedding=False).data) == 3


def test_a_trace_of_some_positions_names_those(atlas):
    some = trace(atlas, FACTS[0], samples=1, kinds="state")
    kept = some.frame[some.frame["role"].isin(["last subject", "last"])].reset_index(drop=True)
    figure = plots.heatmap(Trace(**{**vars(some), "frame": kept}))
    assert list(figure.layout.yaxis.ticktext) == ["Needle*", "of"]
    cells = kept[kept["layer"] >= 0].pivot(index="position", columns="layer")["prob_restored"]
    assert np.array_equal(figure.data[1].z, cells.to_numpy())


def test_a_direct_effect_is_not_called_restoring(traced):
    direct = Trace(**{**vars(traced), "info": {**traced.info, "effect": "direct"}})
    for each, verb, said in ((traced, "restoring", "restored"), (direct, "corrupting", "without")):
        figure = plots.heatmap(each, kinds="state")
        assert titles_of(figure) == [f"{verb} a single state"]
        assert f"p {said}" in figure.data[1].text[0][0]


# -- Figure 7 --------------------------------------------------------------------------------------


def test_lines_and_bands_hold_the_averages_and_their_intervals(aie):
    figure = plots.lines(aie, window=3)
    assert len(figure.data) == 3 * 6 * 2
    drawn = iter(figure.data)
    for kind in KINDS:
        means, lows, highs = (
            expected(aie, kind, KINDS[kind][-1], value=value) for value in ("aie", "low", "high")
        )
        for at, role in enumerate(ROLES[1:]):
            band, line = next(drawn), next(drawn)
            assert line.name == role
            assert (list(line.x), list(line.y)) == (list(LAYERS), list(means[at]))
            assert list(band.x) == [*LAYERS, *reversed(LAYERS)]
            assert list(band.y) == [*highs[at], *reversed(lows[at])]
            assert f"{highs[at][1]:+.4f}" in line.text[1]
            red, green, blue = (int(line.line.color[at : at + 2], 16) for at in (1, 3, 5))
            assert band.fillcolor.startswith(f"rgba({red}, {green}, {blue}, ")


def test_the_legend_names_each_role_once_and_one_scale_serves_all_panels(aie):
    figure = plots.lines(aie)
    named = [line.name for line in figure.data if line.showlegend]
    assert named == list(ROLES[1:])
    assert figure.layout.yaxis2.matches == "y"
    assert plots.lines(aie, shared_scale=False).layout.yaxis2.matches is None
    late = aie[(aie["kind"] != "state") | (aie["role"] != "further")]
    assert sorted(line.name for line in plots.lines(late).data if line.showlegend) == sorted(named)


def test_roles_and_kinds_of_lines_are_chosen(aie):
    figure = plots.lines(aie, roles=["last", "last subject"], kinds="mlp")
    assert [line.name for line in figure.data if line.name] == ["last", "last subject"]
    with pytest.raises(PlanError, match="has no role before subject; it has first subject"):
        plots.lines(aie, roles=["before subject"])


def test_an_average_without_an_interval_has_a_line_and_no_band(aie):
    figure = plots.lines(aie.assign(low=np.nan, high=np.nan, n_facts=1), kinds="state")
    band, line = figure.data[:2]
    assert len(band.y) == 0
    assert np.array_equal(line.y, expected(aie, "state")[0])
    assert "interval" not in line.text[0]


# -- Figure 3 --------------------------------------------------------------------------------------


def paired_gaps(extra=0.0):
    rows = [(cut, layer) for layer in (-1, *LAYERS) for cut in ("attn", "mlp")]
    frame = pd.DataFrame(rows, columns=["severed", "layer"])
    difference = np.random.default_rng(5).normal(0, 1, len(frame)) + extra
    return frame.assign(
        difference=difference, low=difference - 0.25, high=difference + 0.5, kind="state"
    )


def test_the_severed_figure_holds_each_curve_and_the_paired_gaps(aie):
    gaps = paired_gaps()
    figure = plots.severed(aie, gaps=gaps)
    left = [each for each in figure.data if each.xaxis == "x"]
    right = [each for each in figure.data if each.xaxis == "x2"]
    for (band, line), cut in zip(pairs(left), ("none", "mlp", "attn"), strict=True):
        at = ROLES[1:].index("last subject")
        mean, low, high = (
            expected(aie, "state", cut=cut, value=value)[at] for value in ("aie", "low", "high")
        )
        assert list(line.y) == list(mean)
        assert list(band.y) == [*high, *reversed(low)]
    for (band, line), cut in zip(pairs(right), ("mlp", "attn"), strict=True):
        one = gaps[(gaps["severed"] == cut) & (gaps["layer"] >= 0)]
        assert list(line.y) == list(one["difference"])
        assert list(band.y) == [*one["high"], *reversed(list(one["low"]))]
        assert f"{one['high'].iloc[0]:+.4f}" in line.text[0]
    assert [line.name for line in figure.data if line.showlegend] == [
        "ordinary",
        "MLPs severed",
        "attention severed",
    ]


def pairs(drawn):
    return list(zip(drawn[::2], drawn[1::2], strict=True))


def test_without_paired_gaps_the_means_are_subtracted_and_no_interval_is_claimed(aie):
    figure = plots.severed(aie, role="last")
    ordinary, cut = (expected(aie, "state", cut=cut)[-1] for cut in ("none", "mlp"))
    band, line = [each for each in figure.data if each.xaxis == "x2"][:2]
    assert np.allclose(line.y, ordinary - cut, rtol=0, atol=1e-15)
    assert len(band.y) == 0
    assert "interval" not in line.text[0]
    assert "last" in figure.layout.title.text


def test_the_severed_figure_refuses_what_it_cannot_compare(aie):
    with pytest.raises(PlanError, match="has no role nobody; it has"):
        plots.severed(aie, role="nobody")
    with pytest.raises(PlanError, match=r"severed: none; .*trace with severed"):
        plots.severed(aie[aie["severed"] == "none"])
    with pytest.raises(PlanError, match="gaps has no column low"):
        plots.severed(aie, gaps=paired_gaps().drop(columns="low"))
    with pytest.raises(PlanError, match="several rows of one severing and layer"):
        plots.severed(aie, gaps=pd.concat([paired_gaps(), paired_gaps(1.0)]))


# -- small multiples -------------------------------------------------------------------------------


def of_models(*names):
    return pd.concat([averaged(seed, model=name) for seed, name in enumerate(names)])


def test_each_model_has_its_panel_three_in_a_row():
    names = ["small", "medium", "large", "huge"]
    frame = of_models(*names)
    figure = plots.models(frame, kind="mlp", window=3)
    for grid, name in zip(figure.data, names, strict=True):
        assert np.array_equal(grid.z, expected(frame[frame["model"] == name], "mlp", 3))
    assert titles_of(figure) == [f"{name}, 40 facts" for name in names]
    assert figure.layout.width == plots.models(of_models(*"abc")).layout.width
    assert figure.layout.height > plots.models(of_models(*"abc")).layout.height
    fourth = figure.get_subplot(2, 1)
    assert fourth.xaxis.domain == figure.layout.xaxis.domain
    assert list(fourth.yaxis.ticktext) == list(ROLES[1:])
    bars = [grid.colorbar for grid in figure.data]
    assert bars[3].y + bars[3].len / 2 < bars[0].y - bars[0].len / 2, "each bar beside its panel"


def test_windows_that_differ_between_models_stand_in_their_panels(aie):
    narrow, wide = (aie[aie["window"] == width].assign(model=f"w{width}") for width in (1, 3))
    figure = plots.models(pd.concat([narrow, wide]), kind="mlp")
    assert titles_of(figure) == ["w1, window 1, 40 facts", "w3, window 3, 40 facts"]
    alike = plots.models(pd.concat([wide, wide.assign(model="other")]), kind="mlp")
    assert titles_of(alike) == ["w3, 40 facts", "other, 40 facts"]
    assert "of restoring MLP outputs, 3 layers<" in alike.layout.title.text


def test_models_of_different_depth_line_up_by_depth():
    deep = averaged(3, model="deep")
    deep = pd.concat([deep[deep["layer"] >= 0], deep[deep["layer"] >= 0].assign(layer=9)])
    deep = deep.drop_duplicates(["kind", "window", "severed", "layer", "role"])
    frame = pd.concat([averaged(1, model="shallow"), deep])
    for grid, depth in zip(plots.models(frame, by_depth=True).data, (4, 10), strict=True):
        assert grid.x[0] == 0.0
        assert grid.x[-1] == 1.0
        assert grid.x[1] == pytest.approx(1 / depth)
    own = plots.models(frame).data
    assert (own[0].x[-1], own[1].x[-1]) == (3.5, 9.5)


def test_any_column_makes_panels_and_shares_a_scale_on_request(aie):
    widths = plots.models(aie, column="window", kind="attn", shared_scale=True)
    assert sorted(titles_of(widths)) == ["window 1, 40 facts", "window 3, 40 facts"]
    assert "of restoring attention outputs<" in widths.layout.title.text, "of no one width"
    assert len({grid.zmax for grid in widths.data}) == 1
    metrics = pd.concat([averaged(0, metric="prob"), averaged(1, metric="logprob")])
    bars = [grid.colorbar.title.text for grid in plots.models(metrics, column="metric").data]
    assert bars == ["AIE", "AIE (log p)"]
    with pytest.raises(PlanError, match="no column model"):
        plots.models(aie)
    with pytest.raises(PlanError, match="average of 3 has no kind state; it has mlp, attn"):
        plots.models(aie, column="window")


# -- agreement -------------------------------------------------------------------------------------


def attributions(count=30):
    draws = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "kind": draws.choice(["state", "mlp"], count),
            "layer": draws.integers(0, 4, count),
            "token": "Needle",
            "effect": draws.normal(size=count),
            "gradient": draws.normal(size=count),
        }
    )


def test_agreement_draws_every_cell_in_the_colour_of_its_kind():
    frame = attributions()
    figure = plots.agreement(frame, "effect", "gradient")
    assert {points.name for points in figure.data} == {"a single state", "MLP outputs"}
    assert len({points.marker.color for points in figure.data}) == 2
    drawn = {pair for points in figure.data for pair in zip(points.x, points.y, strict=True)}
    assert drawn == set(zip(frame["effect"], frame["gradient"], strict=True))
    assert figure.layout.xaxis.title.text == "effect"
    assert f"gradient {figure.data[0].y[0]:+.4f}" in figure.data[0].text[0]
    assert "token Needle" in figure.data[0].text[0]
    diagonal = figure.layout.shapes[0]
    assert (diagonal.x0, diagonal.x1) == (diagonal.y0, diagonal.y1)


def test_agreement_refuses_unknown_columns_and_draws_crowds_differently(monkeypatch):
    with pytest.raises(PlanError, match="no column slope; it has kind, layer"):
        plots.agreement(attributions(), "effect", "slope")
    with pytest.raises(PlanError, match="no rows"):
        plots.agreement(attributions()[:0], "effect", "gradient")
    assert isinstance(plots.agreement(attributions(), "effect", "gradient").data[0], go.Scatter)
    monkeypatch.setattr(scatter_plots, "CROWD", 30)
    assert isinstance(plots.agreement(attributions(), "effect", "gradient").data[0], go.Scattergl)


# -- text from data --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evil_figures():
    frame = averaged(model=EVIL, noise=EVIL, metric=EVIL)
    frame["role"] = frame["role"].replace({"further": EVIL})
    site = frame[frame["kind"] == "mlp"].assign(kind=EVIL)
    frame = pd.concat([frame, site])
    points = attributions().rename(columns={"gradient": EVIL}).assign(token=EVIL)
    points["kind"] = points["kind"].replace({"mlp": EVIL})
    return {
        "heatmap": plots.heatmap(frame),
        "lines": plots.lines(frame),
        "severed": plots.severed(frame, role=EVIL),
        "models": plots.models(frame),
        "models of a site": plots.models(frame, column="noise", kind=EVIL),
        "agreement": plots.agreement(points, "effect", EVIL),
    }


@pytest.mark.parametrize(
    "name", ["heatmap", "lines", "severed", "models", "models of a site", "agreement"]
)
def test_text_from_data_is_shown_as_text(evil_figures, name):
    figure = evil_figures[name]
    escaped = [text for text in texts_of(figure) if "owned" in text]
    assert escaped, "the text is shown somewhere, so that this can fail"
    for text in escaped:
        assert "<i>" not in text
        assert "<script" not in text
        assert "&lt;i&gt;owned&lt;/i&gt;&amp;amp;" in text


# -- files -----------------------------------------------------------------------------------------


def test_html_opens_offline_and_json_comes_back_the_same(aie, tmp_path):
    figure = plots.heatmap(aie)
    assert plots.save(figure, tmp_path / "figure.html") == tmp_path / "figure.html"
    page = (tmp_path / "figure.html").read_text(encoding="utf-8")
    loads = re.compile(r"<(script|link)[^>]*(src|href)=")
    assert not loads.search(page)
    assert loads.search(figure.to_html(include_plotlyjs="cdn")), "the check can fail"
    plots.save(figure, str(tmp_path / "figure.json"))
    stored = json.loads((tmp_path / "figure.json").read_text(encoding="utf-8"))
    z = np.frombuffer(base64.b64decode(stored["data"][0]["z"]["bdata"]))
    assert np.array_equal(z, expected(aie, "state").ravel())
    assert stored["layout"]["width"] == figure.layout.width
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figure.html", "figure.json"]


def test_an_unknown_suffix_lists_the_known_ones(aie, tmp_path):
    for name in ("figure.gif", "figure"):
        with pytest.raises(PlanError, match=r"\.html, \.json, \.png, \.svg, \.pdf"):
            plots.save(plots.heatmap(aie), tmp_path / name)


def test_a_place_that_cannot_be_written_is_one_line(aie, tmp_path):
    with pytest.raises(OutputError, match="cannot write"):
        plots.save(plots.heatmap(aie), tmp_path / "none" / "figure.json")


def test_an_image_without_kaleido_says_what_to_install(aie, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kaleido", None)
    with pytest.raises(OutputError, match=r"pip install -U kaleido.*Chrome or Chromium") as error:
        plots.save(plots.heatmap(aie), tmp_path / "figure.png")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
    plots.save(plots.heatmap(aie), tmp_path / "figure.json")


@pytest.mark.parametrize(
    ("browser", "said"),
    [
        ("/nowhere/chrome", "needs a Chrome or Chromium browser and BROWSER_PATH names /nowhere"),
        ("/bin/false", "the browser could not draw the .svg"),
    ],
)
def test_an_image_without_a_working_browser_is_one_line(aie, tmp_path, monkeypatch, browser, said):
    pytest.importorskip("kaleido")
    monkeypatch.setenv("BROWSER_PATH", browser)
    with pytest.raises(OutputError, match=said) as error:
        plots.save(plots.heatmap(aie), tmp_path / "figure.svg")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def pixels(path):
    """Width, height, and the bytes of a PNG's rows as they are stored: each is a difference from its neighbours."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    packed, at = b"", 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        if data[at + 4 : at + 8] == b"IDAT":
            packed += data[at + 8 : at + 8 + length]
        at += length + 12
    return width, height, zlib.decompress(packed)


@needs_browser
def test_a_png_is_drawn_at_its_scale(aie, tmp_path):
    pytest.importorskip("kaleido")
    figure = plots.heatmap(aie, kinds="state")
    width, height, drawn = pixels(plots.save(figure, tmp_path / "figure.png", scale=1.5))
    assert (width, height) == (1.5 * figure.layout.width, 1.5 * figure.layout.height)
    blank = go.Figure(layout={"template": "none", "xaxis_visible": False, "yaxis_visible": False})
    *_, nothing = pixels(plots.save(blank, tmp_path / "blank.png"))
    assert len(set(nothing)) < 10 < 100 < len(set(drawn))


@needs_browser
@pytest.mark.slow
def test_vector_images_have_their_own_form(aie, tmp_path):
    pytest.importorskip("kaleido")
    svg = plots.save(plots.heatmap(aie, kinds="mlp"), tmp_path / "figure.SVG")
    text = svg.read_text(encoding="utf-8")
    assert text.startswith("<svg")
    assert "last subject" in text
    pdf = plots.save(plots.lines(aie, kinds="mlp"), tmp_path / "figure.pdf")
    assert pdf.read_bytes().startswith(b"%PDF")
    assert images.IMAGES == (".png", ".svg", ".pdf")
