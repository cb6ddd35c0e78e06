"""Texts from a data set of the Hugging Face hub: its parquet files, one by one, as they are needed.

Nothing of the data set is executed. Files are fetched into the hub's own cache at a pinned revision, their sha256
compared with the one that the hub states, and their `text` column read in batches.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from factlens.corpora import Corpus, sha256_of
from factlens.errors import DownloadError
from factlens.files import written_whole

WIKIPEDIA = "wikimedia/wikipedia"
WIKIPEDIA_CONFIG = "20231101.en"
WIKIPEDIA_REVISION = "b04c8d1ceb2f5cd4588862100d08de323dccfbaa"
"""6.4 million articles in 41 files; the paper's code reads the 20200501.en dump, which the hub no longer serves."""
_ROWS = 256


@dataclass(frozen=True)
class RemoteFile:
    """One file of a data set, as the hub lists it."""

    path: str
    bytes: int
    sha256: str | None


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
    commit = revision if revision and len(revision) == 40 else _commit(name, revision)

    def read(start: int) -> Iterator[str]:
        for file in _listing(name, config, commit, folder):
            table = _open(_fetched(name, commit, file), name)
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
    try:
        table = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise DownloadError(
            f"{path} of {name} is no parquet file ({_line(error)}); remove it"
        ) from None
    if "text" not in table.schema_arrow.names:
        columns = ", ".join(table.schema_arrow.names)
        raise DownloadError(
            f"{name} has no column 'text'; it has {columns}; give texts with --text"
        )
    return table


def _commit(name: str, revision: str | None) -> str:
    """The commit that a branch or tag stands for now, so that a resumed run reads the same."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name, revision=revision).sha)
    except Exception as error:
        raise _explained(error, name) from None


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
    from huggingface_hub import HfApi

    try:
        tree = list(
            HfApi().list_repo_tree(
                name, config, recursive=True, revision=commit, repo_type="dataset"
            )
        )
    except Exception as error:
        raise _explained(error, name) from None
    files = [_remote(each) for each in tree if each.path.endswith(".parquet")]
    train = [each for each in files if each.path.rsplit("/", 1)[-1].startswith("train")]
    if not files:
        raise DownloadError(
            f"the data set {name} has no parquet files{f' in {config}' if config else ''}; name another "
            "--dataset-config, or give texts with --text"
        )
    chosen = sorted(train or files, key=lambda each: each.path)
    folders = {each.path.rsplit("/", 1)[0] for each in chosen}
    if config is None and len(folders) > 1:
        shown = ", ".join(sorted(folders)[:5])
        raise DownloadError(
            f"the data set {name} has several parts ({shown}); choose with --dataset-config"
        )
    return chosen


def _remote(entry: Any) -> RemoteFile:
    return RemoteFile(entry.path, int(entry.size), entry.lfs.sha256 if entry.lfs else None)


def _fetched(name: str, commit: str, file: RemoteFile) -> Path:
    """The file in the hub's cache, with the checksum that the hub states."""
    from huggingface_hub import hf_hub_download

    try:
        path = Path(hf_hub_download(name, file.path, repo_type="dataset", revision=commit))
    except Exception as error:
        raise _explained(error, name) from None
    digest = sha256_of(path)
    if file.sha256 is not None and digest != file.sha256:
        raise DownloadError(
            f"{path} is not the file that the hub lists (sha256 {digest[:12]}, expected {file.sha256[:12]}); remove it, "
            "and it is fetched again"
        )
    return path


def _explained(error: Exception, name: str) -> DownloadError:
    """The one line that a user can act on, for whatever the hub's client threw."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return DownloadError(
            f"the data set {name} is gated; accept its terms on the hub and log in"
        )
    missing = (
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.EntryNotFoundError,
    )
    if isinstance(error, missing) and not isinstance(error, errors.LocalEntryNotFoundError):
        return DownloadError(
            f"the hub has no such data set, config or revision: {name} ({_line(error)}); check the names, or give texts "
            "with --text"
        )
    return DownloadError(
        f"cannot fetch the data set {name} from the hub ({_line(error)}); check the network, or give texts with --text FILE"
    )


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:120] or type(error).__name__
