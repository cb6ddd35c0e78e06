"""`factlens apply` and `factlens diff`: what a stored edit does to a model, and what it changes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from factlens.commands.options import Device
from factlens.commands.shared import check_writable, clear_errors, load, usage
from factlens.terminal import console, plain, print_table

if TYPE_CHECKING:
    from factlens.edits import Edit
    from factlens.models import Model

EditFile = Annotated[
    Path, typer.Argument(metavar="EDIT", help="A stored edit, such as rome.safetensors.")
]
ItsModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="A hub name or a folder; by default the model that the edit says it was made for.",
    ),
]
Prompts = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt", "-p", help="Repeat for several; by default those of the edit's facts."
    ),
]
ItsPrecision = Annotated[
    str | None,
    typer.Option(
        "--dtype", help="float32, bfloat16 or float16; by default what the edit was made in."
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Use a model other than the edit's, if the shapes fit.")
]


def apply(
    edit: EditFile,
    model: ItsModel = None,
    prompt: Prompts = None,
    tokens: Annotated[int, typer.Option("--tokens", "-n", help="How many to generate.")] = 30,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Also write the edited model here, as a Hugging Face folder."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier model in --out.")] = False,
    force: Force = False,
    device: Device = None,
    dtype: ItsPrecision = None,
) -> None:
    """Put a stored edit into its model: what it writes before and after, whether the edit broke it, a folder to share.

    The model on disk is not touched; --out writes an edited one beside it, which plain transformers loads.

    Examples:

      factlens apply rome.safetensors

      factlens apply rome.safetensors --prompt "The Space Needle is in" --prompt "Seattle is" --tokens 20

      factlens apply rome.safetensors --out edited-model
    """
    from factlens.alarms import alarm
    from factlens.edits import Edit, applied
    from factlens.exports import export
    from factlens.generation import generate

    with clear_errors():
        stored = Edit.load(edit)
        if out is not None:
            check_writable(out)
        hooked = _load(stored, model, device, dtype)
        if out is not None:
            export(hooked, out, stored, overwrite=overwrite, strict=not force)
            console().print(str(out), soft_wrap=True, markup=False)
        asked = prompt or [rewrite.prompt for rewrite in stored.rewrites]
        if not asked:
            raise usage("the edit names no prompts of its own; give one with --prompt")
        before = generate(hooked, asked, max_new_tokens=tokens)
        with applied(hooked, stored, strict=not force):
            after = generate(hooked, asked, max_new_tokens=tokens)
        rows = [
            (plain(text), plain(old[len(text) :]).strip(), plain(new[len(text) :]).strip())
            for text, old, new in zip(asked, before, after, strict=True)
        ]
        print_table(("prompt", "before", "after"), rows)
        found = alarm(hooked, stored, strict=not force)
        for sentence in found:
            console().print(f"alarm: {sentence}", style="bold red", soft_wrap=True, markup=False)
        if not found:
            console().print("no alarm: output, entropy and repetition are within their limits")


def diff(
    edit: EditFile,
    other: Annotated[
        Path | None, typer.Argument(metavar="OTHER", help="A second edit to compare with.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="A hub name or a folder; by default the edit's own if it is on this machine; none: no model.",
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="Show the next token before and after; repeatable."),
    ] = None,
    top: Annotated[int, typer.Option(help="How many next tokens to show.")] = 5,
    force: Force = False,
    device: Device = None,
    dtype: ItsPrecision = None,
) -> None:
    """Show what a stored edit changes: weights, size, the facts, where it comes from; and how alike two edits are.

    Examples:

      factlens diff rome.safetensors

      factlens diff rome.safetensors other.safetensors --model none

      factlens diff rome.safetensors --prompt "The Space Needle is in"
    """
    from factlens.edits import Edit

    with clear_errors():
        stored = Edit.load(edit)
        second = Edit.load(other) if other is not None else None
        if model == "none" and prompt:
            raise usage("--prompt needs a model, and --model none asks for none")
        if top < 1:
            raise usage(f"--top is a number from 1 up, not {top}")
        hooked = _load_if_at_hand(stored, model, bool(prompt), device, dtype)
        _show_weights(stored, hooked)
        _show_origin(stored)
        if second is not None:
            _show_difference(stored, second)
        for text in prompt or []:
            _show_next(hooked, stored, text, top, strict=not force)


# -- the model that an edit was made for -----------------------------------------------------------


def _load(stored: Edit, model: str | None, device: str | None, dtype: str | None) -> Model:
    from factlens.errors import ModelNotFound

    name = model or _its_model(stored)
    if name is None:
        raise usage("the edit does not say which model it was made for; name it with --model")
    if model is None and not _at_hand(name):
        # The name stands in a file that may come from anyone.
        raise usage(
            f"the edit was made for {name!r}, which is neither bundled, nor in configs/, nor in the cache; if you trust "
            "it, give that name, or the model's folder, with --model"
        )
    try:
        return load(name, device, dtype or str(stored.info.get("dtype", "float32")))
    except ModelNotFound as error:
        if model is not None:
            raise
        raise ModelNotFound(f"{error}; or say where the edit's model is: --model FOLDER") from None


def _its_model(stored: Edit) -> str | None:
    name = stored.info.get("model")
    return name if isinstance(name, str) and name else None


def _load_if_at_hand(
    stored: Edit, model: str | None, needed: bool, device: str | None, dtype: str | None
) -> Model | None:
    """The model, or None where it is not wanted, or only for a number and would have to be downloaded."""
    name = model or _its_model(stored)
    if model == "none" or (not needed and (name is None or (model is None and not _local(name)))):
        return None
    return _load(stored, model, device, dtype)


def _at_hand(name: str) -> bool:
    from factlens.configs import config_for

    config = config_for(name)
    return (config is not None and name in (config.name, *config.models)) or _local(name)


def _local(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    from factlens.configs import config_for

    if name == "atlas":
        return True
    config = config_for(name)
    names = {name, *(config.models if config is not None and name in config.models else ())}
    try:
        return any(isinstance(try_to_load_from_cache(each, "config.json"), str) for each in names)
    except HFValidationError:
        return False


# -- what is shown ---------------------------------------------------------------------------------


def _show_weights(stored: Edit, hooked: Model | None) -> None:
    from factlens import models
    from factlens.fingerprints import fingerprint

    if hooked is not None and fingerprint(hooked) != stored.info.get("fingerprint"):
        print("note: this model's weights are not those the edit was made for", file=sys.stderr)
    rows: list[tuple[Any, ...]] = []
    for row in stored.describe().itertuples(index=False):
        weight = None if hooked is None else models.weight(hooked, row.weight)
        ratio = "" if weight is None else f"{row.norm / float(weight.detach().float().norm()):.4f}"
        rows.append((row.weight, row.kind, row.rank, float(row.norm), ratio))
    print_table(("weight", "kind", "rank", "norm", "of the weight's"), rows)


def _show_origin(stored: Edit) -> None:
    info, versions = stored.info, stored.info.get("versions")
    rows = [
        (key, plain(info[key])[:80])
        for key in ("model", "fingerprint", "processing", "dtype", "device", "editor")
        if info.get(key) is not None
    ]
    if info.get("config"):
        rows.append(("config", plain(json.dumps(info["config"], ensure_ascii=False))[:2000]))
    if isinstance(versions, dict):
        rows.append(("versions", plain(", ".join(f"{k} {v}" for k, v in versions.items()))[:200]))
    if rows:
        print_table(("made with", ""), rows)
    facts = [
        (plain(each.prompt), plain(each.subject), plain(each.true or ""), plain(each.target))
        for each in stored.rewrites
    ]
    if facts:
        print_table(("prompt", "subject", "was", "becomes"), facts)


def _show_difference(stored: Edit, second: Edit) -> None:
    from factlens.edits import difference

    table = difference(stored, second)
    if table.empty:
        console().print("the two edits change no weight in common")
        return
    if stored.info.get("fingerprint") != second.info.get("fingerprint"):
        print("note: the two edits were made for different models", file=sys.stderr)
    print_table(
        ("weight", "cosine", "of left", "of right"),
        [tuple(row) for row in table.itertuples(index=False)],
    )


def _show_next(hooked: Any, stored: Edit, text: str, top: int, strict: bool) -> None:
    from factlens.edits import applied

    before = _next(hooked, text, top)
    with applied(hooked, stored, strict=strict):
        after = _next(hooked, text, top)
    console().print(plain(text), style="bold", soft_wrap=True, markup=False)
    rows = [(*old, *new) for old, new in zip(before, after, strict=True)]
    print_table(("before", "prob", "after", "prob"), rows)


def _next(hooked: Any, text: str, top: int) -> list[tuple[str, float]]:
    """The likeliest next tokens and their probabilities."""
    import torch

    from factlens import models, runs
    from factlens.errors import FactError, PromptTooLong
    from factlens.tokens import token_ids

    tokenizer, context = models.tokenizer(hooked), int(models.cfg(hooked).n_ctx)
    ids = token_ids(tokenizer, text)
    if not text.strip() or not ids:
        raise FactError(f"the prompt {text!r} is empty; give the beginning of a text")
    if len(ids) > context:
        raise PromptTooLong(f"the prompt has {len(ids)} tokens and the model {context} positions")
    prob = runs.logits_of(hooked, torch.tensor([ids]), keep=1)[0, -1].float().softmax(-1)
    values, tokens = prob.topk(min(top, len(prob)))
    return [
        (plain(tokenizer.decode([token])).strip() or "␣", float(value))
        for value, token in zip(values.tolist(), tokens.tolist(), strict=True)
    ]
