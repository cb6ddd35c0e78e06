"""The command line: `factlens trace | average | report | edit | ...`. Each command calls public functions."""

from __future__ import annotations

import typer

from factlens.commands.applying import apply, diff
from factlens.commands.averaging import average, report
from factlens.commands.editing import edit
from factlens.commands.evaluating import evaluate
from factlens.commands.fetching import data
from factlens.commands.listing import models_command
from factlens.commands.papering import paper
from factlens.commands.rating import rate
from factlens.commands.statistics import stats
from factlens.commands.sweeping import sweep
from factlens.commands.tracing import trace
from factlens.commands.training_editors import train_editor
from factlens.commands.tuning import tune

app = typer.Typer(
    name="factlens",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help=(
        "Where does a language model store a fact, and can it be changed there?\n\n"
        "Start with [bold]factlens trace[/bold]: with no arguments it traces a fact on atlas, the small model "
        "that ships with factlens, offline and in seconds. [bold]factlens edit[/bold] then changes one."
    ),
)
for command in (
    trace,
    average,
    report,
    edit,
    apply,
    diff,
    stats,
    evaluate,
    sweep,
    tune,
    paper,
    data,
):
    app.command()(command)
app.command(name="models")(models_command)
app.command(name="train-editor")(train_editor)
app.add_typer(rate)


def main() -> None:
    """Entry point of the `factlens` command."""
    app()


if __name__ == "__main__":
    main()
