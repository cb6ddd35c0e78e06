"""`python -m factlens.atlas_search`: train variants of atlas, measure each, and set them side by side.

python -m factlens.atlas_search run                      # every variant, two at a time; goes on where it was stopped
python -m factlens.atlas_search run --only heads-1 --seed 1 --steps 6000
python -m factlens.atlas_search collect                  # what is finished, as one file of results
python -m factlens.atlas_search show docs/atlas-search.jsonl --figure search.png
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer

from factlens.atlas.recipes import Recipe, shortened
from factlens.atlas.variants import variants
from factlens.atlas_results import read_results, write_results
from factlens.commands.shared import check_writable, clear_errors
from factlens.errors import PlanError
from factlens.terminal import console, print_markdown, progress

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)

RESULT = "result.json"
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "100000000",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Lets the C library keep memory between steps instead of asking the system anew: a fifth of a step's time."""
STATEMENTS = 2500
"""Statements of each split that are asked."""
FACTS = 240
RECORDS = 24
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of the trainings.")]
OUT = Path("runs/search")
RESULTS = Path("docs/atlas-search.jsonl")


@app.command()
def run(
    only: Annotated[
        list[str] | None,
        typer.Option(help="A variant by name; repeat for several; all without it."),
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Repeat for several.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="A longer or shorter training.")] = None,
    at_once: Annotated[int, typer.Option(min=1, help="Trainings side by side.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the CPU for each.")] = 1,
    out: Out = OUT,
) -> None:
    """Train and measure; what is finished is skipped, what was interrupted goes on."""
    with clear_errors(kept=out):
        check_writable(out)
        plans = [(name, each, steps) for each in (seed or [0]) for name in (only or variants())]
        for plan in plans:
            recipe_of(*plan)  # an unknown name is refused before anything runs
        waiting = [plan for plan in plans if not (folder_of(out, *plan) / RESULT).exists()]
        finished, failed = len(plans) - len(waiting), 0
        with ThreadPoolExecutor(at_once) as pool, progress("trainings") as tell:
            tell(finished, len(plans), "")
            running = {pool.submit(_in_process, out, plan, threads): plan for plan in waiting}
            for done, future in enumerate(as_completed(running), start=finished + 1):
                code, log = future.result()
                name = folder_of(out, *running[future]).name
                failed += code != 0
                said = "finished" if code == 0 else f"failed, see {log}"
                console(stderr=True).print(f"{name}: {said}", markup=False)
                tell(done, len(plans), name)
    if failed:
        raise typer.Exit(1)


def _in_process(out: Path, plan: tuple[str, int, int | None], threads: int) -> tuple[int, Path]:
    """One training in a process of its own: threads of two trainings in one would wait for each other."""
    name, seed, steps = plan
    folder = folder_of(out, *plan)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "factlens.atlas_search", "one", name, "--seed", str(seed)]
    command += ["--threads", str(threads), "--out", str(out)]
    command += [] if steps is None else ["--steps", str(steps)]
    environment = {**KEEP_MEMORY, **os.environ, "OMP_NUM_THREADS": str(threads)}
    log = folder / "log.txt"
    with log.open("a", encoding="utf-8") as file:
        done = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False
        )
    return done.returncode, log


@app.command()
def one(
    name: Annotated[str, typer.Argument(help="The variant.")],
    seed: Annotated[int, typer.Option()] = 0,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    out: Out = OUT,
) -> None:
    """Train and measure one variant in this process."""
    with clear_errors(kept=out):
        recipe = recipe_of(name, seed, steps)
        folder = folder_of(out, name, seed, steps)
        result = {"variant": name, "seed": seed, **trained(recipe, folder, threads)}
        result |= measured(folder, recipe)
        write_results(folder / RESULT, [result])


def trained(recipe: Recipe, folder: Path, threads: int) -> dict[str, Any]:
    """Train a recipe into its folder, or go on there, and say what it took."""
    import torch

    from factlens.atlas.training import Progress, export, train

    def tell(done: Progress) -> None:
        if done.step % 50 == 0:
            print(f"step {done.step} of {done.steps}, loss {done.loss:.3f}", flush=True)

    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    done = train(recipe, folder, device=device, on_step=tell)
    export(done, folder)
    return {
        "steps": recipe.steps,
        "tokens": recipe.steps * recipe.rows * recipe.context,
        "minutes": round(done.seconds / 60, 2),
        "loss": round(done.loss, 4),
        "threads": threads,
        "device": device,
        "parameters": done.model.num_parameters(),
    }


def measured(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Everything that is measured of a trained checkpoint."""
    from factlens.atlas.books import fact_book
    from factlens.atlas.measuring import SPLITS, known, read_checkpoint, token_shares
    from factlens.atlas.tables import statements, world
    from factlens.atlas_measures import edits_by_layer, site
    from factlens.models import load_model

    of = world(*recipe.world)
    checkpoint = read_checkpoint(folder)
    shares = {}
    for split in SPLITS:
        if stated := list(statements(split, of)):
            some = Random(split).sample(stated, min(STATEMENTS, len(stated)))
            shares[split] = round(sum(known(checkpoint, some)) / len(some), 4)
    print(f"known: {shares}", flush=True)
    model = load_model(folder)
    found = site(model, recipe, FACTS)
    print(f"ATE {found['ate']}, beyond {found['beyond_at_peak']}", flush=True)
    columns = ["layer", "S", "ES", "PS", "NS", "retention", "n"]
    edited = edits_by_layer(model, recipe, n=RECORDS)[columns].sort_values("layer")
    return {
        "known": shares,
        "tokens_of_subjects": token_shares(checkpoint.tokenizer, fact_book(*recipe.world)),
        "site": found,
        "rome": json.loads(edited.round(2).to_json(orient="records")),
    }


def recipe_of(name: str, seed: int, steps: int | None) -> Recipe:
    """The recipe of a variant with a seed, at its own or at another length.

    Raises:
        PlanError: no such variant.
    """
    every = variants()
    if name not in every:
        raise PlanError(f"no variant {name!r}; there are {', '.join(every)}")
    recipe = replace(every[name].recipe, seed=seed)
    return recipe if steps is None else shortened(recipe, steps)


def folder_of(out: Path, name: str, seed: int, steps: int | None) -> Path:
    """Where a training stands."""
    return out / f"{name}-seed-{seed}{'' if steps is None else f'-steps-{steps}'}"


# -- results ---------------------------------------------------------------------------------------


@app.command()
def collect(
    out: Out = OUT,
    to: Annotated[Path, typer.Option(help="File of results, one a line.")] = RESULTS,
) -> None:
    """Put finished trainings into the file of results; one that stands there already is replaced."""
    with clear_errors():
        found = list(read_results(to)) if to.exists() else []
        for path in sorted(out.glob(f"*/{RESULT}"), key=lambda path: path.stat().st_mtime):
            found += read_results(path)
        write_results(to, found)
        console().print(str(to), markup=False)


@app.command()
def show(
    results: Annotated[Path, typer.Argument(help="File of results.")] = RESULTS,
    figure: Annotated[Path | None, typer.Option(help="Also a figure, as .html or .png.")] = None,
) -> None:
    """The table of `docs/atlas.md`, and its figure."""
    from factlens import atlas_results
    from factlens.images import save

    with clear_errors():
        found = list(read_results(results))
        print_markdown(atlas_results.shown(atlas_results.table(found)))
        if figure is not None:
            save(atlas_results.figure(found), figure)


if __name__ == "__main__":
    app()
