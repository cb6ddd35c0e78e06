"""Texts: the same document under the same number, wrong lines named, data sets checked before they are read."""

from __future__ import annotations

import hashlib
import json
from itertools import islice
from types import SimpleNamespace

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from factlens.corpora import bundled, text_files
from factlens.errors import DownloadError, MomentError
from factlens.hub_corpora import WIKIPEDIA_REVISION, hub_dataset


def take(corpus, start, count):
    return list(islice(corpus.documents(start), count))


def test_the_bundled_corpus_is_the_same_from_every_start_and_has_no_end():
    first = take(bundled(), 0, 30)
    assert take(bundled(), 7, 23) == first[7:]
    assert take(bundled(seed=1), 0, 30) != first
    assert bundled(seed=1).name != bundled().name
    assert len(set(first)) > 25


def test_text_files_are_cut_at_blank_lines_in_the_order_given(tmp_path):
    (tmp_path / "a.txt").write_text("\n\none\ntwo\n   \n\nthree\r\n\r\nfour", encoding="utf-8-sig")
    rows = [{"text": "fünf\u2028sechs"}, {"text": "", "id": 1}, {"text": "\n"}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    (tmp_path / "b.jsonl").write_text(lines, encoding="utf-8")
    corpus = text_files([tmp_path / "a.txt", str(tmp_path / "b.jsonl")])
    every = ["one\ntwo", "three", "four", "fünf\u2028sechs", "", "\n"]
    assert list(corpus.documents(0)) == every
    assert list(corpus.documents(2)) == every[2:]
    assert list(corpus.documents(99)) == []
    assert corpus.name == "text-a-and-1-more"


def test_other_contents_or_order_are_another_corpus(tmp_path):
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("one")
    b.write_text("two")
    digests = {text_files(files).digest for files in ([a], [b], [a, b], [b, a])}
    assert len(digests) == 4
    before = text_files([a]).digest
    assert text_files([a]).digest == before
    a.write_text("one more")
    assert text_files([a]).digest != before


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"good\n\n\xff\xfe", r"a\.txt, line 3: not UTF-8"),
        ("a.txt", b" \n\n", "holds no text"),
        ("a.jsonl", b"", "holds no text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2: not JSON"),
        ("a.jsonl", b'\n{"body": "x"}', 'line 2: no text; each line is a record with a "text"'),
        ("a.jsonl", b'["x"]', "line 1: no text"),
        ("a.jsonl", b'{"text": 3}', "line 1: no text"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    corpus = text_files([tmp_path / name])
    with pytest.raises(MomentError, match=words):
        list(corpus.documents(0))


def test_files_that_are_not_there_or_another_kind_are_refused_at_once(tmp_path):
    with pytest.raises(MomentError, match="cannot read the texts"):
        text_files([tmp_path / "none.txt"])
    with pytest.raises(MomentError, match=r"none of \.txt, \.jsonl"):
        text_files([tmp_path / "a.pdf"])
    with pytest.raises(MomentError, match="no text files"):
        text_files([])
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(MomentError, match="cannot read"):
        text_files([tmp_path / "folder.txt"])


# -- the hub ---------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A data set of two files of 300 and 20 rows, served by stand-ins of the hub's client."""
    texts = [f"document {number}" for number in range(320)]
    names = ["20231101.en/train-00000-of-00002.parquet", "20231101.en/train-00001-of-00002.parquet"]
    for name, rows in zip(names, (texts[:300], texts[300:]), strict=True):
        path = tmp_path / "hub" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"id": range(len(rows)), "text": rows}), path, row_group_size=128)
    state = SimpleNamespace(
        folder=tmp_path / "hub", texts=texts, names=names, fetched=[], listed=0, online=True
    )

    def entry(name):
        content = (state.folder / name).read_bytes()
        lfs = SimpleNamespace(sha256=hashlib.sha256(content).hexdigest())
        return SimpleNamespace(path=name, size=len(content), lfs=lfs)

    entries = [entry(name) for name in [*names[::-1]]]
    state.entries = [*entries, SimpleNamespace(path="README.md", size=1, lfs=None)]

    def tree(self, name, config=None, *, recursive, revision, repo_type):
        if not state.online:
            raise ConnectionError("no network\nat all")
        assert (recursive, repo_type, len(revision)) == (True, "dataset", 40)
        state.listed += 1
        return iter(state.entries)

    def download(name, path, *, repo_type, revision):
        state.fetched.append(path)
        return str(state.folder / path)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_tree", tree)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return state


def test_a_data_set_is_read_in_order_file_by_file_as_needed(hub, tmp_path):
    corpus = hub_dataset(folder=tmp_path / "lists")
    assert (corpus.name, corpus.digest) == ("wikimedia/wikipedia-20231101.en", WIKIPEDIA_REVISION)
    assert hub.listed == 0  # Nothing is asked before a document is.
    assert take(corpus, 0, 10) == hub.texts[:10]
    assert hub.fetched == hub.names[:1]
    for start in (0, 130, 299, 300, 310):
        assert list(corpus.documents(start)) == hub.texts[start:]
    assert list(corpus.documents(320)) == []


def test_a_listing_is_kept_for_when_there_is_no_network(hub, tmp_path):
    list(hub_dataset(folder=tmp_path / "lists").documents(0))
    hub.online = False
    assert take(hub_dataset(folder=tmp_path / "lists"), 5, 1) == hub.texts[5:6]
    with pytest.raises(DownloadError, match=r"no network\).*--text FILE") as error:
        take(hub_dataset(folder=tmp_path / "other"), 0, 1)
    assert "\n" not in str(error.value)


def test_a_file_with_another_checksum_is_not_read(hub, tmp_path):
    corpus = hub_dataset(folder=tmp_path / "lists")
    path = hub.folder / hub.names[0]
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(DownloadError, match="not the file that the hub lists"):
        take(corpus, 0, 1)


def test_data_sets_that_cannot_be_read_say_why(hub, tmp_path, monkeypatch):
    def first(*entries, **more):
        hub.entries = list(entries)
        return take(
            hub_dataset(
                "x/y",
                revision="a" * 40,
                folder=tmp_path / str(len(list(tmp_path.iterdir()))),
                **more,
            ),
            0,
            1,
        )

    good = SimpleNamespace(path=hub.names[0], size=1, lfs=None)
    assert first(good) == hub.texts[:1]  # Control; without a checksum there is none to compare.
    with pytest.raises(DownloadError, match="no parquet files"):
        first(SimpleNamespace(path="data.jsonl", size=1, lfs=None))
    with pytest.raises(DownloadError, match="several parts"):
        first(good, SimpleNamespace(path="b/train-0.parquet", size=1, lfs=None))
    pq.write_table(pa.table({"body": ["x"]}), hub.folder / "train-0.parquet")
    with pytest.raises(DownloadError, match="no column 'text'; it has body"):
        first(SimpleNamespace(path="train-0.parquet", size=1, lfs=None))
    (hub.folder / "train-0.parquet").write_bytes(b"nonsense")
    with pytest.raises(DownloadError, match="no parquet file"):
        first(SimpleNamespace(path="train-0.parquet", size=1, lfs=None))


def test_without_network_the_real_client_gives_one_line(tmp_path):
    """The tests run with the hub switched off."""
    with pytest.raises(
        DownloadError, match=r"cannot fetch the data set wikimedia/wikipedia.*--text"
    ) as error:
        take(hub_dataset(folder=tmp_path), 0, 1)
    assert "\n" not in str(error.value)
    with pytest.raises(DownloadError, match="cannot fetch the data set x/y"):
        hub_dataset("x/y", folder=tmp_path)
