"""`factlens train-editor`: train MEND or KE for a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from factlens.commands.options import Device, ModelName, Precision
from factlens.commands.shared import (
    check_writable,
    clear_errors,
    load,
    method_named,
    tell_left_out,
    usage,
)
from factlens.terminal import console, print_table, progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from factlens.corpora import Corpus
    from factlens.editors.checkpoints import Method, Trained
    from factlens.editors.training_config import TrainingConfig
    from factlens.models import Model

SHOWN = ("step", "train_edit", "train_kl", "edit", "paraphrase", "kl", "efficacy", "generalisation")


def train_editor(
    method: Annotated[str, typer.Argument(help="mend or ke.")],
    model: ModelName = "atlas",
    data: Annotated[
        str,
        typer.Option(
            "--data", help="generic (plain text), cf (CounterFact) or zsre: their training splits."
        ),
    ] = "generic",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Updates in all; a larger number goes on.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the network and of the order of the records.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Other numbers: a YAML file with rank, batch, and so on.")
    ] = None,
    records: Annotated[
        Path | None,
        typer.Option(
            help="An official file to train on, or a name of `factlens data`; without it the bundled records."
        ),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text", help="Plain text for a model of your own: a .txt or .jsonl file; repeat."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Another folder than the cache, where `evaluate` finds it."
        ),
    ] = None,
    device: Device = None,
    dtype: Precision = "float32",
) -> None:
    """Train a hypernetwork editor: MEND (Mitchell et al., 2022) or KE (De Cao et al., 2021). The model is not touched.

    The trained network is found by `factlens evaluate --editor mend-cf` and the like. Stop it whenever you like: the same
    command goes on. Records that evaluation uses are of other subjects.

    Examples:

      factlens train-editor mend --data cf

      factlens train-editor ke --data zsre --steps 4000

      factlens train-editor mend --model ./my-model --text my-texts.txt --out runs/mend
    """
    from factlens.data_folder import file_of

    with clear_errors():
        made_by, numbers = method_named(method), _numbers(config, steps, seed)
        _check_data(data, records)
        records = file_of(records, "zsre" if data == "zsre" else "counterfact")
        plan = _config(made_by, numbers)
        if out is not None:
            check_writable(out)
        hooked = load(model, device, dtype)
        folder = out or _own_folder(hooked, made_by, data)
        corpus = _corpus(hooked, text or [])
        with clear_errors(kept=folder):
            trained = _trained(hooked, made_by, data, corpus, records, folder, plan)
        _show(trained, folder, data)


def _check_data(data: str, records: Path | None) -> None:
    from factlens.editors.checkpoints import DATA

    if data not in DATA:
        raise usage(f"no data {data!r} to train on; there are {', '.join(DATA)}")
    if records is not None and data == "generic":
        raise usage("--data generic trains on plain text; give --records with --data cf or zsre")


def _numbers(file: Path | None, steps: int | None, seed: int | None) -> dict[str, Any]:
    """What differs from the method's own numbers."""
    from factlens.configs import read_mapping

    named = {"steps": steps, "seed": seed}
    given = read_mapping(file) if file is not None else {}
    return given | {name: value for name, value in named.items() if value is not None}


def _config(method: Method, numbers: dict[str, Any]) -> TrainingConfig:
    from factlens.configs import from_mapping

    return from_mapping(method.config, numbers, f"{method.name}'s training config")


def _own_folder(model: Model, method: Method, data: str) -> Path:
    from factlens.editors.checkpoints import own_folder

    return own_folder(model, method, data)


def _corpus(model: Model, texts: Sequence[Path]) -> Corpus:
    from factlens.corpora import text_files
    from factlens.errors import MomentError
    from factlens.key_statistics import default_corpus
    from factlens.models import model_name

    if texts:
        return text_files(texts)
    try:
        return default_corpus(model)
    except MomentError:
        raise usage(
            f"{model_name(model)} does not say what text it was trained on; give some with --text FILE"
        ) from None


def _trained(
    model: Model,
    method: Method,
    data: str,
    corpus: Corpus,
    records: Path | None,
    folder: Path,
    plan: TrainingConfig,
) -> Trained:
    from factlens.editors.checkpoints import label_of
    from factlens.editors.lessons import lessons
    from factlens.editors.training import train
    from factlens.store import locked

    bad: list[str] = []
    with console(stderr=True).status("reading records"):
        given = lessons(
            model,
            data,
            corpus,
            records=records,
            text_tokens=plan.text_tokens,
            on_bad_row=bad.append,
        )
    tell_left_out(bad)
    console(stderr=True).print(
        f"{len(given.train)} records to train on, {len(given.held)} held out", style="dim"
    )
    said = "nothing measured yet"
    with locked(folder), progress(f"training {label_of(method, data)}") as tell:

        def checked(line: Any) -> None:
            nonlocal said
            said = f"edit {line['edit']:.2f}, KL {line['kl']:.3f}"

        return train(
            model, method, data, given, folder, plan,
            progress=lambda done, total: tell(done, total, said), on_check=checked,
        )  # fmt: skip


def _show(trained: Trained, folder: Path, data: str) -> None:
    import json

    from factlens.editors.checkpoints import label_of
    from factlens.editors.training import CURVE

    lines = [json.loads(line) for line in (folder / CURVE).read_text("utf-8").splitlines()]
    every = max(1, len(lines) // 10)
    shown = [lines[0], *lines[:0:-1][::every][::-1]]
    names = tuple(name for name in SHOWN if name in lines[-1])
    print_table(names, [tuple(line.get(name, float("nan")) for name in names) for line in shown])
    best = trained.info["held_out"]
    console().print(
        f"kept: the network of step {best['step']:g}; edit and KL in nats per token",  # type: ignore[index]
        style="dim",
        soft_wrap=True,
    )
    path = folder / f"{label_of(trained.method, data)}.safetensors"
    console().print(str(path), soft_wrap=True, markup=False)
