"""What commands print, and documents show: tables, a progress bar, the summary of a trace. rich is imported when first needed."""

from __future__ import annotations

import re
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    import pandas as pd

    from factlens.summaries import Summary
    from factlens.traces import Trace

NUMBER = re.compile(r"[*]*[+-]?\d[\d., ]*( ?%)?[*]*( ?[±(].*)?$")
"""A cell that stands to the right: a number, with its interval or margin."""


def console(*, stderr: bool = False) -> Any:
    """Where to print: standard output for results, standard error for everything else."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


@contextmanager
def progress(what: str, *, in_bytes: bool = False) -> Iterator[Any]:
    """A bar with the time left, `in_bytes` with what is there and how fast it comes, on stderr; nothing where nobody looks."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    further = (DownloadColumn(), TransferSpeedColumn()) if in_bytes else ()
    columns = (TextColumn("{task.description}"), BarColumn(), *further, TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)

        def tell(done: int, total: int, text: str) -> None:
            from rich.markup import escape

            bar.update(task, completed=done, total=total, description=f"{what} {escape(text[:48])}")

        yield tell


def plain(text: object) -> str:
    """Text from a file or a model without what a terminal would obey."""
    return "".join(each if each.isprintable() or each == "\n" else "\ufffd" for each in str(text))


def print_table(
    columns: tuple[str, ...], rows: list[tuple[Any, ...]], *, whole: Collection[str] = ()
) -> None:
    """A table without lines; numbers to the right, floats with four digits, the columns `whole` never cut or wrapped."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        numeric = bool(rows) and isinstance(rows[0][number], float | int)
        table.add_column(
            column, justify="right" if numeric else "left", no_wrap=column in whole,
            min_width=max((len(str(row[number])) for row in rows), default=0) if column in whole else None,
        )  # fmt: skip
    for row in rows:
        # Text, not markup: cells come from data.
        table.add_row(*[Text(f"{x:.4f}" if isinstance(x, float) else str(x)) for x in row])
    console().print(table)


def show_trace(traced: Trace, count: int) -> None:
    """The terminal summary: total effects, then the strongest cells of each kind."""
    from rich.text import Text

    totals = traced.totals().head(10)
    for row in totals.itertuples(index=False):
        line = Text.assemble((row.prompt, "bold"), " → ", (row.answer.strip(), "bold"))
        line.append(f"   clean {row.clean:.3f}, corrupted {row.corrupted:.3f}")
        line.append(f", total effect {row.total_effect:+.3f}")
        console().print(line, soft_wrap=True)
    if len(traced) > len(totals):
        console().print(f"… and {len(traced) - len(totals)} more facts")
    rows = []
    for kind in dict.fromkeys(traced.frame["kind"]):
        for cell in traced.strongest(count, kind=kind).itertuples(index=False):
            token = cell.token.strip() or "␣"
            rows.append(
                (kind, cell.window, cell.severed, cell.layer, token, cell.role, float(cell.effect))
            )
    print_table(("kind", "window", "severed", "layer", "token", "role", "effect"), rows)
    info = traced.info
    console().print(
        f"{info['model']}, {info['engine']} engine, {info['samples']} samples, noise level "
        f"{info['noise_level']:.4f} ({info['noise_source']}), {info['seconds']:.2f} s",
        style="dim",
        soft_wrap=True,
        markup=False,
    )
    if info["fallback_reason"]:
        reason = f"one forward pass per cell, because {info['fallback_reason']}"
        console().print(reason, soft_wrap=True, markup=False)
    for prompt, reason in traced.skipped[:5]:
        print(f"skipped {prompt!r}: {reason}", file=sys.stderr)
    if len(traced.skipped) > 5:
        print(f"… and {len(traced.skipped) - 5} more facts skipped", file=sys.stderr)


def show_run(summary: Summary) -> None:
    """The terminal summary of a run: total effect, the claims and their verdicts, time."""
    run, total = summary.run, summary.ate.iloc[0]
    line = (
        f"{run.main.info['model']}: {len(run.main)} facts of {int(run.knowledge['known'].sum())} known, "
        f"of {len(run.knowledge)} asked; clean "
        f"{total['clean']:.3f}, corrupted {total['corrupted']:.3f}, average total effect {total['ate']:.4f} "
        f"({total['low']:.4f} to {total['high']:.4f})"
    )
    console().print(line, soft_wrap=True, markup=False, style="bold")
    columns = ["claim", "difference", "low", "high", "n_facts", "verdict"]
    print_table(
        tuple(columns), [tuple(row) for row in summary.claims[columns].itertuples(index=False)]
    )
    skipped = ", ".join(f"{row.facts} {row.reason}" for row in summary.skipped.itertuples())
    info = run.main.info
    console().print(
        f"{info['engine']} engine, {info['samples']} samples, noise level {info['noise_level']:.4f} "
        f"({info['noise_source']}), {run.seconds:.0f} s in all. Not traced: {skipped or 'none'}",
        style="dim",
        soft_wrap=True,
        markup=False,
    )


def as_markdown(table: pd.DataFrame) -> str:
    """A frame as a Markdown table: missing values are empty cells, and columns of numbers stand to the right."""
    text = table.map(lambda cell: "" if cell is None or cell != cell else _cell(cell))
    numbers = [
        any(text[column]) and all(NUMBER.match(cell) for cell in text[column] if cell)
        for column in text
    ]
    cells = [tuple(map(_cell, text.columns)), *text.itertuples(index=False, name=None)]
    lines = ["|" + "".join(f" {x} |" if x else " |" for x in line) for line in cells]
    lines.insert(1, "|" + "".join("---:|" if number else "---|" for number in numbers))
    return "\n".join(lines)


def _cell(content: object) -> str:
    return " ".join(str(content).split()).replace("|", "\\|")


def print_markdown(table: pd.DataFrame) -> None:
    """A frame as a Markdown table on standard output, for documents."""
    print(as_markdown(table))
