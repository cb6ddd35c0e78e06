"""The second moment of a model's MLP keys, gathered once and then found again (ROME, Section 3.1).

Documents are read in order, tokenised as Hugging Face does, cut to the context, and run in batches of similar
length: one pass for every layer asked for. Which documents are used depends on the corpus and on how much is asked
for, not on batches, shards or interruptions, so the moment does not either.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from factlens import atlas, corpora, edits, models
from factlens.configs import config_for
from factlens.corpora import Corpus
from factlens.corruption import cache_folder
from factlens.engines.problems import Progress, no_progress
from factlens.errors import MomentError
from factlens.hub_corpora import hub_dataset
from factlens.key_gathering import Extent, Pass, gather_pass
from factlens.key_passes import batch_tokens, check_layers, d_mlp
from factlens.models import Model
from factlens.moment_store import Shelf, name_of
from factlens.moments import KeyMoment

AUTO_KEYS = 10
"""Tokens per neuron with `tokens="auto"`: enough in practice (Minimal Precomputation, 2025)."""
BUNDLED_KEYS = 20
"""The same over the bundled corpus: edits of atlas are no better with fifty times as many (docs/editing.md)."""
PAPER_DOCUMENTS = 100_000
LONGEST = 2048
"""Documents are cut to the context, and to this where it is longer: GPT-J's, the longest of the paper's models.
Attention over longer ones would take memory that grows with the square of the length."""


def gather(
    model: Model,
    layers: Sequence[int],
    corpus: Corpus,
    *,
    tokens: int | str = "auto",
    folder: str | Path | None = None,
    shard: tuple[int, int] | None = None,
    progress: Progress = no_progress,
    batch: int | None = None,
    save_every: float = 5.0,
) -> dict[int, KeyMoment]:
    """The moments of `layers` over `corpus`: those that are stored, and the others gathered in one pass and stored.

    The same call goes on where an earlier one was stopped, however it was.

    Args:
        model: a hooked model; under `applied` its edits are lifted for as long as this takes.
        layers: 0-based; they are gathered together and cost little more than the last of them alone.
        corpus: from `corpora` or `hub_corpora`.
        tokens: how many, in whole documents; "auto" for 10 per neuron, "paper" for 100 000 documents.
        folder: where moments are kept, one folder a model; None for the cache.
        shard: (2, 8) runs every eighth document from the second on. Such moments add up to the whole.
        progress: told (tokens or documents read, how many in all).
        batch: tokens of a batch, padding included; more where there is memory for it.
        save_every: seconds at least between two writings of an unfinished pass.

    Raises:
        MomentError: an unknown layer, amount or shard, a corpus without text, or keys that are not finite.
        OutOfMemory: the totals, or a batch, do not fit.
        DownloadError: a remote corpus that cannot be fetched.
    """
    _check_shard(shard)
    chosen, identity = check_layers(model, layers), _identity(model)
    extent = extent_of(model, chosen, tokens)
    wanted = Pass(model, chosen, corpus, extent, shard, context_of(model), identity)
    shelf = Shelf(_base(folder) / identity[:16])
    found = _stored(shelf, wanted)
    if len(found) < len(chosen):
        with shelf.locked(wanted.name) as writable:
            found = _stored(shelf, wanted)  # Perhaps by the process that was waited for.
            missing = [layer for layer in chosen if layer not in found]
            if missing:
                _check_unedited(model)
                rest = replace(wanted, layers=missing)
                partial = shelf.partial(wanted.name, missing) if writable else None
                limit = batch or batch_tokens(model)
                with edits.lifted(model):
                    found |= gather_pass(rest, partial, progress, limit, save_every)
            if writable:
                _keep(shelf, wanted, {layer: found[layer] for layer in missing})
    return {layer: found[layer] for layer in chosen}


def _keep(shelf: Shelf, wanted: Pass, gathered: Mapping[int, KeyMoment]) -> None:
    """Store what was gathered; then the unfinished pass is not needed any more."""
    written = [shelf.write(layer, wanted.name, moment) for layer, moment in gathered.items()]
    if gathered and None not in written:
        shelf.partial(wanted.name, list(gathered)).unlink(missing_ok=True)


def moment_for(
    model: Model,
    layer: int,
    *,
    corpus: Corpus | None = None,
    tokens: int | str | None = None,
    folder: str | Path | None = None,
    progress: Progress = no_progress,
) -> KeyMoment:
    """The moment of one layer: the stored one, or gathered now.

    With neither `corpus` nor `tokens`, whatever is stored over the most tokens is taken, gathered or imported (of the
    bundled model if they are at least its default); if nothing is, the bundled model's is gathered from the bundled corpus
    for all its layers at once, a hub model's from Wikipedia.

    Raises:
        MomentError: nothing is stored, and it does not follow from the model what to gather it from.
        DownloadError: Wikipedia cannot be fetched.
        OutOfMemory: as `gather`.
    """
    check_layers(model, [layer])
    if corpus is None and (stored := stored_moment(model, layer, tokens, folder)) is not None:
        return stored
    corpus = corpus or default_corpus(model)
    layers = range(models.n_layers(model)) if is_bundled(model) else [layer]
    amount = default_tokens(model, corpus) if tokens is None else tokens
    return gather(model, layers, corpus, tokens=amount, folder=folder, progress=progress)[layer]


def gather_missing(
    model: Model,
    layers: Sequence[int],
    *,
    tokens: int | str | None = None,
    folder: str | Path | None = None,
    progress: Progress = no_progress,
) -> None:
    """Have the moments of several `layers` where `moment_for` finds them: those that are not stored are gathered in one pass.

    Raises what `moment_for` raises.
    """
    missing = [
        layer
        for layer in check_layers(model, layers)
        if stored_moment(model, layer, tokens, folder) is None
    ]
    if missing:
        corpus = default_corpus(model)
        wanted = range(models.n_layers(model)) if is_bundled(model) else missing
        amount = default_tokens(model, corpus) if tokens is None else tokens
        gather(model, wanted, corpus, tokens=amount, folder=folder, progress=progress)


def stored_moment(
    model: Model,
    layer: int,
    tokens: int | str | None = None,
    folder: str | Path | None = None,
) -> KeyMoment | None:
    """What `moment_for` takes of the stored moments without being told a corpus; None if nothing serves.

    With `tokens=None` the one over the most tokens, with "paper" also if it was imported from the official code or is over
    at least as many documents. Of another amount only the very one that `gather` would make serves.
    """
    if tokens not in (None, "paper"):
        return None
    stored = shelf_of(model, folder).most(layer)
    if stored is None:
        return None
    if tokens == "paper":
        official = str(stored.about.get("corpus")).startswith("official")
        enough = int(stored.about.get("documents") or 0) >= PAPER_DOCUMENTS
        return stored if official or enough else None
    # Of atlas the default is had in seconds: fewer tokens that were once tried out are not what its numbers are measured with.
    least = BUNDLED_KEYS * d_mlp(model, layer) if is_bundled(model) else 1
    return stored if stored.count >= least else None


def import_moment(
    model: Model, layer: int, moment: KeyMoment, folder: str | Path | None = None
) -> Path | None:
    """Keep a moment that was gathered elsewhere as the model's own; gives its file.

    Raises:
        MomentError: of another model, layer or width.
    """
    check_layers(model, [layer])
    if len(moment.total) != d_mlp(model, layer):
        raise MomentError(
            f"the statistics are of {len(moment.total)} neurons and layer {layer} of {models.model_name(model)} has "
            f"{d_mlp(model, layer)}; they belong to another model"
        )
    for name, own in (("fingerprint", _identity(model)), ("layer", layer)):
        if name in moment.about and moment.about[name] != own:
            raise MomentError(
                f"the statistics are of {name} {str(moment.about[name])[:16]}, and this is {name} {str(own)[:16]}"
            )
    about = {**moment.about, "fingerprint": _identity(model), "layer": layer, "shards": []}
    corpus = Corpus(f"imported-{about.get('corpus', 'moment')}", lambda start: iter(()))
    name = name_of(corpus, f"{moment.count}-counted", None)
    return shelf_of(model, folder).write(layer, name, KeyMoment(moment.total, moment.count, about))


def _stored(shelf: Shelf, wanted: Pass) -> dict[int, KeyMoment]:
    read = {layer: shelf.read(layer, wanted.name) for layer in wanted.layers}
    return {
        layer: moment
        for layer, moment in read.items()
        if moment is not None
        and len(moment.total) == d_mlp(wanted.model, layer)
        and moment.about.get("fingerprint") == wanted.fingerprint
        and moment.about.get("digest") == wanted.corpus.digest
    }


# -- defaults --------------------------------------------------------------------------------------


def _identity(model: Model) -> str:
    """What statistics belong to: the model before the edits that are on it now."""
    return edits.unedited_fingerprint(model)


def shelf_of(model: Model, folder: str | Path | None = None) -> Shelf:
    """Where the model's moments are kept."""
    return Shelf(_base(folder) / _identity(model)[:16])


def file_of(
    model: Model,
    layer: int,
    corpus: Corpus,
    *,
    tokens: int | str,
    folder: str | Path | None = None,
    shard: tuple[int, int] | None = None,
) -> Path:
    """Where `gather` keeps the moment of one layer."""
    name = name_of(corpus, str(extent_of(model, [layer], tokens)), shard)
    return shelf_of(model, folder).path(layer, name)


def _base(folder: str | Path | None) -> Path:
    return Path(folder) if folder is not None else cache_folder() / "moments"


def is_bundled(model: Model) -> bool:
    """Whether this is atlas as it ships."""
    return _origin(model) == str(atlas.CHECKPOINT)


def _origin(model: Model) -> str:
    """Where the tokenizer was read from: a folder, or a name of the hub."""
    return str(getattr(models.tokenizer(model), "name_or_path", "") or "")


def default_corpus(model: Model) -> Corpus:
    """What a model's keys are gathered from unless told otherwise.

    The network is used only for a model that came from there itself.

    Raises:
        MomentError: a model of the user's own, whose text is not known.
    """
    if is_bundled(model):
        return corpora.bundled()
    name = models.model_name(model)
    config = config_for(name)
    listed = config is not None and name in (config.name, *config.models)
    if (listed or "/" in name) and not Path(_origin(model)).is_dir():
        return hub_dataset(folder=cache_folder() / "datasets")
    raise MomentError(
        f"no statistics of the keys of {name} are stored, and it does not say what text it was trained on; gather them with "
        "`factlens stats` and --text FILE or --dataset NAME"
    )


def default_tokens(model: Model, corpus: Corpus) -> int | str:
    """How much of it."""
    if corpus.name == corpora.BUNDLED:
        return BUNDLED_KEYS * d_mlp(model, 0)
    return "auto"


def extent_of(model: Model, layers: Sequence[int], tokens: int | str) -> Extent:
    """What "auto", "paper" or a number of tokens come to.

    Raises:
        MomentError: something else.
    """
    if tokens == "paper":
        return Extent(documents=PAPER_DOCUMENTS)
    if tokens == "auto":
        return Extent(tokens=AUTO_KEYS * max(d_mlp(model, layer) for layer in layers))
    if isinstance(tokens, str) and re.fullmatch(r"[0-9][0-9_]*", tokens):
        tokens = int(tokens)
    if isinstance(tokens, str | bool) or tokens < 1:
        raise MomentError(f"tokens is auto, paper or a number from 1 up, not {tokens!r}")
    return Extent(tokens=tokens)


def context_of(model: Model) -> int:
    """How many tokens of each document are used."""
    return min(int(models.cfg(model).n_ctx), LONGEST)


def _check_unedited(model: Model) -> None:
    """What is gathered is filed as the unedited model's: keys of a model that was changed for good are not."""
    if count := edits.edits_kept(model):
        raise MomentError(
            f"{models.model_name(model)} carries {count} permanent edits, and no statistics from before them are stored; gather "
            "them first (`factlens stats`), or load the model again"
        )


def _check_shard(shard: tuple[int, int] | None) -> None:
    if shard is not None and not 1 <= shard[0] <= shard[1]:
        raise MomentError(f"a shard is one of several, such as 2/8, not {shard[0]}/{shard[1]}")
