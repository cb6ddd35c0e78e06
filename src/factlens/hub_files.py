"""Files of a data set of the Hugging Face hub: listed at a commit, fetched one by one, compared with the sha256 that the hub states.

Nothing of the data set is executed. Files lie in the hub's own cache. Errors end with `instead`, what else a user can do.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from factlens.errors import DownloadError
from factlens.files import sha256_of


@dataclass(frozen=True)
class RemoteFile:
    """One file of a data set, as the hub lists it."""

    path: str
    bytes: int
    sha256: str | None


def commit_of(name: str, revision: str | None, instead: str) -> str:
    """The commit that a branch or tag stands for now, so that a later run reads the same; a commit is itself.

    Raises:
        DownloadError: no network, or no such data set or revision.
    """
    from huggingface_hub import HfApi

    if revision is not None and len(revision) == 40:
        return revision
    try:
        return str(HfApi().dataset_info(name, revision=revision).sha)
    except Exception as error:
        raise _explained(error, name, instead) from None


def parquet_files(name: str, config: str | None, commit: str, instead: str) -> list[RemoteFile]:
    """The parquet files of a data set, or of its folder `config`, in the order of their paths.

    Raises:
        DownloadError: no network, or no such data set, folder or commit.
    """
    from huggingface_hub import HfApi

    try:
        tree = list(
            HfApi().list_repo_tree(
                name, config, recursive=True, revision=commit, repo_type="dataset"
            )
        )
    except Exception as error:
        raise _explained(error, name, instead) from None
    found = [_remote(each) for each in tree if each.path.endswith(".parquet")]
    return sorted(found, key=lambda each: each.path)


def fetched(name: str, commit: str, file: RemoteFile, instead: str) -> Path:
    """The file in the hub's cache, with the checksum that the hub states.

    Raises:
        DownloadError: no network, or a file with another checksum.
    """
    from huggingface_hub import hf_hub_download

    try:
        path = Path(hf_hub_download(name, file.path, repo_type="dataset", revision=commit))
    except Exception as error:
        raise _explained(error, name, instead) from None
    digest = sha256_of(path)
    if file.sha256 is not None and digest != file.sha256:
        raise DownloadError(
            f"{path} is not the file that the hub lists (sha256 {digest[:12]}, expected {file.sha256[:12]}); remove it, "
            "and it is fetched again"
        )
    return path


def opened(path: Path, name: str) -> pq.ParquetFile:
    """A fetched file, to be read.

    Raises:
        DownloadError: it is no parquet file.
    """
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise DownloadError(
            f"{path} of {name} is no parquet file ({_line(error)}); remove it"
        ) from None


def _remote(entry: Any) -> RemoteFile:
    return RemoteFile(entry.path, int(entry.size), entry.lfs.sha256 if entry.lfs else None)


def _explained(error: Exception, name: str, instead: str) -> DownloadError:
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
            f"the hub has no such data set, config or revision: {name} ({_line(error)}); check the names, or {instead}"
        )
    return DownloadError(
        f"cannot fetch the data set {name} from the hub ({_line(error)}); check the network, or {instead}"
    )


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:120] or type(error).__name__
