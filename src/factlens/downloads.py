"""One file over HTTP: `NAME.part` grows until it is whole, goes on where it stopped, and is of one version of the file throughout.

    NAME.part            the first bytes of the file
    NAME.part.json       of which file and which version of it: its ETag, or when it was changed, and its length

A server that does not say which version it sends, or does not send parts, is asked for the whole file again.
"""

import http.client
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from factlens.errors import DownloadError, FactlensError, OutputError

CHUNK = 1 << 18
"""Bytes that are read and written at once."""
TIMEOUT = 30.0
"""Seconds without a byte after which a connection is given up."""
Tell = Callable[[int, int], None]
"""Told of the bytes that are there and of all; 0 where the server does not say how many."""


@dataclass(frozen=True)
class Version:
    """What a server says of the file that it sends."""

    url: str
    etag: str | None = None
    last_modified: str | None = None
    bytes: int | None = None

    @property
    def validator(self) -> str | None:
        """By what a server tells whether it still has this version: a strong ETag, else the date."""
        weak = self.etag is None or self.etag.startswith("W/")
        return self.last_modified if weak else self.etag


def part_of(target: Path) -> Path:
    """Where an unfinished download of `target` is."""
    return target.with_name(f"{target.name}.part")


def so_far(target: Path, url: str) -> tuple[Version, int] | None:
    """The version of which some bytes are there, and how many; None if there is nothing to go on from."""
    part = part_of(target)
    with suppress(OSError, ValueError, TypeError):
        version = Version(**json.loads(_note(part).read_text(encoding="utf-8")))
        if version.url == url and version.validator is not None and part.stat().st_size > 0:
            return version, part.stat().st_size
    return None


def download(url: str, target: Path, *, tell: Tell = lambda done, total: None) -> Version:
    """Fetch the rest of a file into `part_of(target)`: all of it, if nothing is there or the file has changed meanwhile.

    Stopped by Ctrl-C, by the network or by a full disk, what is there is kept, and the same call goes on.

    Raises:
        DownloadError: no network, no such file, or a connection that ended too soon.
        OutputError: the folder cannot be written, or is full.
    """
    part = part_of(target)
    kept = so_far(target, url)
    if kept is not None and kept[0].bytes == kept[1]:
        return kept[0]
    response, begun = _ask_on(target, *kept) if kept is not None else (_ask(url, target), 0)
    with closing(response):
        version = kept[0] if kept is not None and begun else _version(response, url)
        try:
            if not begun:
                _begin(part, version)
            with part.open("ab") as file:
                for chunk in _chunks(response, version, begun):
                    file.write(chunk)
                    begun += len(chunk)
                    tell(begun, version.bytes or 0)
        except FactlensError:
            raise
        except OSError as error:
            raise OutputError(
                f"cannot write {part}: {error.strerror or error}; make room, and the same command goes on"
            ) from None
    return version


def finish(target: Path) -> None:
    """Give a download that is whole and checked its name.

    Raises:
        OutputError: the folder cannot be written.
    """
    part = part_of(target)
    try:
        with part.open("rb") as written:
            os.fsync(written.fileno())  # Before the name is there, as in `files.written_whole`.
        part.replace(target)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}") from None
    discard(target)


def discard(target: Path) -> None:
    """Forget a download."""
    part = part_of(target)
    for path in (part, _note(part)):
        with suppress(OSError):
            path.unlink()


def _note(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _begin(part: Path, version: Version) -> None:
    """Nothing of another version is there when the note of this one is written."""
    part.parent.mkdir(parents=True, exist_ok=True)
    for path in (part, _note(part)):
        path.unlink(missing_ok=True)
    part.touch()
    _note(part).write_text(json.dumps(asdict(version)), encoding="utf-8")


# -- what is asked and answered --------------------------------------------------------------------


def _ask_on(target: Path, version: Version, begun: int) -> tuple[Any, int]:
    """The rest of a version, and from which byte on it is: from 0 where the server has another, or sends all."""
    further = {"Range": f"bytes={begun}-", "If-Range": str(version.validator)}
    response = _ask(version.url, target, further)
    if response is not None and response.status == 200:
        return response, 0
    if response is not None and _goes_on(response, version, begun):
        return response, begun
    if response is not None:
        response.close()
    return _ask(version.url, target), 0


def _goes_on(response: Any, version: Version, begun: int) -> bool:
    """Whether an answer is what was asked for, of the same version."""
    place = re.match(r"bytes (\d+)-\d+/(\d+|\*)$", response.headers.get("Content-Range") or "")
    sent = _version(response, version.url)
    return (
        response.status == 206
        and place is not None
        and int(place[1]) == begun
        and place[2] in ("*", str(version.bytes))
        and (sent.etag or version.etag) == version.etag
        and (sent.last_modified or version.last_modified) == version.last_modified
    )


def _ask(url: str, target: Path, further: dict[str, str] | None = None) -> Any:
    """The server's answer; None if it has not the bytes that were asked for."""
    # Bytes as they are stored: of a compressed answer neither length nor ranges would be the file's.
    headers = {"Accept-Encoding": "identity", "User-Agent": "factlens", **(further or {})}
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if further and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return None
        raise DownloadError(
            f"cannot fetch {url}: the server answers {error.code} ({error.reason}); try later, or put the file at {target}"
        ) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise DownloadError(
            f"cannot fetch {url} ({reason}); check the network, or put the file at {target}"
        ) from None


def _version(response: Any, url: str) -> Version:
    headers = response.headers
    return Version(url, headers.get("ETag"), headers.get("Last-Modified"), response.length)


def _chunks(response: Any, version: Version, begun: int) -> Iterator[bytes]:
    """What the server sends, to its end.

    Raises:
        DownloadError: it ends before the end of the file.
    """
    done = begun
    try:
        while chunk := response.read(CHUNK):
            yield chunk
            done += len(chunk)
    except (OSError, http.client.HTTPException) as error:
        raise _cut(version, done, error) from None
    if version.bytes is not None and done != version.bytes:
        raise _cut(version, done, None)


def _cut(version: Version, done: int, error: Exception | None) -> DownloadError:
    of = f" of {version.bytes:,}" if version.bytes is not None else ""
    why = f" ({error})" if error is not None and str(error) else ""
    then = "goes on from there" if version.validator is not None else "begins again"
    return DownloadError(
        f"the connection ended after {done:,}{of} bytes of {version.url}{why}; the same command {then}"
    )
