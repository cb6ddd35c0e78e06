"""The Jupyter panel: type a prompt and a subject, press Trace, see the heatmap."""

import html
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import plotly.graph_objects as go

from factlens import models, plots
from factlens.errors import FactlensError, FactWarning
from factlens.facts import Fact
from factlens.models import Model
from factlens.plans import KINDS, SEVERED, check_choices
from factlens.traces import Trace
from factlens.tracing import trace

KIND_NAMES = {"state": "states", "mlp": "MLPs", "attn": "attention"}
SEVERED_NAMES = {"none": "nothing", "mlp": "MLPs", "attn": "attention", "both": "both"}
COLOURS = {"error": "#b3261e", "warning": "#8a6100"}


def explore(
    model: Model,
    prompt: str = "The Space Needle is located in the city of",
    subject: str = "The Space Needle",
    *,
    kind: str = "state",
    window: int | None = None,
    severed: str = "none",
    **trace_options: Any,
) -> "Panel":
    """A panel to trace one prompt after another in Jupyter or Colab; the one it opens with is traced at once.

    Pressing Trace traces all three kinds, so that choosing another kind needs no run. What cannot be traced is said
    in the panel, and the last good figure stays.

    Args:
        model: from `load_model`.
        prompt: what the panel opens with, as are the arguments up to `severed`.
        subject: in the words of the prompt.
        kind: "state", "mlp" or "attn".
        window: width of MLP and attention windows in layers; None takes `models.trace_defaults`.
        severed: "none", "mlp", "attn" or "both".
        trace_options: anything else that `trace` takes, such as `noise_level=` or `samples=`.

    Raises:
        ImportError: ipywidgets or anywidget is not installed.
        ModelUnsupported: the model lacks hook points.
        PlanError: an unknown kind or severing, or an impossible window.
    """
    models.check_model(model)
    if window is None:
        window = models.trace_defaults(model).window
    check_choices((kind,), (window,), (severed,))
    panel = Panel(model, Fact(prompt, subject), kind, window, severed, trace_options)
    panel.press()
    return panel


class Panel:
    """The fields, the button and the figure that `explore` shows.

    Every part can be set from code as by hand: `panel.prompt.value = "..."`, then `panel.button.click()`.
    """

    def __init__(
        self,
        model: Model,
        fact: Fact,
        kind: str,
        window: int,
        severed: str,
        trace_options: dict[str, Any],
    ) -> None:
        widgets = _widgets()
        self.model, self.trace_options = model, trace_options
        self.trace: Trace | None = None
        """The last trace that succeeded, all kinds; the figure shows one of them."""
        self.figure: Any = None
        """A plotly `FigureWidget`, once there is something to show."""
        label, wide = {"description_width": "70px"}, {"width": "min(620px, 98%)"}
        self.prompt = widgets.Text(fact.prompt, description="prompt", style=label, layout=wide)
        self.subject = widgets.Text(fact.subject, description="subject", style=label, layout=wide)
        self.kind = widgets.ToggleButtons(
            options=[(KIND_NAMES[each], each) for each in KINDS],
            value=kind,
            style={"button_width": "100px"},
        )
        self.window = widgets.BoundedIntText(
            window,
            min=1,
            max=max(window, models.n_layers(model)),
            description="window",
            tooltip="layers in an MLP or attention window",
            style=label,
            layout={"width": "150px"},
        )
        self.severed = widgets.Dropdown(
            options=[(SEVERED_NAMES[each], each) for each in SEVERED],
            value=severed,
            description="sever",
            style={"description_width": "50px"},
            layout={"width": "170px"},
        )
        self.button = widgets.Button(description="Trace", button_style="primary")
        self.progress = widgets.IntProgress(layout={"width": "120px", "visibility": "hidden"})
        self.message = widgets.HTML()
        row = {"flex_flow": "row wrap", "align_items": "center"}
        pressed = widgets.HBox([self.window, self.severed, self.button, self.progress], layout=row)
        # A label of our own: ToggleButtons sets its description above the buttons.
        restore = widgets.Label("restore", layout={"width": "70px", "justify_content": "flex-end"})
        chosen = widgets.HBox([restore, self.kind], layout=row)
        self.box = widgets.VBox([self.prompt, self.subject, chosen, pressed, self.message])
        self.button.on_click(self.press)
        self.kind.observe(self._kind_chosen, "value")

    def _repr_mimebundle_(self, **options: Any) -> Any:
        return self.box._repr_mimebundle_(**options)

    def press(self, button: object = None) -> None:
        """Trace what the fields say; what a press of the button does."""
        self.button.disabled, self.progress.layout.visibility = True, "visible"
        self.progress.value, self.progress.bar_style = 0, ""
        try:
            with _fact_warnings() as said:
                problem = self._try_to_trace()
        finally:
            self.button.disabled, self.progress.layout.visibility = False, "hidden"
        self._say(said, problem)

    def _try_to_trace(self) -> str | None:
        """Trace and draw; what went wrong, if it is something to tell the user rather than a defect."""
        try:
            traced = trace(
                self.model,
                self.prompt.value,
                subject=self.subject.value,
                kinds=KINDS,
                window=self.window.value,
                severed=self.severed.value,
                progress=self._advance,
                **self.trace_options,
            )
            self._draw(traced)
        except FactlensError as error:
            return str(error)
        except KeyboardInterrupt:
            return "stopped"
        except Exception as error:
            # A button's exceptions go to a log that few have open, so the panel says that there was one.
            self._say([], f"{type(error).__name__}: {error}")
            raise
        return None

    def _advance(self, done: int, total: int, fact: Fact) -> None:
        self.progress.max, self.progress.value = total, done

    def _kind_chosen(self, change: object) -> None:
        if self.trace is not None:
            self._draw(self.trace)

    def _draw(self, traced: Trace) -> None:
        """Show the chosen kind of `traced`, and keep it: only what can be drawn becomes the last good trace."""
        drawn = plots.heatmap(traced, kinds=[self.kind.value])
        self.trace = traced
        if self.figure is None:
            self.figure = go.FigureWidget(drawn)
            self.box.children = (*self.box.children, self.figure)
            return
        # In place: each new widget would send plotly's 5 MB of JavaScript again.
        self.figure.update(data=drawn.data, layout=drawn.layout, overwrite=True)
        # Updates are messages; this stores their result, so that a reloaded page shows it too.
        self.figure._repr_mimebundle_()

    def _say(self, notes: Sequence[str], problem: str | None) -> None:
        lines = [("error", problem)] if problem else []
        lines += [("warning", note) for note in notes]
        if problem and self.trace is not None:
            lines.append(("warning", "the figure shows the last trace that succeeded"))
        self.message.value = "".join(
            f'<div style="color: {COLOURS[level]}; line-height: 1.5">{html.escape(text)}</div>'
            for level, text in lines
        )


@contextmanager
def _fact_warnings() -> Iterator[list[str]]:
    """The text of every FactWarning within the block; other warnings go their usual way."""
    said: list[str] = []
    elsewhere = warnings.showwarning

    def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, FactWarning):
            said.append(str(message))
        else:
            elsewhere(message, category, *where, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("always", FactWarning)
        warnings.showwarning = show
        yield said


def _widgets() -> Any:
    """The module ipywidgets, ready for plotly's figure beside its own widgets."""
    try:
        import anywidget  # noqa: F401  # what FigureWidget is made of
        import ipywidgets
    except ImportError as error:
        raise ImportError(
            f"the panel needs {error.name}, which is not installed: pip install ipywidgets anywidget"
        ) from None
    if "google.colab" in sys.modules:
        # Colab draws only ipywidgets' own widgets until it is told otherwise.
        sys.modules["google.colab"].output.enable_custom_widget_manager()
    return ipywidgets
