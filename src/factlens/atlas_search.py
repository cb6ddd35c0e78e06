"""`python -m factlens.atlas_search`: train variants of atlas, measure each, and set them side by side.

python -m factlens.atlas_search run                      # every variant, two at a time; goes on where it was stopped
python -m factlens.atlas_search run --only heads-1 --seed 1 --steps 6000
python -m factlens.atlas_search collect                  # what is finished, as one file of results
python -m factlens.atlas_search show docs/atlas-search.jsonl --figure search.png
"""

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from factlens.atlas.corpus import documents
from factlens.atlas.recipes import Recipe, as_json, shortened
from factlens.atlas.variants import variants
from factlens.atlas_results import read_results, write_results
from factlens.commands.shared import check_writable, clear_errors
from factlens.errors import OutputError, PlanError, RunError
from factlens.store import locked
from factlens.terminal import console, print_markdown, progress

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Train variants of atlas, measure each, and set them side by side.",
)

Plan = tuple[str, int, int | None]
"""A variant, a seed and a number of steps."""
RESULT = "result.json"
RECIPE = "recipe"
"""In a training's own folder its result holds the recipe; the file of all results does not."""
DIGESTED = 300
"""Documents of a text that stand for all of it."""
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "100000000",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Lets the C library keep memory between steps instead of asking the system anew: a fifth of a step's time."""
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
        every = [(name, each, steps) for each in (seed or [0]) for name in (only or variants())]
        plans = list(dict.fromkeys(every))
        recipes = {plan: recipe_of(*plan) for plan in plans}  # an unknown name is refused at once
        waiting = [plan for plan in plans if not finished(folder_of(out, *plan), recipes[plan])]
        failed = _run_all(out, plans, waiting, at_once, threads)
    for folder, log in failed.items():
        console(stderr=True).print(f"{folder} failed, see {log}", markup=False)
    if failed:
        raise typer.Exit(1)


def _run_all(
    out: Path, plans: list[Plan], waiting: list[Plan], at_once: int, threads: int
) -> dict[str, Path]:
    """Run what is waiting; the logs of those that failed. An interruption stops those at work and begins no other."""
    failed, before = {}, len(plans) - len(waiting)
    at_work: list[subprocess.Popen] = []
    with ThreadPoolExecutor(at_once) as pool, progress("trainings") as tell:
        tell(before, len(plans), "")
        running = {pool.submit(_in_process, out, plan, threads, at_work): plan for plan in waiting}
        try:
            for done, future in enumerate(as_completed(running), start=before + 1):
                code, log = future.result()
                name = folder_of(out, *running[future]).name
                if code:
                    failed[name] = log
                tell(done, len(plans), name)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in at_work:
                process.terminate()
            raise
    return failed


def _in_process(
    out: Path, plan: Plan, threads: int, at_work: list[subprocess.Popen]
) -> tuple[int, Path]:
    """One training in a process of its own: threads of two trainings in one would wait for each other.

    The process stands in `at_work` while it runs, so that an interruption can end it.
    """
    name, seed, steps = plan
    folder = folder_of(out, *plan)
    command = [sys.executable, "-m", "factlens.atlas_search", "one", name, "--seed", str(seed)]
    command += ["--threads", str(threads), "--out", str(out)]
    command += [] if steps is None else ["--steps", str(steps)]
    environment = {**KEEP_MEMORY, **os.environ, "OMP_NUM_THREADS": str(threads)}
    log = folder / "log.txt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment
            )
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror}") from None
    at_work.append(process)
    try:
        return process.wait(), log
    finally:
        at_work.remove(process)


@app.command()
def one(
    name: Annotated[str, typer.Argument(help="The variant.")],
    seed: Annotated[int, typer.Option()] = 0,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    out: Out = OUT,
) -> None:
    """Train and measure one variant in this process."""
    from factlens.atlas_measures import measured

    with clear_errors(kept=out):
        recipe = recipe_of(name, seed, steps)
        folder = folder_of(out, name, seed, steps)
        with locked(folder):
            result = {"variant": name, "seed": seed, **trained(recipe, folder, threads)}
            result |= {"text": text_digest(recipe), **measured(folder, recipe)}
            result[RECIPE] = as_json(recipe)
            write_results(folder / RESULT, [result])


def trained(recipe: Recipe, folder: Path, threads: int) -> dict[str, Any]:
    """Print how far names tell facts apart, train the recipe into its folder or go on there, and say what it took."""
    import torch

    from factlens.atlas.measuring import token_shares
    from factlens.atlas.training import Progress, export, kept_tokenizer, train

    def tell(done: Progress) -> None:
        if done.step % 50 == 0:
            print(f"step {done.step} of {done.steps}, loss {done.loss:.3f}", flush=True)

    torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = kept_tokenizer(recipe, folder / "tokenizer.json")
    for what, share in token_shares(tokenizer, recipe.book).items():
        print(f"{what}: {share:.3f}", flush=True)
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


def text_digest(recipe: Recipe) -> str:
    """What tells one training text from another: sha256 over its first documents."""
    share = recipe.cycles[-1].captions
    texts = documents(0, DIGESTED, recipe.diet, captions_share=share, book=recipe.book)
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def finished(folder: Path, recipe: Recipe) -> bool:
    """Whether a training was run and measured.

    Raises:
        RunError: one of another text or recipe stands there.
    """
    if not (folder / RESULT).exists():
        return False
    (result,) = read_results(folder / RESULT)
    for what, same in (
        ("text", result["text"] == text_digest(recipe)),
        ("recipe", result.get(RECIPE) == as_json(recipe)),
    ):
        if not same:
            raise RunError(
                f"{folder} holds a training of another {what}; remove it, or give another --out"
            )
    return True


# -- results ---------------------------------------------------------------------------------------


@app.command()
def collect(
    out: Out = OUT,
    to: Annotated[Path, typer.Option(help="File of results, one a line.")] = RESULTS,
) -> None:
    """Put finished trainings into the file of results, in the order of the variants; an older result of one of them is replaced."""
    with clear_errors():
        found = list(read_results(to)) if to.exists() else []
        for path in sorted(out.glob(f"*/{RESULT}")):
            found += ({k: v for k, v in row.items() if k != RECIPE} for row in read_results(path))
        names = dict.fromkeys([*variants(), *(row["variant"] for row in found)])
        places = {name: place for place, name in enumerate(names)}
        found.sort(key=lambda row: (places[row["variant"]], row["seed"], row["steps"]))
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
