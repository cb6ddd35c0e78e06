"""`factlens stats`: the second moment of a model's keys, gathered, added, imported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from factlens.commands.options import Device, ModelName, Precision
from factlens.commands.shared import check_writable, clear_errors, load, usage
from factlens.terminal import console, print_table, progress

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from factlens.corpora import Corpus
    from factlens.models import Model
    from factlens.moments import KeyMoment


def stats(
    model: ModelName = "atlas",
    layer: Annotated[
        list[int] | None,
        typer.Option(
            "--layer", "-l", help="0-based; repeat for several. Of atlas all, else the edited one."
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            "--tokens",
            "-t",
            help="auto: 10 per neuron; paper: 100 000 documents; or a number. By default auto, of atlas 100 per neuron.",
        ),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text",
            help="Documents: a .txt file (blank lines between them) or a .jsonl with text; repeat.",
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="A data set of the Hugging Face hub; of hub models Wikipedia by default."
        ),
    ] = None,
    dataset_config: Annotated[
        str | None, typer.Option(help="Its config, such as 20231101.en.")
    ] = None,
    dataset_revision: Annotated[
        str | None, typer.Option(help="Its branch, tag or commit, such as refs/convert/parquet.")
    ] = None,
    stats_from: Annotated[
        Path | None,
        typer.Option(
            "--stats-from", help="Import a file for one layer: the official .npz, or one of these."
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            help="2/8 runs every eighth document from the second on; --add puts shards together."
        ),
    ] = None,
    add: Annotated[
        list[Path] | None, typer.Option(help="A file to add up into --out; repeat. Needs no model.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Where files go: a folder instead of the cache; with --add a file."
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a batch; more where there is memory for it."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Say what it would take, from a short measurement, and stop."
        ),
    ] = False,
    device: Device = None,
    dtype: Precision = "float32",
) -> None:
    """Gather what a ROME edit needs to know of a model: C, the second moment of the keys of its MLPs.

    Done once for a model, then found by every edit. All layers cost one pass. Stop it whenever you like: the same
    command goes on. More tokens make edits disturb less: on atlas, 10 per neuron disturb other keys 14 to 20 % more
    than need be (mean square), 100 per neuron 1.5 %.

    Examples:

      factlens stats                                       every layer of atlas, in seconds

      factlens stats --model gpt2-xl --layer 17 --dry-run  what would it take?

      factlens stats --model gpt2-xl --layer 17            Wikipedia, 10 tokens per neuron

      factlens stats --model gpt2-xl --layer 17 --tokens paper

      factlens stats --model ./my-model --text my-texts.txt

      factlens stats --model gpt2-xl --layer 17 --stats-from transformer.h.17.mlp.c_proj_float32_mom2_100000.npz

      factlens stats --tokens 1000000 --shard 1/2 --out a; factlens stats --tokens 1000000 --shard 2/2 --out b

      factlens stats --add a/…/layer-05.….safetensors --add b/…/layer-05.….safetensors --out layer-05.safetensors
    """
    with clear_errors(kept=out):
        if add:
            _add(add, out)
            return
        if out is not None:
            check_writable(out)
        parts = _shard(shard)
        if text and dataset:
            raise usage("give --text or --dataset, not both")
        hooked = load(model, device, dtype)
        if stats_from is not None:
            _import(hooked, layer or [], stats_from, out)
            return
        layers = _layers(hooked, layer)
        corpus = _corpus(hooked, text or [], dataset, dataset_config, dataset_revision)
        amount = tokens if tokens is not None else _default(hooked, corpus)
        if dry_run:
            _show_estimate(hooked, layers, corpus, amount, parts)
        else:
            _gather(hooked, layers, corpus, amount, parts, out, batch)


def _layers(model: Model, given: Sequence[int] | None) -> list[int]:
    from factlens.editors.rome_config import rome_config_for
    from factlens.key_statistics import is_bundled
    from factlens.models import n_layers

    if given:
        return list(given)
    if is_bundled(model):
        return list(range(n_layers(model)))
    return [int(str(rome_config_for(model).layer))]


def _corpus(
    model: Model,
    texts: Sequence[Path],
    dataset: str | None,
    config: str | None,
    revision: str | None,
) -> Corpus:
    from factlens.corpora import text_files
    from factlens.corruption import cache_folder
    from factlens.hub_corpora import hub_dataset
    from factlens.key_statistics import default_corpus

    if texts:
        return text_files(texts)
    if dataset is not None:
        return hub_dataset(dataset, config, revision=revision, folder=cache_folder() / "datasets")
    return default_corpus(model)


def _default(model: Model, corpus: Corpus) -> int | str:
    from factlens.key_statistics import default_tokens

    return default_tokens(model, corpus)


def _shard(given: str | None) -> tuple[int, int] | None:
    if given is None:
        return None
    part, slash, parts = given.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal()):
        raise usage(f"--shard is one of several, such as 2/8, not {given!r}")
    return int(part), int(parts)


def _gather(
    model: Model,
    layers: Sequence[int],
    corpus: Corpus,
    tokens: int | str,
    shard: tuple[int, int] | None,
    out: Path | None,
    batch: int | None,
) -> None:
    from factlens.key_statistics import file_of, gather

    with progress("gathering keys") as tell:
        found = gather(
            model, layers, corpus, tokens=tokens, folder=out, shard=shard, batch=batch,
            progress=lambda done, total: tell(done, total, f"{done} of {total}"),
        )  # fmt: skip
    paths = [
        file_of(model, layer, corpus, tokens=tokens, folder=out, shard=shard) for layer in found
    ]
    _show(found, [path for path in paths if path.exists()])


def _show(found: Mapping[Any, KeyMoment], paths: Sequence[Path]) -> None:
    columns = ("layer", "tokens", "documents", "condition", "ridge", "rank")
    print_table(columns, [(layer, *_described(moment)) for layer, moment in found.items()])
    for path in paths:
        console().print(str(path), soft_wrap=True, markup=False)


def _described(moment: KeyMoment) -> tuple[Any, ...]:
    """Tokens, documents, condition number, ridge and rank of a moment."""
    from factlens.errors import SingularMoment
    from factlens.moments import condition_number, factor, numerical_rank

    documents, mean = moment.about.get("documents", "unknown"), moment.mean()
    try:
        factored = factor(moment)
    except SingularMoment:
        return moment.count, documents, "singular", "none helps", "0"
    condition = f"{condition_number(mean, factored):.1e}"
    ridge = f"{factored.ridge:.0e}" if factored.ridge else "none"
    rank = f"{numerical_rank(mean, factored)} of {len(mean)}"
    return moment.count, documents, condition, ridge, rank


def _show_estimate(
    model: Model,
    layers: Sequence[int],
    corpus: Corpus,
    tokens: int | str,
    shard: tuple[int, int] | None,
) -> None:
    from factlens.statistics_costs import estimate

    with console(stderr=True).status("measuring"):
        found = estimate(model, layers, corpus, tokens=tokens, shard=shard)
    unknown = "as long as its documents are"
    rows = [
        ("layers", ", ".join(map(str, layers))),
        ("texts", corpus.name + (" (fetched when gathering begins)" if corpus.remote else "")),
        ("tokens", unknown if found.tokens is None else f"{found.tokens}"),
        (
            "documents",
            "as many as it takes" if found.documents is None else f"about {found.documents}",
        ),
        ("speed", f"{found.tokens_per_second:.0f} tokens per second"),
        ("time", unknown if found.seconds is None else f"about {_duration(found.seconds)}"),
        ("memory", f"{found.memory / 1e9:.2f} GB beside the model"),
        ("disk", f"{found.disk / 1e9:.2f} GB"),
    ]
    print_table(("what", "how much"), rows)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _add(files: Sequence[Path], out: Path | None) -> None:
    from functools import reduce
    from operator import add

    from factlens.moment_files import load_moment, save_moment

    if out is None or out.is_dir():
        raise usage("--add needs a file to write to: --out sum.safetensors")
    check_writable(out.parent)
    moment = reduce(add, map(load_moment, files))
    path = save_moment(moment, out)
    _show({str(moment.about.get("layer", "unknown")): moment}, [path])


def _import(model: Model, layers: Sequence[int], file: Path, out: Path | None) -> None:
    from factlens.key_statistics import import_moment
    from factlens.moment_files import read_moment

    moment = read_moment(file)
    named = moment.about.get("layer")
    if len(layers) > 1 or (not layers and named is None):
        raise usage(f"{file} holds the statistics of one layer; say which with --layer")
    layer = layers[0] if layers else int(str(named))
    path = import_moment(model, layer, moment, out)
    if "fingerprint" not in moment.about:
        console(stderr=True).print(
            f"note: {file} does not say what model it belongs to; its width fits",
            soft_wrap=True,
            markup=False,
        )
    _show({layer: moment}, [path] if path else [])
