"""Figures to files: pages and JSON with nothing else, images through kaleido and a browser."""

import os
from pathlib import Path

import plotly.graph_objects as go

from factlens.errors import OutputError, PlanError
from factlens.files import written_whole

TEXTS = (".html", ".json")
IMAGES = (".png", ".svg", ".pdf")


def save(figure: go.Figure, path: str | Path, *, scale: int | float = 2) -> Path:
    """Write a figure, whole or not at all, in the format of the path's suffix; the written path.

    `.html` is a page that opens offline (plotly is inside, about 5 MB), `.json` is plotly's own form. `.png`, `.svg` and
    `.pdf` need the package kaleido and a Chrome or Chromium browser, found by itself or named in the environment
    variable BROWSER_PATH. `scale` is how many pixels of a PNG there are to one of the figure.

    Raises:
        PlanError: another suffix.
        OutputError: the place cannot be written, or an image without kaleido or without a browser.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (*TEXTS, *IMAGES):
        raise PlanError(
            f"{path} has the suffix {path.suffix!r}; a figure is saved as {', '.join((*TEXTS, *IMAGES))}"
        )
    if suffix == ".html":
        content = figure.to_html(include_plotlyjs=True, include_mathjax=False).encode()
    elif suffix == ".json":
        content = figure.to_json().encode()
    else:
        content = _image(figure, suffix.removeprefix("."), scale)
    with written_whole(path) as partial:
        partial.write_bytes(content)
    return path


def _image(figure: go.Figure, form: str, scale: int | float) -> bytes:
    try:
        import kaleido
        from kaleido.errors import ChromeNotFoundError
    except ImportError:
        raise OutputError(
            f"a .{form} needs kaleido 1 or newer, which is not installed: pip install -U kaleido; "
            "it also needs a Chrome or Chromium browser (.html and .json need neither)"
        ) from None
    try:
        # Not plotly's to_image: kaleido would then ask the network for MathJax, which no figure here uses.
        return kaleido.calc_fig_sync(
            figure.to_dict(), opts={"format": form, "scale": scale}, kopts={"mathjax": False}
        )
    except ChromeNotFoundError:
        named = os.environ.get("BROWSER_PATH")
        where = f"BROWSER_PATH names {named}, which is none" if named else "none was found"
        raise OutputError(
            f"a .{form} needs a Chrome or Chromium browser and {where}; install one, or name it in the "
            "environment variable BROWSER_PATH (.html and .json need none)"
        ) from None
    except Exception as error:
        # Browsers fail in many ways, and each has its own class; the first line of it says enough.
        said = str(error.args[0] if error.args else type(error).__name__).strip().split("\n")[0]
        raise OutputError(
            f"the browser could not draw the .{form} ({said[:160]}); name another in the environment "
            "variable BROWSER_PATH, or save .html or .json"
        ) from None
