"""Downloads: whole, gone on with after every kind of break, of one version throughout; what stops them is one line."""

from __future__ import annotations

import contextlib
import resource
import shutil
import tempfile
from pathlib import Path

import pytest
from file_server import Served, serving
from hypothesis import given
from hypothesis import strategies as st

from factlens import downloads
from factlens.downloads import CHUNK, discard, download, finish, part_of, so_far
from factlens.errors import DownloadError, OutputError

BYTES = bytes(range(256)) * 3000
"""Three chunks, no two places alike within 256 bytes."""
DATE = "Wed, 01 Feb 2023 10:00:00 GMT"


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    """No proxy between the tests and this machine."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server():
    with serving(content=BYTES) as served:
        yield served


@pytest.fixture
def target(tmp_path):
    return tmp_path / "new" / "file.json"


def cut(server: Served, target: Path, after: int) -> None:
    """A download that the server breaks off."""
    server.cuts = [after]
    with pytest.raises(DownloadError, match=f"ended after {after:,}"):
        download(server.url, target)


def whole(server: Served, target: Path) -> bytes:
    download(server.url, target)
    finish(target)
    assert sorted(path.name for path in target.parent.iterdir()) == [target.name]
    return target.read_bytes()


def test_a_whole_file_comes_with_its_progress_and_what_the_server_says_of_it(server, target):
    told = []
    version = download(server.url, target, tell=lambda done, total: told.append((done, total)))
    assert (version.etag, version.bytes) == ('"one"', len(BYTES))
    assert told[0] == (CHUNK, len(BYTES))
    assert told[-1] == (len(BYTES), len(BYTES))
    assert not target.exists(), "it has its name when it is checked"
    finish(target)
    assert target.read_bytes() == BYTES


def test_a_broken_connection_is_gone_on_with_where_it_ended(server, target):
    cut(server, target, 100_000)
    assert part_of(target).read_bytes() == BYTES[:100_000]
    version, done = so_far(target, server.url)
    assert (done, version.bytes) == (100_000, len(BYTES))
    assert whole(server, target) == BYTES
    assert [asked for _, asked in server.asked] == [None, "bytes=100000-"]


def test_it_is_told_that_the_same_command_goes_on_or_begins_again(server, target):
    server.cuts = [10]
    with pytest.raises(DownloadError, match=r"after 10 of 768,000 bytes.*goes on from there"):
        download(server.url, target)
    server.etag, server.cuts = None, [20]
    discard(target)
    with pytest.raises(DownloadError, match="begins again"):
        download(server.url, target)


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({"ranges": False}, [None, "bytes=1000-"]),
        ({"etag": None}, [None, None]),
        ({"etag": 'W/"one"'}, [None, None]),
        ({"etag": 'W/"one"', "modified": DATE}, [None, "bytes=1000-"]),
        ({"etag": None, "modified": DATE}, [None, "bytes=1000-"]),
    ],
)
def test_without_parts_or_a_sure_version_it_begins_anew(server, target, changes, asked):
    for name, value in changes.items():
        setattr(server, name, value)
    server.cuts = [1000]
    with pytest.raises(DownloadError):
        download(server.url, target)
    assert whole(server, target) == BYTES
    assert [each for _, each in server.asked] == asked


@pytest.mark.parametrize(
    ("length", "changes", "requests"),
    [
        (len(BYTES), {"etag": '"two"'}, 2),
        (len(BYTES), {"etag": '"two"', "checks": False}, 3),
        (len(BYTES) + 1, {"checks": False}, 3),
        (len(BYTES), {"shift": 7}, 3),
    ],
    ids=["sends all", "sends the rest of another", "of another length", "from another byte"],
)
def test_what_does_not_go_on_from_there_is_fetched_anew(server, target, length, changes, requests):
    cut(server, target, 1000)
    server.content = b"n" * length
    for name, value in changes.items():
        setattr(server, name, value)
    assert whole(server, target) == server.content
    assert len(server.asked) == requests


def test_a_date_that_differs_is_another_version(server, target):
    server.etag, server.modified = None, DATE
    cut(server, target, 1000)
    server.content, server.checks = b"n" * len(BYTES), False
    server.modified = DATE.replace("01", "02")
    assert whole(server, target) == server.content


def test_a_file_that_became_shorter_is_fetched_anew(server, target):
    cut(server, target, 1000)
    server.content, server.etag, server.checks = b"short", '"two"', False
    assert whole(server, target) == b"short"


def test_bytes_of_another_place_are_not_taken(server, target):
    cut(server, target, 1000)
    part_of(target).write_bytes(b"")  # Cut off by hand: nothing is left to go on from.
    assert so_far(target, server.url) is None
    assert whole(server, target) == BYTES
    cut(server, target, 1000)
    assert so_far(target, f"{server.url}?other") is None


def test_what_was_whole_when_the_process_ended_is_not_asked_for_again(server, target):
    download(server.url, target)
    assert download(server.url, target).etag == '"one"'
    assert len(server.asked) == 1


def test_a_server_that_says_no_length_is_read_to_its_end(server, target):
    server.length = False
    assert whole(server, target) == BYTES


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 60_000)), max_size=5),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["etag", "date", "nothing"]),
)
def test_however_it_is_broken_off_and_changed_the_file_is_of_one_version(
    breaks, ranges, checks, says
):
    folder = Path(tempfile.mkdtemp())
    versions = [bytes([65 + number]) * (50_000 + 1000 * number) for number in range(4)]
    try:
        with serving(ranges=ranges, checks=checks) as server:
            for number, after in [*breaks, (0, 10**6)]:
                server.content = versions[number]
                server.etag = f'"{number}"' if says == "etag" else None
                server.modified = DATE.replace("01", f"0{number + 1}") if says == "date" else None
                server.cuts = [after]
                with contextlib.suppress(DownloadError):
                    download(server.url, folder / "f")
            server.cuts = []
            download(server.url, folder / "f")
        finish(folder / "f")
        assert (folder / "f").read_bytes() in versions
    finally:
        shutil.rmtree(folder)


def test_the_parts_would_be_mixed_without_their_version(server, target, monkeypatch):
    """The control: what the tests above would see if nothing were compared."""
    monkeypatch.setattr(downloads, "_goes_on", lambda *answer: True)
    cut(server, target, 1000)
    server.content, server.etag, server.checks = bytes(len(BYTES)), '"two"', False
    download(server.url, target)
    assert part_of(target).read_bytes() == BYTES[:1000] + server.content[1000:]


# -- what stops it ---------------------------------------------------------------------------------


def test_ctrl_c_keeps_what_is_there(server, target):
    def interrupted(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(server.url, target, tell=interrupted)
    assert part_of(target).read_bytes() == BYTES[:CHUNK]
    assert whole(server, target) == BYTES
    assert server.asked[-1][1] == f"bytes={CHUNK}-"


def test_a_full_disk_is_one_line_and_what_is_there_is_kept(server, target):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(OutputError, match=r"cannot write .*\.part: .*make room") as caught:
            download(server.url, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert part_of(target).read_bytes() == BYTES[:300_000]
    assert whole(server, target) == BYTES
    assert server.asked[-1][1] == "bytes=300000-"


def test_a_folder_that_cannot_be_is_one_line(server, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot write"):
        download(server.url, tmp_path / "file" / "file.json")


@pytest.mark.parametrize("status", [404, 403, 503])
def test_a_server_that_refuses_is_quoted(server, target, status):
    server.status = status
    with pytest.raises(DownloadError, match=rf"{server.url}: the server answers {status} \(") as e:
        download(server.url, target)
    assert f"put the file at {target}" in str(e.value)
    assert not target.parent.exists()


def test_no_network_is_one_line(target):
    with serving() as server:
        gone = server.url
    with pytest.raises(DownloadError, match=r"refused\); check the network, or put") as caught:
        download(gone, target)
    assert "\n" not in str(caught.value)
    with pytest.raises(DownloadError, match="check the network"):
        download("http://nowhere.invalid/file.json", target)


def test_a_server_that_goes_silent_is_given_up(server, target, monkeypatch):
    class Silent:
        status, length, headers = 200, 10, {}

        def read(self, size):
            raise TimeoutError("timed out")

        def close(self):
            pass

    monkeypatch.setattr(downloads.urllib.request, "urlopen", lambda *asked, **more: Silent())
    with pytest.raises(DownloadError, match=r"after 0 of 10 bytes .*\(timed out\)"):
        download(server.url, target)
