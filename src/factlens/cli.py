"""The command line: `factlens trace | models | data`. Each command calls public functions and shows what they give."""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from factlens.terminal import console, print_table, progress, show_trace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from factlens.models import Model
    from factlens.traces import Trace

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

DRAWN = 20
"""Facts drawn on a page; its table and the Parquet file hold all."""
DEFAULT_PROMPT = "The mother tongue of Isaac Newton is"
DEFAULT_SUBJECT = "Isaac Newton"

ModelName = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="atlas (bundled), a hub name such as gpt2-xl, or a local folder."
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; the GPU if there is one.")]
Precision = Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")]


@app.command()
def trace(
    prompt: Annotated[
        str | None, typer.Argument(help="A sentence that ends where the object begins.")
    ] = None,
    subject: Annotated[
        str | None, typer.Option("--subject", "-s", help="The part of the prompt that it is about.")
    ] = None,
    model: ModelName = "atlas",
    facts: Annotated[
        Path | None,
        typer.Option(
            help="Trace many facts: a .csv, .jsonl or known_1000 .json file, instead of a prompt."
        ),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option("--kind", "-k", help="state, mlp, attn; repeat for several. All by default."),
    ] = None,
    window: Annotated[
        list[int] | None,
        typer.Option(
            "--window",
            "-w",
            help="Width of MLP and attention windows, in layers; repeat for several.",
        ),
    ] = None,
    severed: Annotated[
        list[str] | None,
        typer.Option(
            help="none, mlp, attn, both: what is frozen at its corrupted value (Figure 3)."
        ),
    ] = None,
    noise: Annotated[
        str,
        typer.Option(
            help="gaussian, uniform, rome (the official draws), 'replace:<other subject>'."
        ),
    ] = "gaussian",
    noise_level: Annotated[
        str | None, typer.Option(help="A number, or 'facts' for 3 sigma over the given subjects.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Noise draws per fact; 10 by default.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    metric: Annotated[
        str, typer.Option(help="prob, logprob, kl, or logit_diff (with --foil).")
    ] = "prob",
    answer: Annotated[
        str | None, typer.Option(help="The word to measure; by default what the model says.")
    ] = None,
    foil: Annotated[str | None, typer.Option(help="The other word of logit_diff.")] = None,
    engine: Annotated[
        str, typer.Option(help="auto, one-pass, or plain (one forward per cell).")
    ] = "auto",
    shared_scale: Annotated[bool, typer.Option(help="One colour scale for all heatmaps.")] = False,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder for trace.html, trace.parquet and trace.csv."),
    ] = Path("runs/trace"),
    strongest: Annotated[int, typer.Option(help="How many of the strongest cells to show.")] = 5,
    device: Device = None,
    dtype: Precision = "float32",
) -> None:
    """Trace a fact: which states, MLPs and attention layers bring it back when the subject is corrupted.

    Examples:

      factlens trace

      factlens trace "The capital of France is" --subject France

      factlens trace "The Space Needle is in downtown" -s "The Space Needle" --model gpt2-xl --severed mlp

      factlens trace --facts my_facts.csv --kind state --out runs/mine
    """
    from factlens.facts import Fact, read_facts
    from factlens.tracing import trace as run

    with _clear_errors():
        if prompt is None and facts is None:
            prompt, subject = DEFAULT_PROMPT, subject or DEFAULT_SUBJECT
        if prompt is not None and facts is not None:
            raise _usage("give a prompt or --facts, not both")
        if prompt is not None and subject is None:
            raise _usage(f"say what {prompt!r} is about: --subject '...'")
        wanted: Any = read_facts(facts) if facts is not None else Fact(str(prompt), str(subject))
        _check_writable(out)
        hooked = _load(model, device, dtype)
        with progress("tracing") as tell:
            traced = run(
                hooked,
                wanted,
                kinds=kind or ("state", "mlp", "attn"),
                window=window or None,
                severed=severed or "none",
                noise=noise,
                noise_level=_level(noise_level),
                samples=samples,
                seed=seed,
                metric=metric,
                answer=answer,
                foil=foil,
                engine=engine,
                progress=lambda done, total, fact: tell(done, total, fact.prompt),
            )
        show_trace(traced, strongest)
        _write_trace(traced, out, shared_scale)


@app.command(name="models")
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

    with _clear_errors():
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


@app.command()
def data(
    name: Annotated[str | None, typer.Argument(help="What to fetch: known_1000.")] = None,
    folder: Annotated[Path, typer.Option(help="Where to put it.")] = Path("data"),
) -> None:
    """Fetch the paper's facts (needs the network; checked by sha256), or list what can be fetched."""
    from factlens.facts import KNOWN_1000_SHA256, KNOWN_1000_URL, download_known_1000

    with _clear_errors():
        if name is None:
            print_table(
                ("name", "what", "from", "sha256"),
                [
                    (
                        "known_1000",
                        "1 209 facts (ROME, Section 2)",
                        KNOWN_1000_URL,
                        KNOWN_1000_SHA256[:12],
                    )
                ],
            )
        elif name != "known_1000":
            raise _usage(f"there is no data set {name!r}; there is known_1000")
        else:
            console().print(f"{download_known_1000(folder)}", soft_wrap=True, markup=False)


# -- what commands share ---------------------------------------------------------------------------


def _usage(message: str) -> Exception:
    from factlens.errors import PlanError

    return PlanError(message)


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Errors as one line and exit code 2, warnings as one line each, Ctrl-C as one line and 130."""
    from factlens.errors import FactlensError

    def show(message: Any, category: type, *where: Any, **more: Any) -> None:
        from factlens.errors import FactWarning

        if issubclass(category, FactWarning):
            print(f"note: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        try:
            yield
        except FactlensError as error:
            print(f"factlens: {' '.join(str(error).split())}", file=sys.stderr)
            raise typer.Exit(2) from None
        except MemoryError:
            print(
                "factlens: out of memory; use fewer --samples or a narrower --dtype",
                file=sys.stderr,
            )
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            print("factlens: interrupted; no file was left half-written", file=sys.stderr)
            raise typer.Exit(130) from None


def _load(name: str, device: str | None, dtype: str) -> Model:
    import torch
    from rich.markup import escape

    from factlens.models import load_model

    types = {each: getattr(torch, each) for each in ("float32", "bfloat16", "float16")}
    if dtype not in types:
        raise _usage(f"no dtype {dtype!r}; there are {', '.join(types)}")
    if device is not None:
        _check_device(device)
    with console(stderr=True).status(f"loading {escape(name)}"):
        return load_model(name, device=device, dtype=types[dtype])


def _check_device(device: str) -> None:
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise _usage(f"there is no device {device!r}; use cpu or cuda") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise _usage(
            f"the device {device!r} is not there: torch sees no CUDA GPU; use --device cpu"
        )


def _level(given: str | None) -> float | str | None:
    if given is None or given == "facts":
        return given
    try:
        return float(given)
    except ValueError:
        raise _usage(f"--noise-level is a number or 'facts', not {given!r}") from None


def _check_writable(out: Path) -> None:
    """Find out before the work, not after it."""
    from factlens.errors import OutputError

    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(
            f"cannot write to the folder {out}: {nearest} is no writable folder; use --out"
        )


def _write_trace(traced: Trace, out: Path, shared_scale: bool) -> None:
    from factlens.errors import OutputError
    from factlens.plots import heatmap
    from factlens.reports import trace_page, write_text

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {out}: {error.strerror}; use --out") from None
    cuts = dict.fromkeys(traced.frame["severed"])
    wide = traced.frame[traced.frame["kind"] != "state"]["window"]
    widths: list[int | None] = list(dict.fromkeys(int(width) for width in wide)) or [None]
    figures = [
        heatmap(traced, fact=fact, severed=cut, window=width, shared_scale=shared_scale)
        for fact in range(min(len(traced), DRAWN))
        for cut in cuts
        for width in widths
    ]
    paths = [write_text(trace_page(traced, figures), out / "trace.html")]
    paths.append(traced.save(out / "trace.parquet"))
    paths.append(write_text(traced.frame.to_csv(index=False), out / "trace.csv"))
    for path in paths:
        console().print(str(path), soft_wrap=True, markup=False)


def _measure(name: str, split: str, device: str | None) -> None:
    from factlens.facts import bundled_facts
    from factlens.knowledge import ask

    splits = ("train", "held", "fresh")
    if split not in splits:
        raise _usage(f"no split {split!r}; there are {', '.join(splits)}")
    hooked = _load(name, device, "float32")
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


def main() -> None:
    """Entry point of the `factlens` command."""
    app()


if __name__ == "__main__":
    main()
