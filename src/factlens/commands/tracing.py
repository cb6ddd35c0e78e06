"""`factlens trace`: one fact, or a few."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from factlens.commands.options import Device, Level, ModelName, Noise, Precision, Samples
from factlens.commands.shared import check_writable, clear_errors, level_of, load, usage
from factlens.terminal import console, progress, show_trace

if TYPE_CHECKING:
    from factlens.traces import Trace

DRAWN = 20
"""Facts drawn on a page; its table and the Parquet file hold all."""
DEFAULT_PROMPT = "The mother tongue of Charles Darwin is"
DEFAULT_SUBJECT = "Charles Darwin"


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
            help="Trace many facts instead of a prompt: a .csv, .jsonl or known_1000 .json file, or a name of `factlens data`."
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
    effect: Annotated[
        str,
        typer.Option(
            help="indirect, or direct: what flows past a part held at its corrupted value."
        ),
    ] = "indirect",
    noise: Noise = "gaussian",
    noise_level: Level = None,
    samples: Samples = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    metric: Annotated[
        str, typer.Option(help="prob, logprob, kl, or logit_diff (with --foil).")
    ] = "prob",
    answer: Annotated[
        str | None, typer.Option(help="The word to measure; by default what the model says.")
    ] = None,
    foil: Annotated[
        str | None,
        typer.Option(help="The other word of logit_diff; auto: what the corrupted run says."),
    ] = None,
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
    from factlens.data_folder import file_of
    from factlens.facts import Fact, read_facts
    from factlens.tracing import trace as run

    with clear_errors():
        if prompt is None and facts is None:
            prompt, subject = DEFAULT_PROMPT, subject or DEFAULT_SUBJECT
        if prompt is not None and facts is not None:
            raise usage("give a prompt or --facts, not both")
        if prompt is not None and subject is None:
            raise usage(f"say what {prompt!r} is about: --subject '...'")
        path = file_of(facts, "facts")
        wanted: Any = read_facts(path) if path is not None else Fact(str(prompt), str(subject))
        check_writable(out)
        hooked = load(model, device, dtype)
        with progress("tracing") as tell:
            traced = run(
                hooked,
                wanted,
                kinds=kind or ("state", "mlp", "attn"),
                window=window or None,
                severed=severed or "none",
                effect=effect,
                noise=noise,
                noise_level=level_of(noise_level),
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
