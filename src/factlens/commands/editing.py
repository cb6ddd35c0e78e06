"""`factlens edit`: change a fact, or several, and see what it did."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from factlens.commands.edit_plans import questions_of, show_plan
from factlens.commands.options import Device, ModelName, Precision
from factlens.commands.shared import check_writable, clear_errors, load, usage
from factlens.terminal import console, plain, print_table, progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from factlens.benchmarks.counterfact import Record
    from factlens.corpora import Corpus
    from factlens.edit_pages import Asked, Outcome
    from factlens.editors.rome_config import ROMEConfig
    from factlens.edits import Edit
    from factlens.facts import Rewrite
    from factlens.models import Model
    from factlens.moments import KeyMoment
    from factlens.traces import Trace

DEFAULT_PROMPT = "The Eiffel Tower is located in the city of"
DEFAULT_SUBJECT, DEFAULT_TARGET = "The Eiffel Tower", "Rome"
SHOWN = 40
"""Rows of the table on the terminal; the page holds all."""
WRITTEN = 6
"""At most so many texts are begun where no --prompt says which."""
TRACED = 200_000_000
"""Up to so many parameters the edited prompt is traced too; more only on a GPU."""
Given = list[tuple["Rewrite", "Record | None"]]


def edit(
    prompt: Annotated[
        str | None,
        typer.Argument(help="A sentence that ends where the object begins; {} is the subject."),
    ] = None,
    subject: Annotated[
        str | None, typer.Option("--subject", "-s", help="The part of the prompt that it is about.")
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="The new object: what it should say next.")
    ] = None,
    model: ModelName = "atlas",
    rewrites: Annotated[
        Path | None,
        typer.Option(
            help="Several facts into one edit: a .csv or .jsonl with prompt, subject, target, CounterFact's .json, or a name of `factlens data`."
        ),
    ] = None,
    layer: Annotated[
        int | None, typer.Option("--layer", "-l", help="0-based; by default the model's own.")
    ] = None,
    clamp: Annotated[
        float | None,
        typer.Option(help="Longest shift, in lengths of the MLP's output before the edit."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="ROME's numbers: our YAML, an official JSON file, or one of EasyEdit's YAML files."
        ),
    ] = None,
    paraphrase: Annotated[
        list[str] | None,
        typer.Option(help="The same fact in other words ({} is the subject); repeat."),
    ] = None,
    neighbour: Annotated[
        list[str] | None,
        typer.Option(help="A prompt about another subject, which should not change; repeat."),
    ] = None,
    generation: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="Write on from here, before and after; repeat."),
    ] = None,
    tokens: Annotated[
        int, typer.Option("--tokens", "-n", min=1, help="How many tokens to write.")
    ] = 30,
    stats_tokens: Annotated[
        str | None,
        typer.Option(
            help="Keys for the statistics: auto (10 per neuron), paper, or a number; by default what is stored."
        ),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="Gather the statistics from this .txt or .jsonl file; repeat."),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Or from this data set of the Hugging Face hub.")
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for edit.safetensors and edit.html.")
    ] = Path("runs/edit"),
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Say where it would edit and what it would take; write nothing."
        ),
    ] = False,
    device: Device = None,
    dtype: Precision = "float32",
) -> None:
    """Change a fact: by a rank-one edit of one MLP (ROME), kept as a small file. The model itself is not touched.

    Shows what the model says before and after: at the prompt, its paraphrases, neighbours (other subjects with the same
    object), and the subject's other facts. Of the bundled facts these are found; else give --paraphrase and --neighbour.

    The first edit of a layer gathers statistics of its keys (atlas: seconds; a hub model: Wikipedia). --dry-run says
    what that takes, and `factlens stats` does it beforehand.

    Examples:

      factlens edit                                the Eiffel Tower moves to Rome, in seconds, offline

      factlens edit "The capital of France is" --subject France --target Rome

      factlens edit "The Space Needle is in downtown" -s "The Space Needle" -t Paris --model gpt2-xl --dry-run

      factlens edit "{} plays the" -s "Miles Davis" -t guitar --paraphrase "{} is a master of the" --neighbour "Chet Baker plays the"

      factlens edit --rewrites counterfact.json --config hparams/ROME/gpt2-xl.json --model gpt2-xl

      factlens apply runs/edit/edit.safetensors --prompt "The Space Needle is in"
    """
    from factlens.data_folder import file_of

    with clear_errors():
        if text and dataset:
            raise usage("give --text or --dataset, not both")
        file = file_of(rewrites, "counterfact")
        given = _given(prompt, subject, target, file, bool(paraphrase or neighbour))
        if not dry_run:
            check_writable(out)
        hooked = load(model, device, dtype)
        plan = _plan(hooked, config, layer, clamp, stats_tokens)
        corpus = _corpus(text or [], dataset)
        if dry_run:
            show_plan(hooked, [rewrite for rewrite, _ in given], plan, corpus)
            return
        asked = _asked(given, paraphrase or [], neighbour or [])
        written = generation or _beginnings(given)
        outcome = _edited(hooked, given, plan, corpus, asked, written, tokens, out)
        _show(outcome)
        _write_page(outcome, model, out)


# -- what is asked for -----------------------------------------------------------------------------


def _given(
    prompt: str | None, subject: str | None, target: str | None, file: Path | None, more: bool
) -> Given:
    """The rewrites, each with the record that has its paraphrases and neighbours, if there is one."""
    from factlens.facts import Rewrite
    from factlens.rewrites import read_rewrites

    if file is not None:
        if prompt is not None or subject is not None or target is not None or more:
            raise usage("--rewrites brings its own prompts; give it, or a prompt and its options")
        return [
            (rewrite, record) if record else _with_record(rewrite)
            for rewrite, record in read_rewrites(file)
        ]
    if prompt is None:
        prompt, subject = DEFAULT_PROMPT, subject or DEFAULT_SUBJECT
        target = DEFAULT_TARGET if target is None else target
    if subject is None or target is None:
        option = "--subject" if subject is None else "--target"
        what = "what it is about" if subject is None else "what it should say instead"
        raise usage(f"say of {prompt!r} {what}: {option} '...'")
    return [_with_record(Rewrite(prompt, subject, target))]


def _with_record(rewrite: Rewrite) -> tuple[Rewrite, Record | None]:
    """The rewrite with what the bundled tables know of its prompt: the true object, paraphrases, neighbours."""
    from dataclasses import replace

    from factlens.edit_pages import bundled_record

    record = bundled_record(rewrite)
    if record is None or rewrite.true is not None:
        return rewrite, record
    return replace(rewrite, true=record.target_true.text), record


def _plan(
    model: Model, file: Path | None, layer: int | None, clamp: float | None, tokens: str | None
) -> ROMEConfig:
    """The model's numbers, changed by the file, and that by the options."""
    from dataclasses import replace

    from factlens.editors.rome_config import rome_config_for

    named = {"layer": layer, "max_norm_ratio": clamp, "moment_tokens": tokens}
    changes: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    return rome_config_for(model, replace(rome_config_for(model, file), **changes))


def _corpus(texts: Sequence[Path], dataset: str | None) -> Corpus | None:
    from factlens.corpora import text_files
    from factlens.corruption import cache_folder
    from factlens.hub_corpora import hub_dataset

    if texts:
        return text_files(texts)
    return hub_dataset(dataset, folder=cache_folder() / "datasets") if dataset else None


def _asked(given: Given, paraphrases: Sequence[str], neighbours: Sequence[str]) -> list[Asked]:
    from factlens.edit_pages import asked_about

    return [
        asked
        for rewrite, record in given
        for asked in asked_about(
            rewrite, record=record, paraphrases=paraphrases, neighbours=neighbours
        )
    ]


def _beginnings(given: Given) -> list[str]:
    """Where texts begin if nobody says: the prompts themselves, and each subject by itself."""
    texts = [text for rewrite, _ in given for text in (rewrite.prompt, f"{rewrite.subject} is")]
    return list(dict.fromkeys(texts))[:WRITTEN]


# -- the edit --------------------------------------------------------------------------------------


def _edited(
    model: Model,
    given: Given,
    plan: ROMEConfig,
    corpus: Corpus | None,
    asked: Sequence[Asked],
    written: list[str],
    tokens: int,
    out: Path,
) -> Outcome:
    """Ask, edit, keep the edit, ask again. The texts come first: what cannot be asked is said before the work."""
    from factlens.alarms import alarm, edit_health
    from factlens.edit_pages import Outcome, answers, before_and_after, texts_before_and_after
    from factlens.editors.rome import rome
    from factlens.edits import applied
    from factlens.generation import generate

    questions_of(model, [rewrite for rewrite, _ in given], plan)
    before, texts = answers(model, asked), generate(model, written, max_new_tokens=tokens)
    begun = time.perf_counter()
    moment = _moment(model, plan, corpus)
    gathered = time.perf_counter()
    with progress("finding the value") as tell:
        made = rome(
            model, [rewrite for rewrite, _ in given], plan, moment=moment,
            progress=lambda done, total: tell(done, total, f"step {done} of {total}"),
        )  # fmt: skip
    seconds = {"statistics": gathered - begun, "edit": time.perf_counter() - gathered}
    _save(made, out)
    with console(stderr=True).status("asking again"):
        with applied(model, made):
            table = before_and_after(before, answers(model, asked))
            after = generate(model, written, max_new_tokens=tokens)
        health = edit_health(model, made)
        alarms = tuple(alarm(model, made)) if health["alarm"].any() else ()
        traces = _traces(model, made, given[0][0])
    continued = texts_before_and_after(written, texts, after)
    return Outcome(made, table, continued, health, alarms, traces, seconds)


def _moment(model: Model, plan: ROMEConfig, corpus: Corpus | None) -> KeyMoment | None:
    from factlens.key_statistics import moment_for

    if plan.moment == "identity":
        return None
    with progress("gathering keys") as tell:
        return moment_for(
            model, int(str(plan.layer)), corpus=corpus, tokens=plan.moment_tokens,
            progress=lambda done, total: tell(done, total, f"{done} of {total}"),
        )  # fmt: skip


def _traces(model: Model, made: Edit, rewrite: Rewrite) -> tuple[Trace, Trace] | None:
    """The states' traces before and after, where they are cheap and the prompt can be traced."""
    import warnings

    from factlens import models
    from factlens.edits import applied
    from factlens.errors import FactError, FactWarning
    from factlens.tracing import trace

    size = sum(each.numel() for each in model.parameters())
    if size > TRACED and models.device_of(model).type == "cpu":
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FactWarning)  # Said of the edit already.
        try:
            before = trace(model, rewrite.prompt, subject=rewrite.subject, kinds="state")
            with applied(model, made):
                after = trace(model, rewrite.prompt, subject=rewrite.subject, kinds="state")
        except FactError:
            return None
    return before, after


def _save(made: Edit, out: Path) -> Path:
    from factlens.errors import OutputError

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {out}: {error.strerror}") from None
    return made.save(out / "edit.safetensors")


# -- what is shown ---------------------------------------------------------------------------------


def _show(outcome: Outcome) -> None:
    from factlens.edit_pages import took

    rewrites = outcome.edit.rewrites
    for rewrite, result in list(zip(rewrites, outcome.results, strict=True))[:SHOWN]:
        line = f"{plain(rewrite.prompt)} → {plain(rewrite.target)}: {took(result)}"
        console().print(line, style="bold", soft_wrap=True, markup=False)
    new = f"p({plain(rewrites[0].target)})" if len(rewrites) == 1 else "p(new)"
    # The edited prompts first: there may be more rows than are shown.
    table = outcome.table.sort_values("kind", key=lambda kind: kind != "edited", kind="stable")
    rows = [
        (
            row.kind,
            plain(row.prompt),
            f"{row.p_target_before:.3f} → {row.p_target_after:.3f}",
            "" if row.true == "" else f"{row.p_true_before:.3f} → {row.p_true_after:.3f}",
            plain(f"{row.says_before} → {row.says_after}"),
        )
        for row in table.head(SHOWN).itertuples(index=False)
    ]
    print_table(("asked", "prompt", new, "p(true)", "says"), rows)
    if len(table) > SHOWN:
        console().print(f"… and {len(table) - SHOWN} more rows on the page")
    console().print()
    texts = outcome.texts.itertuples(index=False)
    print_table(("writes", "before", "after"), [tuple(map(plain, row)) for row in texts])
    console().print()
    _show_change(outcome)


def _show_change(outcome: Outcome) -> None:
    health = outcome.health.set_index("measure")
    rows = []
    for row in outcome.edit.describe().itertuples(index=False):
        norm, moved = (
            health.loc[[measure]].set_index("weight").loc[row.weight]
            for measure in ("norm", "output")
        )
        own = f"{norm['value']:.3g} times the weight's"
        rows.append((row.weight, row.rank, float(row.norm), own, f"{moved['value']:.3f} times"))
    print_table(("weight", "rank", "norm", "which is", "moves ordinary outputs by"), rows)
    for sentence in outcome.alarms:
        console().print(f"alarm: {sentence}", style="bold red", soft_wrap=True, markup=False)
    if not outcome.alarms:
        console().print("no alarm: output, entropy and repetition are within their limits")
    about: Any = outcome.edit.info["statistics"]
    keys = str(about["corpus"])
    if "tokens" in about:
        ridge = f"ridge {about['ridge']:.0e}" if about["ridge"] else "no ridge"
        keys = f"{about['tokens']} keys of {keys}, {ridge}"
    seconds = ", ".join(f"{name} {taken:.1f} s" for name, taken in outcome.seconds.items())
    line = f"statistics: {keys}; time: {seconds}"
    console().print(plain(line), style="dim", soft_wrap=True, markup=False)


def _write_page(outcome: Outcome, name: str, out: Path) -> None:
    """Write the page; then say where both files are, and how to go on."""
    import shlex

    from factlens.edit_pages import edit_page
    from factlens.reports import write_text

    page = write_text(edit_page(outcome), out / "edit.html")
    stored = out / "edit.safetensors"
    size = f"{stored.stat().st_size / 1e3:.0f} kB"
    words = ["factlens", "apply", str(stored), "--prompt", outcome.edit.rewrites[0].prompt]
    if Path(name).exists():  # An edit knows its model by the last part of the path.
        words += ["--model", name]
    for line in (f"{stored} ({size})", str(page), f"go on: {plain(shlex.join(words))}"):
        console().print(line, soft_wrap=True, markup=False)
