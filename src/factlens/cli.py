"""The command line: `factlens trace | average | report | models | data`. Each command calls public functions."""

from __future__ import annotations

import typer

from factlens.commands.averaging import average, report
from factlens.commands.listing import data, models_command
from factlens.commands.tracing import trace

app = typer.Typer(
    name="factlens",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help=(
        "Where does a language model store a fact, and can it be changed there?\n\n"
        "Start with [bold]factlens trace[/bold]: with no arguments it traces a fact on atlas, the small model "
        "that ships with factlens, offline and in seconds."
    ),
)
for command in (trace, average, report, data):
    app.command()(command)
app.command(name="models")(models_command)


def main() -> None:
    """Entry point of the `factlens` command."""
    app()


if __name__ == "__main__":
    main()
