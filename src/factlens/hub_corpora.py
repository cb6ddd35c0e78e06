"""Texts from a data set of the Hugging Face hub: its parquet files, one by one, as they are needed.

Files are fetched at a pinned revision (`hub_files`), and their `text` column is read in batches.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq

from factlens.corpora import Corpus
from factlens.errors import DownloadError
from factlens.files import written_whole
from factlens.hub_files import RemoteFile, commit_of, fetched, opened, parquet_files

WIKIPEDIA = "wikimedia/wikipedia"
WIKIPEDIA_CONFIG = "20231101.en"
WIKIPEDIA_REVISION = "b04c8d1ceb2f5cd4588862100d08de323dccfbaa"
"""6.4 million articles in 41 files; the paper's code reads the 20200501.en dump, which the hub no longer serves."""
INSTEAD = "give texts with --text FILE"
_ROWS = 256


def hub_dataset(
    name: str = WIKIPEDIA,
    config: str | None = None,
    *,
    revision: str | None = None,
    folder: Path,
) -> Corpus:
    """The `text` column of a data set's training split, in the order of its files.

    Differs from the paper's code, which draws its documents at random from all of Wikipedia: in order, the 100 000 of
    the paper need one file of 41. Nothing is fetched before the first document is asked for, but the revision of a
    data set that is not pinned here.

    Args:
        name: such as "wikimedia/wikipedia".
        config: the folder of the data set to read, such as "20231101.en"; None for its only one.
        revision: branch, tag or commit; the pinned one of Wikipedia, else what the hub has now.
        folder: where listings are kept, so that a cached data set is found without network.

    Raises:
        DownloadError: no network, no such data set, or one without parquet files.
    """
    if name == WIKIPEDIA:
        config, revision = config or WIKIPEDIA_CONFIG, revision or WIKIPEDIA_REVISION
    commit = commit_of(name, revision, INSTEAD)

    def read(start: int) -> Iterator[str]:
        for file in _listing(name, config, commit, folder):
            table = _open(fetched(name, commit, file, INSTEAD), name)
            rows = table.metadata.num_rows
            if start < rows:
                yield from _texts(table, start)
            start = max(0, start - rows)

    return Corpus(f"{name}-{config}" if config else name, read, commit, remote=True)


def _texts(table: pq.ParquetFile, start: int) -> Iterator[str]:
    """The texts of one file from row `start` on."""
    for batch in table.iter_batches(batch_size=_ROWS, columns=["text"]):
        if start < len(batch):
            yield from (text or "" for text in batch.column(0)[start:].to_pylist())
        start = max(0, start - len(batch))


def _open(path: Path, name: str) -> pq.ParquetFile:
    table = opened(path, name)
    if "text" not in table.schema_arrow.names:
        columns = ", ".join(table.schema_arrow.names)
        raise DownloadError(
            f"{name} has no column 'text'; it has {columns}; give texts with --text"
        )
    return table


def _listing(name: str, config: str | None, commit: str, folder: Path) -> list[RemoteFile]:
    """The parquet files of the training split, from the hub, or as it listed them before."""
    kept = folder / f"{name}-{config or 'all'}-{commit[:12]}.json".replace("/", "-")
    with suppress(OSError, ValueError, TypeError):
        return [RemoteFile(**each) for each in json.loads(kept.read_text(encoding="utf-8"))]
    files = _listed(name, config, commit)
    with suppress(OSError):  # A listing that cannot be kept is asked for again.
        kept.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(kept) as partial:
            partial.write_text(json.dumps([asdict(each) for each in files]), encoding="utf-8")
    return files


def _listed(name: str, config: str | None, commit: str) -> list[RemoteFile]:
    files = parquet_files(name, config, commit, INSTEAD)
    if not files:
        raise DownloadError(
            f"the data set {name} has no parquet files{f' in {config}' if config else ''}; name another "
            "--dataset-config, or give texts with --text"
        )
    train = [each for each in files if each.path.rsplit("/", 1)[-1].startswith("train")]
    chosen = train or files
    folders = {each.path.rsplit("/", 1)[0] for each in chosen}
    if config is None and len(folders) > 1:
        shown = ", ".join(sorted(folders)[:5])
        raise DownloadError(
            f"the data set {name} has several parts ({shown}); choose with --dataset-config"
        )
    return chosen
