"""The paper's data: fetched once, checked, checked again, found by name; whatever is wrong is one line that says what to do."""

from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from file_server import serving
from typer.testing import CliRunner

from factlens.benchmarks.counterfact import Record, Target, read_records
from factlens.cli import app
from factlens.data_folder import LOCK, check, fetch, file_of
from factlens.data_sets import DATA_SETS, DataSet, count, data_set
from factlens.downloads import part_of
from factlens.errors import DownloadError
from factlens.facts import Fact, read_facts
from factlens.files import alone

FACTS = [
    {"known_id": n, "subject": f"City {n}", "attribute": "x", "prompt": f"City {n} is in"}
    for n in range(3)
]
CONTENT = json.dumps(FACTS).encode()
SHA = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """The folder in which commands look for `data`; no proxy between the tests and this machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server():
    with serving(content=CONTENT) as served:
        yield served


@pytest.fixture
def tiny(server, monkeypatch) -> DataSet:
    """A data set of three facts whose sha256 is not pinned."""
    made = DataSet(
        name="tiny", what="three", form="facts", file="tiny.json", url=server.url, records=3
    )
    monkeypatch.setitem(DATA_SETS, "tiny", made)
    return made


def run(*words: object, code: int = 0):
    result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exit_code == code, result.output + str(result.exception)
    if code == 2:
        assert len(result.stderr.strip().split("\n")) == 1, result.stderr
    return result


def notes(folder: Path = Path("data")) -> dict:
    return json.loads((folder / LOCK).read_text("utf-8"))["files"]


# -- the list --------------------------------------------------------------------------------------


def test_the_papers_data_is_all_there_and_each_file_has_its_own_name():
    assert {each.form for each in DATA_SETS.values()} == {
        "facts",
        "counterfact",
        "zsre",
        "snippets",
    }
    assert len({each.file for each in DATA_SETS.values()}) == len(DATA_SETS)
    for each in DATA_SETS.values():
        assert (each.sha256 is None) or len(each.sha256) == 64
        assert (each.commit is None) or len(each.commit) == 40
        assert each.url.endswith(each.file) or each.commit


def test_the_list_says_what_there_is_and_what_is_here(tiny):
    listed = run("data").output
    for name in DATA_SETS:
        assert name in listed
    assert "21,919" in listed
    assert "yes" not in listed
    fetch(tiny)
    assert [line.split()[0] for line in run("data").output.splitlines() if " yes " in line] == [
        "tiny"
    ]


# -- fetching --------------------------------------------------------------------------------------


def test_a_data_set_is_fetched_checked_noted_and_not_asked_for_again(tiny, server):
    assert run("data", "tiny").stdout.strip() == "data/tiny.json"
    assert len(read_facts(Path("data/tiny.json"))) == 3
    noted = notes()["tiny"]
    assert noted.pop("date").startswith("20")
    assert noted == {
        "file": "tiny.json",
        "sha256": SHA,
        "bytes": len(CONTENT),
        "records": 3,
        "url": server.url,
        "etag": '"one"',
    }
    assert fetch(tiny) == Path("data/tiny.json")
    assert len(server.asked) == 1


def test_a_download_that_was_cut_is_listed_and_goes_on(tiny, server):
    server.cuts = [100]
    assert f"ended after 100 of {len(CONTENT)} bytes" in run("data", "tiny", code=2).stderr
    assert not Path("data/tiny.json").exists()
    assert "0.0 of 0.0 MB" in run("data").output
    run("data", "tiny")
    assert server.asked[-1][1] == "bytes=100-"
    assert Path("data/tiny.json").read_bytes() == CONTENT


def test_ctrl_c_says_that_the_same_command_goes_on(tiny, monkeypatch):
    def interrupted(*asked, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("factlens.data_folder.download", interrupted)
    assert "the same command goes on from data" in run("data", "tiny", code=130).stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sha256": "0" * 64}, f"has sha256 {SHA}, expected {'0' * 64}, which is pinned"),
        ({"records": 4}, "has 3 records, expected 4; it was not kept"),
        ({"form": "counterfact"}, "holds no records that can be used"),
        ({"form": "zsre"}, "holds no records that can be used"),
        ({"form": "snippets"}, "record 0: no relation_id"),
    ],
)
def test_what_is_not_expected_is_not_kept(tiny, changes, words):
    with pytest.raises(DownloadError) as caught:
        fetch(replace(tiny, **changes))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [each.name for each in Path("data").iterdir()] == [f".{LOCK}"]
    assert fetch(replace(tiny, sha256=SHA)).is_file(), "the control"


def test_a_truncated_file_is_refused_even_where_the_server_says_no_length(tiny, server):
    server.content, server.length = CONTENT[:-5], False
    with pytest.raises(DownloadError, match=r"not JSON.*it was not kept"):
        fetch(tiny)


def test_another_file_under_the_same_url_is_refused_later(tiny, server):
    fetch(tiny).unlink()
    first = notes()
    fetch(tiny).unlink()
    assert notes() == first, "of the same file again the first note stays"
    server.content = json.dumps(FACTS[::-1]).encode()
    with pytest.raises(DownloadError, match=f"expected {SHA} as on 20.*remove 'tiny' from data/d"):
        fetch(tiny)
    assert not Path("data/tiny.json").exists()
    content = json.loads(Path("data", LOCK).read_text("utf-8"))
    del content["files"]["tiny"]
    Path("data", LOCK).write_text(json.dumps(content))
    assert fetch(tiny).is_file(), "as the line says"


def test_a_file_put_there_by_hand_is_checked_and_noted(tiny, server):
    Path("data").mkdir()
    Path("data/tiny.json").write_bytes(CONTENT)
    assert check(tiny).state == "not checked"
    fetch(tiny)
    assert (check(tiny).state, server.asked) == ("fine", [])
    Path("data", LOCK).unlink()
    Path("data/tiny.json").write_bytes(json.dumps(FACTS[1:]).encode())
    with pytest.raises(DownloadError, match=r"data/tiny.json has 2 records, expected 3"):
        fetch(tiny)
    assert Path("data/tiny.json").is_file(), "it is the user's"


def test_unknown_names_are_refused_before_anything_is_fetched(tiny, server):
    refused = run("data", "tiny", "pile", code=2).stderr
    assert "there is no data set 'pile'; there are known_1000, counterfact, zsre" in refused
    assert server.asked == []
    with pytest.raises(DownloadError, match="no data set"):
        data_set("pile")


def test_a_missing_file_and_a_missing_server_are_one_line(tiny, server):
    server.status = 404
    assert "answers 404" in run("data", "tiny", code=2).stderr
    with serving() as other:
        gone = replace(tiny, url=other.url)
    with pytest.raises(
        DownloadError, match=r"check the network, or put the file at data/tiny\.json"
    ):
        fetch(gone)


def test_two_processes_do_not_fetch_into_one_folder(tiny):
    busy = DownloadError("held")
    with alone(Path("data") / f".{LOCK}", busy):
        assert "another process is fetching into data" in run("data", "tiny", code=2).stderr


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "x", "files": {}}', "{}", "\u00ff"])
def test_a_damaged_lock_is_one_line(tiny, content):
    Path("data").mkdir()
    Path("data", LOCK).write_text(content, encoding="latin-1")
    assert "remove it, and `factlens data` notes" in run("data", "tiny", code=2).stderr


# -- checking again --------------------------------------------------------------------------------


def flip_one_byte(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("at", [0, 100, -1])
def test_one_flipped_byte_is_found(tiny, monkeypatch, pinned, at):
    if pinned:
        monkeypatch.setitem(DATA_SETS, "tiny", replace(tiny, sha256=SHA))
    assert row("tiny", run("data", "--verify", "tiny", code=1)) == "missing"
    run("data", "tiny")
    assert row("tiny", run("data", "--verify", "tiny")) == "fine"
    assert row("tiny", run("data", "--verify")) == "fine"
    flip_one_byte(Path("data/tiny.json"), at)
    for words in (("data", "--verify", "tiny"), ("data", "--verify")):
        assert row("tiny", run(*words, code=1)) == "changed"
    for words in (("data", "tiny"), ("trace", "--facts", "tiny")):
        refused = run(*words, code=2).stderr
        assert f"expected {SHA}; remove it, and `factlens data tiny` fetches it again" in refused
    flip_one_byte(Path("data/tiny.json"), at)
    assert row("tiny", run("data", "--verify", "tiny")) == "fine"


def row(name: str, result) -> str:
    """The state that the table gives a data set."""
    (line,) = [x for x in result.stdout.splitlines() if x.startswith(f"{name} ")]
    return line.split()[1]


def test_checking_asks_nobody(tiny, server):
    run("data", "--verify")
    run("data")
    assert server.asked == []


# -- by name ---------------------------------------------------------------------------------------


def test_a_name_stands_for_its_file_and_a_path_for_itself(tiny):
    assert file_of(None, "facts") is None
    assert file_of(Path("mine.csv"), "facts") == Path("mine.csv")
    with pytest.raises(DownloadError, match=r"tiny: data/tiny.json is not there; `factlens data t"):
        file_of(Path("tiny"), "facts")
    fetch(tiny)
    assert file_of(Path("tiny"), "facts") == Path("data/tiny.json")
    with pytest.raises(
        DownloadError, match="tiny is of the form facts; here zsre is read: zsre_me"
    ):
        file_of(Path("tiny"), "zsre")
    Path("tiny").write_text("a file of that name")
    assert file_of(Path("tiny"), "facts") == Path("tiny")


def test_a_file_that_was_never_checked_is_not_taken_for_the_data_set(tiny):
    Path("data").mkdir()
    Path("data/tiny.json").write_bytes(CONTENT)
    with pytest.raises(DownloadError, match="was never checked; `factlens data tiny` checks it"):
        file_of(Path("tiny"), "facts")


@pytest.mark.parametrize(
    "words",
    [
        ("average", "--facts", "known_1000"),
        ("trace", "--facts", "NeelNanda/counterfact-tracing"),
        ("evaluate", "--records", "counterfact"),
        ("evaluate", "--benchmark", "zsre", "--records", "zsre_mend_eval"),
        ("evaluate", "--generate", 9, "--snippets", "attribute_snippets"),
        ("sweep", "--records", "azhx/counterfact"),
        ("paper", "--zsre", "zsre_mend_eval"),
        ("edit", "--rewrites", "counterfact"),
        ("rate", "make", "--records", "counterfact"),
        ("train-editor", "mend", "--data", "zsre", "--records", "zsre_mend_train"),
    ],
)
def test_every_command_says_how_to_fetch_what_is_not_there(words, monkeypatch):
    def loaded(*model, **more):
        raise AssertionError("a model is loaded before the file is looked for")

    monkeypatch.setattr("factlens.models.load_model", loaded)
    name, out = words[-1], ("--out", "out")
    refused = run(*words, *out, code=2).stderr
    assert f"is not there; `factlens data {name}` fetches it" in refused


def test_the_paper_keeps_the_path_in_its_plan(tiny, monkeypatch):
    from factlens.commands import papering
    from factlens.errors import RunError

    said = []

    def stop(words):
        said.append([*map(str, words)])
        if words[0] == "average":
            raise RunError("enough")

    monkeypatch.setattr(papering, "run_command", stop)
    fetch(tiny)
    CliRunner().invoke(app, ["paper", "--quick", "--facts", "tiny", "--out", "out"])
    assert said[-1][said[-1].index("--facts") + 1] == "data/tiny.json"
    assert json.loads(Path("out/plan.json").read_text("utf-8"))["facts file"] == "data/tiny.json"


# -- from the hub ----------------------------------------------------------------------------------

RECORDS = [
    Record(
        case_id=n,
        pararel_idx=n,
        prompt="{} speaks",
        relation_id="P1",
        target_new=Target("French", "Q1"),
        target_true=Target("Thai", "Q2"),
        subject=f"Ann {n}",
        paraphrase_prompts=("a", "b"),
        neighborhood_prompts=("c",),
        attribute_prompts=(),
        generation_prompts=("d",),
    )
    for n in range(5)
]
TRACED = [
    {"prompt": "Paris is in", "subject": "Paris", "target_true": " France", "relation_id": "P17"},
    {"prompt": "In Rome, one, or so, is in", "subject": " Rome", "target_true": " Italy", "relation_id": "P17"},
]  # fmt: skip


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of one data set: give it files of rows."""
    state = SimpleNamespace(files={}, fetched=[], folder=tmp_path / "hub")

    def put(name, rows):
        path = state.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path)
        lfs = SimpleNamespace(sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        state.files[name] = SimpleNamespace(path=name, size=path.stat().st_size, lfs=lfs)

    def download(name, path, *, repo_type, revision):
        state.fetched.append((name, path, revision))
        return str(state.folder / path)

    state.put = put
    monkeypatch.setattr(
        huggingface_hub.HfApi, "list_repo_tree", lambda *a, **k: iter(state.files.values())
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return state


def test_the_splits_of_the_hub_become_the_official_file_in_its_order(hub):
    shuffled = [RECORDS[n].to_json() for n in (3, 0, 4)], [RECORDS[n].to_json() for n in (2, 1)]
    hub.put("data/train-0.parquet", shuffled[0])
    hub.put("data/test-0.parquet", shuffled[1])
    wanted = replace(DATA_SETS["azhx/counterfact"], records=5)
    path = fetch(wanted)
    assert read_records(path) == RECORDS
    assert {commit for *_, commit in hub.fetched} == {wanted.commit}
    noted = notes()["azhx/counterfact"]
    assert (noted["commit"], noted["records"]) == (wanted.commit, 5)
    assert check(wanted).state == "fine"
    flip_one_byte(path, 50)
    assert check(wanted).state == "changed"
    path.unlink()
    assert fetch(wanted).is_file(), "the same bytes again"


def test_facts_of_the_hub_are_facts_without_the_spaces_of_their_tokens(hub):
    hub.put("data/train-0.parquet", TRACED)
    wanted = replace(DATA_SETS["NeelNanda/counterfact-tracing"], records=2)
    assert read_facts(fetch(wanted)) == [
        Fact("Paris is in", "Paris", "France", "P17", "0"),
        Fact("In Rome, one, or so, is in", "Rome", "Italy", "P17", "1"),
    ]
    with Path("data/counterfact-tracing.csv").open(newline="") as file:
        assert len(list(csv.reader(file))) == 3


@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        ("NeelNanda/counterfact-tracing", TRACED[:1], "has 1 records, expected 2; it was not kept"),
        ("NeelNanda/counterfact-tracing", [{"body": "x"}], r"not of the known form \(KeyError: 's"),
        ("azhx/counterfact", [{"case_id": 1}], "row 0: no requested_rewrite; it has case_id"),
        ("azhx/counterfact", [], "holds no records"),
    ],
)
def test_another_data_set_on_the_hub_is_refused(hub, name, rows, words):
    hub.put("data/train-0.parquet", rows)
    with pytest.raises(DownloadError, match=words) as caught:
        fetch(replace(DATA_SETS[name], records=2))
    assert "\n" not in str(caught.value)
    assert [each.name for each in Path("data").iterdir()] == [f".{LOCK}"]


def test_a_file_of_the_hub_with_another_checksum_is_refused(hub):
    hub.put("data/train-0.parquet", TRACED)
    flip_one_byte(hub.folder / "data/train-0.parquet", 10)
    with pytest.raises(DownloadError, match="not the file that the hub lists"):
        fetch(DATA_SETS["NeelNanda/counterfact-tracing"])


def test_a_hub_that_cannot_be_reached_is_one_line():
    """The tests run with the hub switched off."""
    refused = run("data", "azhx/counterfact", code=2).stderr
    assert "cannot fetch the data set azhx/counterfact from the hub" in refused
    assert "put its records in the official form at data/azhx-counterfact.json" in refused


# -- counting --------------------------------------------------------------------------------------


def test_records_that_cannot_be_used_count_too(tiny, tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps([*FACTS[:2], {"prompt": "nobody here", "subject": "Ann"}]))
    assert count(tiny, path) == 3
    assert part_of(path).name == "tiny.json.part"
