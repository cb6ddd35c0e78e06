"""`factlens models`: what there is, and what a model knows."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer

from factlens.commands.options import Device
from factlens.commands.shared import clear_errors, load, usage
from factlens.terminal import console, print_table, progress


def models_command(
    name: Annotated[str | None, typer.Argument(help="Show this model's card.")] = None,
    measure: Annotated[
        bool, typer.Option(help="Measure which of the bundled facts the model knows.")
    ] = False,
    split: Annotated[
        str,
        typer.Option(
            help="With --measure: templates seen in training (train) or not (held, fresh)."
        ),
    ] = "held",
    device: Device = None,
) -> None:
    """List the models that have a config, show the bundled model's card, or measure what a model knows.

    Examples:

      factlens models

      factlens models atlas

      factlens models atlas --measure
    """
    from factlens import atlas
    from factlens.configs import known_configs

    with clear_errors():
        if measure:
            _measure(name or "atlas", split, device)
        elif name == "atlas":
            from rich.markdown import Markdown

            console().print(Markdown((atlas.CHECKPOINT / "card.md").read_text(encoding="utf-8")))
        elif name is not None:
            _show_config(name)
        else:
            rows = [
                (config.name, ", ".join(config.models), str(config.trace.window), config.note)
                for config in known_configs().values()
            ]
            print_table(("config", "serves", "window", "note"), rows)
            console().print("Any other hub name or local folder works too, with defaults.")


def _measure(name: str, split: str, device: str | None) -> None:
    from factlens.facts import bundled_facts
    from factlens.knowledge import ask

    splits = ("train", "held", "fresh")
    if split not in splits:
        raise usage(f"no split {split!r}; there are {', '.join(splits)}")
    hooked = load(name, device, "float32")
    with progress("asking") as tell:
        known = ask(hooked, bundled_facts(cast("Any", split)), progress=lambda d, t: tell(d, t, ""))
    table = known.by_relation()
    rows = [tuple(row) for row in table.itertuples(index=False)]
    total, asked = int(table["known"].sum()), int(table["asked"].sum())
    rows.append(("all", asked, total, total / asked))
    print_table(("relation", "asked", "known", "share"), rows)


def _show_config(name: str) -> None:
    from factlens.configs import config_for
    from factlens.errors import ModelNotFound

    config = config_for(name)
    if config is None:
        raise ModelNotFound(f"no config serves {name!r}; `factlens models` lists them")
    rows = [("config", f"configs/{config.name}.yaml"), ("serves", ", ".join(config.models))]
    rows += [(key, str(value)) for key, value in vars(config.trace).items() if value is not None]
    rows += [("note", config.note)] if config.note else []
    print_table(("key", "value"), rows)
