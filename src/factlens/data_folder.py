"""A folder of data sets: fetched into it, checked again, found by name.

    data/
      counterfact.json     as its authors publish it
      data.lock.json       of each file its sha256 when it was first whole, where it came from, and when
      NAME.part            an unfinished download (`downloads`)

A file is compared with the sha256 that is pinned in `data_sets`, else with the one in data.lock.json, which is written once.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from factlens.data_sets import DATA_SETS, DataSet, count, data_set, from_hub
from factlens.downloads import Tell, Version, discard, download, finish, part_of, so_far
from factlens.errors import DownloadError, FactlensError
from factlens.files import alone, sha256_of, written_whole

FOLDER = Path("data")
"""Where data sets are put and looked for, without another folder."""
LOCK = "data.lock.json"
FORMAT = "factlens-data/1"
State = Literal["fine", "changed", "missing", "not checked"]


@dataclass(frozen=True)
class Check:
    """What became of a file."""

    state: State
    sha256: str | None = None
    expected: str | None = None
    """The pinned one, or the one of the first download."""
    since: str | None = None
    """When it was first whole, in this folder."""


def check(wanted: DataSet, folder: Path = FOLDER) -> Check:
    """Compare a file with its sha256. One that is there and was never checked has none, and stays so.

    Raises:
        DownloadError: data.lock.json cannot be read.
    """
    path, noted = folder / wanted.file, _notes(folder).get(wanted.name, {})
    expected, since = wanted.sha256 or noted.get("sha256"), noted.get("date")
    if not path.is_file():
        return Check("missing", None, expected, since)
    try:
        found = sha256_of(path)
    except OSError as error:
        raise DownloadError(f"cannot read {path}: {error.strerror}") from None
    if expected is None:
        return Check("not checked", found)
    return Check("fine" if found == expected else "changed", found, expected, since)


def fetch(wanted: DataSet, folder: Path = FOLDER, *, tell: Tell = lambda done, total: None) -> Path:
    """Where a data set's file is, fetched if it is not there yet; a fetched one is checked before it has its name.

    A file that was put there by hand is checked and noted. Stopped, the same call goes on.

    Raises:
        DownloadError: no network, or not the file that is expected.
        OutputError: the folder cannot be written, or is full.
    """
    path = folder / wanted.file
    busy = DownloadError(f"another process is fetching into {folder}; wait for it")
    with alone(folder / f".{LOCK}", busy):
        found = check(wanted, folder)
        if found.state == "changed":
            raise _changed(wanted, path, found)
        if found.state == "not checked":
            _note(wanted, folder, str(found.sha256), count(wanted, path), Version(wanted.url))
        if found.state == "missing":
            _get(wanted, folder, found, tell)
    return path


def file_of(given: Path | None, *forms: str, folder: Path = FOLDER) -> Path | None:
    """The file that an option names: by its path, or as a data set of one of the forms, which is then there and as expected.

    Raises:
        DownloadError: the data set is not fetched yet, has changed, or is of another form.
    """
    if given is None or given.as_posix() not in DATA_SETS or given.is_file():
        return given
    wanted = data_set(given.as_posix())
    if wanted.form not in forms:
        fitting = [each.name for each in DATA_SETS.values() if each.form in forms]
        raise DownloadError(
            f"{wanted.name} is of the form {wanted.form}; here {' or '.join(forms)} is read: {', '.join(fitting)}, or a file"
        )
    path, found = folder / wanted.file, check(wanted, folder)
    if found.state == "changed":
        raise _changed(wanted, path, found)
    if found.state != "fine":
        does = "fetches it" if found.state == "missing" else "checks it"
        what = "is not there" if found.state == "missing" else "was never checked"
        raise DownloadError(
            f"{wanted.name}: {path} {what}; `factlens data {wanted.name}` {does}, or give a file's path"
        )
    return path


def part(wanted: DataSet, folder: Path = FOLDER) -> tuple[int, int | None] | None:
    """How many bytes of an unfinished download are there, and of how many."""
    kept = so_far(folder / wanted.file, wanted.url)
    return None if kept is None else (kept[1], kept[0].bytes)


# -- fetching --------------------------------------------------------------------------------------


def _get(wanted: DataSet, folder: Path, before: Check, tell: Tell) -> None:
    path = folder / wanted.file
    fresh, version = part_of(path), Version(wanted.url)
    if wanted.commit is None:
        version = download(wanted.url, path, tell=tell)
    else:
        from_hub(wanted, fresh, f"put its records in the official form at {path}")
    try:
        digest = sha256_of(fresh)
        if digest != (before.expected or digest):
            raise DownloadError(_differs(wanted, folder, digest, before))
        records = wanted.records if wanted.sha256 else count(wanted, fresh)
    except FactlensError as error:
        discard(path)
        raise DownloadError(f"{error}; it was not kept") from None
    finish(path)
    _note(wanted, folder, digest, records, version)


def _differs(wanted: DataSet, folder: Path, digest: str, before: Check) -> str:
    what = f"{wanted.url} has sha256 {digest}, expected {before.expected}"
    if wanted.sha256 is not None:
        return f"{what}, which is pinned; try again, or later"
    remedy = f"if the new one is right, remove {wanted.name!r} from {folder / LOCK}"
    return f"{what} as on {before.since}; {remedy}"


def _changed(wanted: DataSet, path: Path, found: Check) -> DownloadError:
    return DownloadError(
        f"{path} has sha256 {found.sha256}, expected {found.expected}; remove it, and `factlens data {wanted.name}` "
        "fetches it again"
    )


# -- data.lock.json --------------------------------------------------------------------------------


def _notes(folder: Path) -> Mapping[str, Mapping[str, Any]]:
    path = folder / LOCK
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        files: Mapping[str, Mapping[str, Any]] = found["files"]
        if found["format"] != FORMAT or not all(isinstance(x, dict) for x in files.values()):
            raise ValueError(f"the format is not {FORMAT!r}")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DownloadError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DownloadError(
            f"{path} cannot be used ({error}); remove it, and `factlens data` notes the files anew"
        ) from None
    return files


def _note(
    wanted: DataSet, folder: Path, digest: str, records: int | None, version: Version
) -> None:
    """Keep what the first whole file was; the same file again changes nothing."""
    noted = _notes(folder)
    if noted.get(wanted.name, {}).get("sha256") == digest:
        return
    about = {
        "file": wanted.file,
        "sha256": digest,
        "bytes": (folder / wanted.file).stat().st_size,
        "records": records,
        "url": wanted.url,
        "commit": wanted.commit,
        "etag": version.etag,
        "last_modified": version.last_modified,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    kept = {name: value for name, value in about.items() if value is not None}
    content = {"format": FORMAT, "files": {**noted, wanted.name: kept}}
    with written_whole(folder / LOCK) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
