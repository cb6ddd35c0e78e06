"""Figures and tables on one self-contained HTML page, which opens offline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment

from factlens import plots
from factlens.claims import OPPOSITE, SEEN, UNDECIDED
from factlens.files import written_whole
from factlens.summaries import Summary
from factlens.traces import Trace

SHOWN = 30
"""Rows of long lists on a page; the run's files hold all."""

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
caption { text-align: left; color: #444; margin: 0 0 .6rem; max-width: 60rem; }
.note { color: #444; max-width: 60rem; margin: 0 0 .6rem; }
.seen { color: #1a7a34; font-weight: 600; } .opposite { color: #b3261e; font-weight: 600; } .undecided { color: #8a6d00; font-weight: 600; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="lead">{{ lead }}</p>
{% for section in sections %}{% if section.heading %}<h2>{{ section.heading }}</h2>
{% endif %}{% if section.note %}<p class="note">{{ section.note }}</p>
{% endif %}{% if section.markup %}<div class="figure">{{ section.markup | safe }}</div>
{% endif %}{% if section.drawn %}<div class="figure">{{ section.drawn | safe }}</div>
{% endif %}{% if section.table is not none %}<div class="figure"><table><thead><tr>{% for column in section.table.columns %}
<th{% if column in section.numeric %} class="number"{% endif %}>{{ column }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in section.table.itertuples(index=False) %}<tr>{% for cell in row %}
<td class="{{ 'number' if section.table.columns[loop.index0] in section.numeric }} {{ cell | mark }}">
{{- cell | show -}}</td>{% endfor %}</tr>{% endfor %}</tbody></table></div>
{% endif %}{% endfor %}
</body>
</html>
"""


@dataclass(frozen=True)
class Section:
    """A part of a page: a heading, a sentence, and a figure or a table."""

    heading: str = ""
    note: str = ""
    figure: go.Figure | None = None
    table: pd.DataFrame | None = None
    markup: str = ""
    """HTML that goes on the page as it is: whoever gives it has escaped what is in it."""


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """An HTML page that needs nothing else: plotly is inside, once. All text is escaped, but for `Section.markup`."""
    environment = Environment(autoescape=True)
    environment.filters["show"], environment.filters["mark"] = _show, _mark
    drawn: list[dict] = []
    with_plotly = True
    for section in sections:
        html = None
        if section.figure is not None:
            html = section.figure.to_html(
                full_html=False,
                include_plotlyjs=with_plotly,
                div_id=f"figure-{len(drawn)}",  # Plotly's own ids are random; the same run gives the same page.
                config={"displaylogo": False, "responsive": False},
            )
            with_plotly = False
        numeric: set = set()
        if section.table is not None:
            columns = section.table.columns
            numeric = {c for c in columns if pd.api.types.is_numeric_dtype(section.table[c])}
        drawn.append({**vars(section), "drawn": html, "numeric": numeric})
    template = environment.from_string(_PAGE)
    return template.render(title=title, lead=lead, sections=drawn)


def _show(cell: object) -> str:
    if isinstance(cell, float):
        return "" if cell != cell else f"{cell:.4f}"
    return str(cell)


def _mark(cell: object) -> str:
    """Verdicts are coloured."""
    return cell if isinstance(cell, str) and cell in (SEEN, OPPOSITE, UNDECIDED) else ""


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
    sections = [Section(figure=figure) for figure in figures]
    if len(trace) > 1:
        sections.append(Section("Facts", table=trace.totals()))
    sections.append(Section("Strongest cells", table=strongest))
    sections.append(Section("How it was measured", table=settings))
    return page(title, lead, sections)


def run_page(summary: Summary) -> str:
    """The page of a run: the paper's tracing figures, its claims with verdicts, its numbers beside ours, and how.

    Needs no model: a run's directory is enough (`averages.read_run`, `summaries.Summary`).
    """
    run, total = summary.run, summary.ate.iloc[0]
    model, count = run.main.info["model"], len(run.main)
    lead = (
        f"{count} facts, of {int(run.knowledge['known'].sum())} that {model} knows and {len(run.knowledge)} asked: "
        f"p(answer) {total['clean']:.3f} clean, "
        f"{total['corrupted']:.3f} with the subject corrupted, average total effect {total['ate']:.4f} "
        f"({total['low']:.4f} to {total['high']:.4f}). Layers count from 0. Effects are averaged over a fact's noise "
        "draws and tokens first; intervals are 95 %, over facts."
    )
    sections = run_sections(summary)
    return page(f"Average effects: {model}, {count} facts", lead, sections + _how(summary))


def run_sections(summary: Summary) -> list[Section]:
    """What a run shows: the figures, claims and numbers of the paper's Section 2, then further studies."""
    sections = [
        Section("Average indirect effects (Figure 2)", figure=plots.heatmap(summary.aie)),
        Section(
            "The claims of Section 2",
            "A paired difference within facts, positive where the paper is right. Seen: its 95 % bootstrap interval lies "
            "wholly above zero; opposite: wholly below; else undecided; fewer than 50 facts are not judged. Peaks are "
            "chosen on one half of the facts and measured on the other. Intervals are of each claim by itself: of twenty "
            "that are false one may look true.",
            table=summary.claims,
        ),
        Section(
            "The paper's numbers, and here",
            "GPT-2 XL in the paper, 1 000 facts. Another model need not agree. Intervals are those of the cell, not "
            "corrected for its being the largest.",
            table=summary.numbers,
        ),
        Section("With 95 % intervals (Figure 7)", figure=plots.lines(summary.aie)),
    ]
    if len(summary.severed):
        figure = plots.severed(summary.severed, gaps=summary.gaps)
        sections.append(Section("Severed MLPs and attention (Figure 3)", figure=figure))
    return sections + _variants(summary) + _gradients(summary)


def _variants(summary: Summary) -> list[Section]:
    made = []
    if summary.small_multiples["corruption"].nunique() > 1:
        for kind in ("state", "mlp", "attn"):
            figure = plots.models(summary.small_multiples, column="corruption", kind=kind)
            heading = "Other corruption rules (Appendix B.4)" if kind == "state" else ""
            made.append(Section(heading, figure=figure))
    note = "For each study the role and layer of the largest AIE, by site. Effects in the unit of the metric."
    rules = summary.rules[summary.rules["site"] != "after"].drop(columns="severed")
    made.append(Section("Where each puts its peaks", note, table=rules))
    note = (
        f"{summary.peak_share:.1%} of the facts have their largest effect on states before the last token somewhere "
        "else than at the last subject token. The strongest:"
    )
    columns = ["prompt", "subject", "answer", "layer", "token", "role", "effect"]
    table = summary.elsewhere[columns].head(SHOWN)
    made.append(Section("Facts that peak elsewhere", note, table=table))
    return made


def _gradients(summary: Summary) -> list[Section]:
    if summary.gradients.empty:
        return []
    note = (
        "Spearman's rank correlation with the exact effects over the cells of each fact, averaged over facts, and what "
        f"the time covers. Exact tracing of three kinds with {summary.run.main.info['samples']} samples took "
        f"{summary.run.main.info['seconds'] / len(summary.run.main):.2f} s a fact."
    )
    made = [Section("Gradients beside tracing (Figure 16)", note, table=summary.gradients)]
    for name in summary.gradients["method"].unique():
        figure = plots.agreement(summary.compared(name), "effect", "attribution", title=name)
        made.append(Section(figure=figure))
    return made


def _how(summary: Summary) -> list[Section]:
    run = summary.run
    seconds = pd.DataFrame(
        [
            (
                name,
                len(trace),
                len(trace.skipped),
                trace.info.get("engine", ""),
                trace.info.get("seconds", 0.0),
            )
            for name, trace in run.traces.items()
        ],
        columns=["study", "facts", "skipped", "engine", "seconds at work"],
    )
    reasons = [
        (name, prompt, reason)
        for name, trace in run.traces.items()
        for prompt, reason in trace.skipped
    ]
    wall = " + ".join(f"{session['seconds']:.0f}" for session in run.sessions)
    note = (
        f"Wall-clock {run.seconds:.0f} s ({wall}){run.spread}, by the times the command was run; one that was killed could not say. "
        f"On {', '.join(sorted({str(session['device']) for session in run.sessions}))}."
    )
    made = [
        Section("Time", note, table=seconds),
        Section("Facts that were not traced", table=summary.skipped),
    ]
    if bad := run.about.get("bad_rows"):
        made.append(Section("Rows that cannot be used", table=pd.DataFrame({"row": bad[:SHOWN]})))
    if reasons:
        skipped = pd.DataFrame(reasons[:SHOWN], columns=["study", "prompt", "reason"])
        made.append(Section("Skipped within studies", table=skipped))
    settings = [*_flat(run.config), *_flat({k: v for k, v in run.about.items() if k != "bad_rows"})]
    table = pd.DataFrame(settings, columns=["setting", "value"])
    made.append(Section("Configuration", table=table))
    return made


def _flat(values: object, name: str = "") -> list[tuple[str, str]]:
    if isinstance(values, Mapping):
        return [row for k, v in values.items() for row in _flat(v, f"{name}.{k}".lstrip("."))]
    return [(name, str(values))]


def write_text(text: str, path: str | Path) -> Path:
    """Write a text file whole or not at all: to a temporary name, then renamed.

    Raises:
        OutputError: the place cannot be written.
    """
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return Path(path)
