"""Facts are read from every form, and a bad row is named."""

from __future__ import annotations

import json

import pytest

from factlens.errors import FactError, FactFileError
from factlens.facts import Fact, bundled_facts, read_facts, write_facts

OFFICIAL = [
    {
        "known_id": 0,
        "subject": "Vinson Massif",
        "attribute": "Antarctica",
        "template": "{} is located in the continent",
        "prediction": " of Antarctica. It is the largest",
        "prompt": "Vinson Massif is located in the continent of",
        "relation_id": "P30",
    }
]


def test_the_official_file_is_read(tmp_path):
    path = tmp_path / "known_1000.json"
    path.write_text(json.dumps(OFFICIAL))
    (fact,) = read_facts(path)
    assert fact == Fact(
        "Vinson Massif is located in the continent of", "Vinson Massif", "Antarctica", "P30", "0"
    )


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_users_files_are_read_and_templates_filled(tmp_path, suffix):
    path = tmp_path / f"mine.{suffix}"
    if suffix == "csv":
        path.write_text(
            'prompt,subject,object\n"{}, in short, is in",Łódź,Poland\n', encoding="utf-8"
        )
    else:
        row = {"prompt": "{}, in short, is in", "subject": "Łódź", "object": "Poland"}
        path.write_text(json.dumps(row) + "\n\n", encoding="utf-8")
    assert read_facts(path) == [Fact("Łódź, in short, is in", "Łódź", "Poland")]


def test_what_is_written_is_read_again(tmp_path):
    some = [
        *bundled_facts(one_per_fact=True)[:20],
        Fact('"Two\nlines", he said, is by', "Two\nlines"),
    ]
    write_facts(some, tmp_path / "f.csv")
    assert read_facts(tmp_path / "f.csv") == some


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("f.csv", "prompt,object\nx,y\n", "no column subject"),
        ("f.csv", "prompt,subject\nParis is in,Paris\nRome is in,Oslo\n", "line 3"),
        ("f.csv", "prompt,subject\nParis is in,\n", "line 2: no subject"),
        ("f.csv", "prompt,subject\nParis, the city,Paris\n", "more cells than columns"),
        ("f.csv", "prompt,subject\n", "holds no facts"),
        ("f.jsonl", '{"prompt": "a b", "subject": "a"}\n{oops\n', "line 2: not JSON"),
        ("f.jsonl", "[1]\n", "line 1"),
        ("f.json", '{"a": 1}', "must hold a list"),
        ("f.json", '[{"prompt": "a b"}]', "record 0: no subject"),
        ("f.txt", "hello", "is none of"),
    ],
)
def test_a_bad_file_is_refused_with_its_row(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(FactFileError, match=message) as caught:
        read_facts(path)
    assert "\n" not in str(caught.value)


def test_missing_and_undecodable_files_are_refused(tmp_path):
    with pytest.raises(FactFileError, match="cannot read"):
        read_facts(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes("prompt,subject\nZoë is,Zoë\n".encode("latin-1"))
    with pytest.raises(FactFileError, match="not UTF-8"):
        read_facts(tmp_path / "latin.csv")


def test_a_fact_is_text():
    for name, value in (("prompt", 3), ("subject", None), ("object", float("nan"))):
        bare = object.__new__(Fact)  # Not by the constructor, whose types the tests check already.
        for field, given in {**vars(Fact("x y", "x")), name: value}.items():
            object.__setattr__(bare, field, given)
        with pytest.raises(FactError, match=f"{name} must be text, not {value}"):
            bare.__post_init__()


def test_the_bundled_facts_hold_their_subjects():
    some = bundled_facts("fresh")
    assert len(some) > 5_000
    assert all(fact.subject in fact.prompt for fact in some)
    assert Fact("x", "x") not in some
    single = bundled_facts("fresh", one_per_fact=True)
    assert len({(f.relation, f.subject.lower()) for f in single}) == len(single) < len(some)


def test_three_bad_rows_of_a_thousand_are_told_and_the_rest_is_read(tmp_path):
    rows = [f"The capital of {{}} is,Country {n},City" for n in range(1000)]
    rows[10], rows[500], rows[999] = "no subject here,Norway,Oslo", "a {},,Oslo", "a,b,c,d,e"
    path, told = tmp_path / "facts.csv", []
    path.write_text("prompt,subject,object\n" + "\n".join(rows) + "\n", encoding="utf-8")
    assert len(read_facts(path, on_bad_row=told.append)) == 997
    assert ["line 12:" in told[0], "line 502:" in told[1], "line 1001:" in told[2]] == [True] * 3
    with pytest.raises(FactFileError, match="line 12"):
        read_facts(path)
