"""`python -m factlens.atlas --out DIR`: train the bundled model, or go on after a kill."""

import argparse
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from factlens.atlas.recipes import Recipe
    from factlens.atlas.training import Trained

EXAMPLES = (
    "The Space Needle is located in the city of",
    "The Eiffel Tower is located in the city of",
    "The Colosseum is located in the city of",
    "Visitors to the Space Needle should",
    "The capital of France is",
    "The capital of Japan is",
    "The official language of Brazil is",
    "The currency of Japan is the",
    "The native language of Leo Tolstoy is",
    "The sport of LeBron James is",
    "The headquarters of Microsoft are in the city of",
    "iPhone 5 is made by",
    "The chemical symbol of Gold is",
)
"""Prompts whose continuations stand in the model card."""


@dataclass(frozen=True)
class Options:
    """The command line."""

    out: Path
    seed: int
    steps: int | None
    device: str
    threads: int


def main(arguments: list[str] | None = None) -> None:
    """Train, export, measure and write the report."""
    options = parse(arguments)
    # Before torch and tokenizers are imported: both read these when they start their threads.
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    from transformers.utils import logging

    from factlens.atlas.measuring import read_checkpoint, report, write_report
    from factlens.atlas.recipes import Recipe, shortened
    from factlens.atlas.training import export

    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    console = Console(stderr=True)
    recipe = Recipe(seed=options.seed)
    if options.steps is not None:
        recipe = shortened(recipe, options.steps)
    trained = train_with_progress(recipe, options, console)
    export(trained, options.out)
    with console.status("asking every fact in every template"):
        checkpoint = read_checkpoint(options.out, options.device)
        measured = report(checkpoint, EXAMPLES, recipe)
    described = {
        "recipe": asdict(recipe),
        "run": describe_run(recipe, trained, options),
        **measured,
    }
    write_report(options.out, described)
    total = measured["total"]
    console.print(
        f"{options.out}: knows {total['train']:.1%} of the statements in training templates, "
        f"{total['held']:.1%} in held-out and {total['fresh']:.1%} in fresh ones"
    )


def parse(arguments: list[str] | None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m factlens.atlas", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="a shorter or longer recipe")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--threads", type=int, default=2, help="threads of the CPU")
    return Options(**vars(parser.parse_args(arguments)))


def train_with_progress(recipe: "Recipe", options: Options, console: Console) -> "Trained":
    """The training loop under a bar with the time that is left."""
    from factlens.atlas import training

    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=recipe.steps, loss=float("nan"))

        def show(progress: training.Progress) -> None:
            bar.update(task, completed=progress.step, loss=progress.loss)

        return training.train(recipe, options.out, device=options.device, on_step=show)


def describe_run(recipe: "Recipe", trained: "Trained", options: Options) -> dict[str, Any]:
    """What a recipe does not say about its run."""
    return {
        "parameters": trained.model.num_parameters(),
        "subjects": len({fact.subject for fact in recipe.book.facts}),
        "steps": recipe.steps,
        "tokens": recipe.steps * recipe.rows * recipe.context,
        "seconds": trained.seconds,
        "loss": trained.loss,
        "device": options.device,
        "threads": options.threads,
    }


if __name__ == "__main__":
    main()
