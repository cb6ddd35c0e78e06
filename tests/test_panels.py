"""The panel, pressed by code as by hand: in this process, and in a Jupyter kernel with nbclient as the front end."""

import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbclient import NotebookClient

import factlens as fl
from factlens import panels

MODEL = str(Path(__file__).parent / "oracle" / "model")
PROMPT, SUBJECT = "Megan Rapinoe plays the sport of", "Megan Rapinoe"
OTHER = "Megan Rapinoe plays the"
QUICK = {"noise_level": 0.3, "samples": 2}


@pytest.fixture(scope="module")
def model():
    return fl.load_model(MODEL)


@pytest.fixture
def panel(model):
    return fl.explore(model, PROMPT, SUBJECT, **QUICK)


def drawn(figure):
    """Everything a figure draws; a widget's traces have random names besides."""
    shown = json.loads(figure.to_json())
    traces = [{key: each[key] for key in each if key != "uid"} for each in shown["data"]]
    return json.dumps([traces, shown["layout"]], sort_keys=True)


def shows(panel, trace):
    return drawn(panel.figure) == drawn(fl.plots.heatmap(trace, kinds=[panel.kind.value]))


# -- what it shows ---------------------------------------------------------------------------------


def test_the_panel_opens_with_the_heatmap_of_its_arguments(model, panel):
    assert shows(panel, fl.trace(model, PROMPT, subject=SUBJECT, **QUICK))
    assert panel.message.value == ""
    assert panel.progress.value == panel.progress.max == len(panel.trace.frame)
    assert panel.progress.layout.visibility == "hidden"
    assert not panel.button.disabled


@pytest.mark.parametrize("kind", ["state", "mlp", "attn"])
def test_choosing_a_kind_draws_it_without_another_run(panel, kind):
    before = panel.trace
    panel.kind.value = kind
    assert panel.trace is before
    assert shows(panel, before)


def test_fields_count_when_trace_is_pressed_and_not_before(model, panel):
    panel.kind.value = "mlp"
    old = drawn(panel.figure)
    panel.prompt.value, panel.window.value, panel.severed.value = OTHER, 2, "both"
    assert drawn(panel.figure) == old
    panel.button.click()
    assert drawn(panel.figure) != old
    assert shows(
        panel,
        fl.trace(model, OTHER, subject=SUBJECT, window=2, severed="both", **QUICK),
    )


def test_the_figure_can_grow_and_shrink_again(panel):
    first = drawn(panel.figure)
    for prompt in (OTHER, PROMPT):
        panel.prompt.value = prompt
        panel.button.click()
    assert drawn(panel.figure) == first


def test_opening_choices_and_trace_options_reach_the_trace(model):
    panel = fl.explore(model, PROMPT, SUBJECT, kind="attn", window=3, severed="mlp", **QUICK)
    assert (panel.kind.value, panel.window.value, panel.severed.value) == ("attn", 3, "mlp")
    assert panel.trace.info["samples"] == 2
    assert set(panel.trace.frame["window"]) == {1, 3}
    assert set(panel.trace.frame["severed"]) == {"mlp"}


def test_jupyter_displays_it_as_a_widget(panel):
    assert "application/vnd.jupyter.widget-view+json" in panel._repr_mimebundle_()


def test_what_a_reloaded_page_would_fetch_is_the_present_figure(panel):
    panel.kind.value = "attn"
    stored = panel.figure.get_state(["_widget_layout"])["_widget_layout"]
    assert stored["title"]["text"] == panel.figure.layout.title.text
    assert len(panel.figure.get_state(["_widget_data"])["_widget_data"]) == len(panel.figure.data)


# -- what goes wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("subject", "Rapinoe Megan", "does not occur in"),
        ("subject", "", "is empty"),
        ("prompt", " ", "is empty"),
        ("prompt", "Megan Rapinoe " * 200, "positions; shorten it"),
    ],
)
def test_an_error_is_said_in_the_panel_and_the_last_good_figure_stays(panel, field, value, said):
    old, trace = drawn(panel.figure), panel.trace
    getattr(panel, field).value = value
    panel.button.click()
    assert said in panel.message.value
    assert panel.trace is trace
    assert drawn(panel.figure) == old
    assert not panel.button.disabled
    panel.prompt.value, panel.subject.value = OTHER, SUBJECT
    panel.button.click()
    assert panel.message.value == ""
    assert drawn(panel.figure) != old


def test_a_panel_may_open_with_an_error_and_recover(model):
    panel = fl.explore(model, PROMPT, "Somebody", **QUICK)
    assert "does not occur" in panel.message.value
    assert panel.trace is panel.figure is None
    panel.kind.value = "mlp"
    panel.subject.value = SUBJECT
    panel.button.click()
    assert shows(panel, panel.trace)


def test_a_warning_about_the_fact_is_said_in_the_panel(panel):
    panel.prompt.value = "Megan Rapinoe is not Megan Rapinoe, who plays"
    panel.button.click()
    assert "occurs 2 times" in panel.message.value
    assert panel.trace.facts[0].prompt == panel.prompt.value


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>"])
def test_markup_in_a_prompt_is_shown_as_text(panel, text):
    panel.prompt.value = text
    panel.button.click()
    assert "<script" not in panel.message.value
    assert "<img" not in panel.message.value
    assert "&lt;" in panel.message.value
    panel.prompt.value = f"{text} {PROMPT}"
    panel.button.click()
    assert panel.message.value == ""
    assert "<script" not in panel.figure.layout.title.text
    assert "<img" not in panel.figure.layout.title.text


def test_a_defect_is_named_in_the_panel_and_raised(panel, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of <memory>")

    monkeypatch.setattr(panels, "trace", broken)
    with pytest.raises(RuntimeError, match="memory"):
        panel.press()
    assert "RuntimeError: out of &lt;memory&gt;" in panel.message.value
    assert not panel.button.disabled


def test_stopping_the_kernel_stops_the_run_and_nothing_else(panel, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    old = drawn(panel.figure)
    monkeypatch.setattr(panels, "trace", stopped)
    panel.press()
    assert "stopped" in panel.message.value
    assert drawn(panel.figure) == old


def test_warnings_of_others_go_their_usual_way(panel, monkeypatch):
    traced = panel.trace

    def warning(*_, **__):
        warnings.warn("something else", UserWarning, stacklevel=1)
        warnings.warn("about the fact", fl.FactWarning, stacklevel=1)
        return traced

    monkeypatch.setattr(panels, "trace", warning)
    with pytest.warns(UserWarning, match="something else"):
        panel.press()
    assert "about the fact" in panel.message.value
    assert "something else" not in panel.message.value


@pytest.mark.parametrize("missing", ["ipywidgets", "anywidget"])
def test_without_the_notebook_extra_one_line_names_it(model, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"{missing}.*pip install ipywidgets anywidget"):
        fl.explore(model, PROMPT, SUBJECT)


@pytest.mark.parametrize("wrong", [{"kind": "head"}, {"severed": "all"}, {"window": 0}])
def test_choices_that_do_not_exist_are_refused_at_once(model, wrong):
    with pytest.raises(fl.FactlensError):
        fl.explore(model, PROMPT, SUBJECT, **wrong)


def test_colab_is_told_to_draw_custom_widgets(model, monkeypatch):
    told = []
    output = SimpleNamespace(enable_custom_widget_manager=lambda: told.append(True))
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace(output=output))
    fl.explore(model, PROMPT, SUBJECT, **QUICK)
    assert told == [True]


# -- in a kernel -----------------------------------------------------------------------------------

CELLS = (
    f"""
import factlens as fl

model = fl.load_model({MODEL!r})
panel = fl.explore(model, {PROMPT!r}, {SUBJECT!r}, **{QUICK})
panel
""",
    f"""
def values():
    return [each.z.tolist() for each in panel.figure.data]

def traced(kind, prompt, **options):
    trace = fl.trace(model, prompt, subject={SUBJECT!r}, **{QUICK}, **options)
    return [each.z.tolist() for each in fl.plots.heatmap(trace, kinds=[kind]).data]

assert values() == traced("state", {PROMPT!r})
panel.kind.value = "attn"
assert values() == traced("attn", {PROMPT!r})
""",
    f"""
panel.prompt.value, panel.severed.value = {OTHER!r}, "mlp"
assert values() == traced("attn", {PROMPT!r})  # not pressed yet
panel.button.click()
assert values() != traced("attn", {PROMPT!r})
assert values() == traced("attn", {OTHER!r}, severed="mlp")
""",
    f"""
panel.subject.value = "<script>alert(1)</script>"
panel.button.click()
assert "does not occur" in panel.message.value
assert values() == traced("attn", {OTHER!r}, severed="mlp")
""",
)


@pytest.mark.slow
def test_in_a_kernel_pressing_trace_redraws_and_an_error_is_text(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(fl.__file__).parents[1]))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(each) for each in CELLS])
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=120,
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    shown = notebook.cells[0].outputs[0].data["application/vnd.jupyter.widget-view+json"]
    states = client.widget_state  # what the front end was sent
    assert shown["model_id"] in states
    messages = [each["value"] for each in states.values() if each["_model_name"] == "HTMLModel"]
    assert any("&lt;script&gt;alert(1)" in message for message in messages)
    assert not any("<script" in message for message in messages)
    assert not any(cell.outputs for cell in notebook.cells[1:])  # no traceback, no warning
