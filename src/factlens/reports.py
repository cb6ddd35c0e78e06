"""Figures and tables on one self-contained HTML page, which opens offline."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment

from factlens.files import written_whole
from factlens.traces import Trace

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 1480px; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0 0 .2rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .4rem; }
.lead { color: #555; margin: 0 0 1rem; } .figure { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .15rem .9rem .15rem 0; border-bottom: 1px solid #eee; }
td.number, th.number { text-align: right; } code { font-size: .9em; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="lead">{{ lead }}</p>
{% for figure in figures %}<div class="figure">{{ figure | safe }}</div>
{% endfor %}
{% for name, table in tables %}<h2>{{ name }}</h2>
<table><thead><tr>{% for column in table.columns %}
<th{% if column in numeric[name] %} class="number"{% endif %}>{{ column }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in table.itertuples(index=False) %}<tr>{% for cell in row %}
<td{% if table.columns[loop.index0] in numeric[name] %} class="number"{% endif %}>
{{- cell | show -}}</td>{% endfor %}</tr>{% endfor %}</tbody></table>
{% endfor %}
</body>
</html>
"""


def page(
    title: str,
    lead: str,
    figures: Sequence[go.Figure],
    tables: Sequence[tuple[str, pd.DataFrame]],
) -> str:
    """An HTML page that needs nothing else: plotly is inside, once. All text is escaped."""
    environment = Environment(autoescape=True)
    environment.filters["show"] = _show
    drawn = [
        figure.to_html(
            full_html=False,
            include_plotlyjs=number == 0,
            config={"displaylogo": False, "responsive": False},
        )
        for number, figure in enumerate(figures)
    ]
    numeric = {
        name: {c for c in table.columns if pd.api.types.is_numeric_dtype(table[c])}
        for name, table in tables
    }
    template = environment.from_string(_PAGE)
    return template.render(title=title, lead=lead, figures=drawn, tables=tables, numeric=numeric)


def _show(cell: object) -> str:
    return f"{cell:.4f}" if isinstance(cell, float) else str(cell)


def trace_page(trace: Trace, figures: Sequence[go.Figure]) -> str:
    """The page of a trace: its heatmaps, the strongest cells of each kind, and how it was measured."""
    totals = trace.totals().iloc[0]
    columns = ["kind", "window", "severed", "layer", "token", "role", "effect", "sample_sd"]
    kinds = list(dict.fromkeys(trace.frame["kind"]))
    strongest = pd.concat([trace.strongest(5, kind=kind) for kind in kinds])[columns]
    versions = trace.info.get("versions", {})
    rows = [(k, v) for k, v in trace.info.items() if k != "versions" and v is not None]
    rows += [(f"version of {name}", value) for name, value in versions.items()]
    rows += [(f"skipped: {prompt}", reason) for prompt, reason in trace.skipped]
    settings = pd.DataFrame([(k, str(v)) for k, v in rows], columns=["setting", "value"])
    lead = (
        f"{trace.info['model']} continues with “{trace.answers[0].strip()}”: {trace.info['metric']} "
        f"{totals['clean']:.4f} clean, {totals['corrupted']:.4f} with the subject corrupted, total "
        f"effect {totals['total_effect']:+.4f}. The maps show how much of it each restored part brings back."
    )
    title = f"Causal trace: {trace.facts[0].prompt}"
    if len(trace) > 1:
        title += f" and {len(trace) - 1} more"
    tables = [("Strongest cells", strongest), ("How it was measured", settings)]
    if len(trace) > 1:
        tables.insert(0, ("Facts", trace.totals()))
    return page(title, lead, figures, tables)


def write_text(text: str, path: str | Path) -> Path:
    """Write a text file whole or not at all: to a temporary name, then renamed.

    Raises:
        OutputError: the place cannot be written.
    """
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return Path(path)
