"""Printed tables of scores as Markdown, LaTeX and HTML: what is best is bold, what failed is red and marked.

Everything that stands in a table may come from data, and is escaped for the form it is written in.
"""

import html as escaping
from dataclasses import dataclass

import pandas as pd

from factlens.terminal import as_markdown

WRONG = "†"
"""Marks what is red, for those who cannot see it."""
RED = "#b3261e"
_MARKDOWN = str.maketrans({each: f"\\{each}" for each in "\\`*_[]<>#~&$"})
_LATEX = str.maketrans(
    {
        **{each: f"\\{each}" for each in "{}&%$#_"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "±": r"$\pm$",
        "↑": r"$\uparrow$",
        WRONG: r"$^\dagger$",
    }
)


@dataclass(frozen=True)
class Cell:
    """What stands in a cell, as plain text; nothing for what there is no value of."""

    text: str
    best: bool = False
    failed: bool = False


@dataclass(frozen=True)
class Printed:
    """A table as it is to be read."""

    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    names: int = 1
    """How many of the first columns hold names; the others hold numbers, which stand to the right."""
    groups: tuple[tuple[str, int], ...] = ()
    """The line above the headings: words, each over so many columns of numbers, from the first of them on."""
    begins: tuple[int, ...] = ()
    """Rows with which a part of the table begins."""


def markdown(table: Printed) -> str:
    """The caption and a Markdown table. It has no colours, so what is red has its mark alone, and no line above the headings."""
    rows = [
        [_marked(cell, cell.text.translate(_MARKDOWN), "**{}**", "{} " + WRONG) for cell in row]
        for row in table.rows
    ]
    columns = [each.translate(_MARKDOWN) for each in table.headings]
    caption = _one_line(table.caption).translate(_MARKDOWN)
    return f"{caption}\n\n{as_markdown(pd.DataFrame(rows, columns=columns))}\n"


def latex(table: Printed) -> str:
    """A `table` for LaTeX; needs the packages booktabs and xcolor."""
    numbers = len(table.headings) - table.names
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{_tex(table.caption)}}}"]
    lines += [rf"\begin{{tabular}}{{{'l' * table.names}{'r' * numbers}}}", r"\toprule"]
    if table.groups:
        words = [rf"\multicolumn{{{n}}}{{c}}{{{_tex(word)}}}" for word, n in table.groups]
        lines.append(" & ".join([*[""] * table.names, *words]).strip() + r" \\")
    lines += [" & ".join(map(_tex, table.headings)) + r" \\", r"\midrule"]
    red = r"\textcolor{{red}}{{{}" + _tex(WRONG) + "}}"
    for number, row in enumerate(table.rows):
        if number and number in table.begins:
            lines.append(r"\midrule")
        texts = [_tex(cell.text) for cell in row[: table.names]]
        # A hyphen in text is no minus.
        texts += [_tex(cell.text).replace("-", "$-$") for cell in row[table.names :]]
        cells = [
            _marked(cell, text, r"\textbf{{{}}}", red)
            for cell, text in zip(row, texts, strict=True)
        ]
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def html(table: Printed) -> str:
    """A `<table>` that needs no style sheet."""
    lines = [
        "<table>",
        f"<caption>{escaping.escape(_one_line(table.caption))}</caption>",
        "<thead>",
    ]
    if table.groups:
        words = [f'<th colspan="{n}">{escaping.escape(word)}</th>' for word, n in table.groups]
        lines.append(f"<tr>{'<th></th>' * table.names}{''.join(words)}</tr>")
    lines.append(f"<tr>{''.join(f'<th>{escaping.escape(x)}</th>' for x in table.headings)}</tr>")
    lines += ["</thead>", "<tbody>"]
    red = f'<span style="color: {RED}">{{}}{WRONG}</span>'
    for row in table.rows:
        cells = [_marked(cell, escaping.escape(cell.text), "<b>{}</b>", red) for cell in row]
        written = [f"<td>{each}</td>" for each in cells[: table.names]]
        written += [f'<td style="text-align: right">{each}</td>' for each in cells[table.names :]]
        lines.append(f"<tr>{''.join(written)}</tr>")
    return "\n".join([*lines, "</tbody>", "</table>", ""])


def _marked(cell: Cell, text: str, bold: str, red: str) -> str:
    """The escaped text of a cell with its marks."""
    text = bold.format(text) if cell.best else text
    return red.format(text) if cell.failed else text


def _tex(text: str) -> str:
    return _one_line(text).translate(_LATEX)


def _one_line(text: str) -> str:
    return " ".join(text.split())
