"""Table 3 counts what the records hold: in closed form, and against a second count with pandas."""

from __future__ import annotations

import pandas as pd
import pytest

from factlens.benchmarks.atlas_counterfact import counterfact
from factlens.benchmarks.composition import composition
from factlens.benchmarks.counterfact import Record, Target

ITEMS = [
    "records",
    "subjects",
    "objects",
    "counterfactual statements",
    "paraphrase prompts",
    "neighborhood prompts",
    "generation prompts",
]


def record(
    number: int, relation: str, subject: str, new: str, near=(), free=(), said=("p", "q")
) -> Record:
    return Record(
        case_id=number,
        pararel_idx=0,
        prompt="{} is in",
        relation_id=relation,
        target_new=Target(new, ""),
        target_true=Target("Paris", ""),
        subject=subject,
        paraphrase_prompts=said,
        neighborhood_prompts=near,
        attribute_prompts=(),
        generation_prompts=free,
    )


def test_a_hand_computed_table():
    records = [
        # Ten generation prompts of which two differ, as in the official file.
        record(0, "P1", "A", "Rome", near=("x", "y", "z"), free=("f", "g") * 5),
        record(1, "P1", "B", "Rome", near=("y", "z", "w"), free=("f",), said=("p", "r")),
        # The first one's statement and prompts again, under another relation.
        record(2, "P2", "A", "Rome", near=("x",), free=("f", "g")),
        record(3, "P2", "A", "Oslo"),
    ]
    expected = pd.DataFrame(
        [
            # records: 4; 2 and 2; 1 each
            ("records", 4, 2.0, 1.0),
            # A, B; A and B, A; 1 each
            ("subjects", 2, 1.5, 1.0),
            # Rome, Oslo; Rome, Rome and Oslo
            ("objects", 2, 1.5, 1.0),
            # A Rome, B Rome, A Oslo; two each
            ("counterfactual statements", 3, 2.0, 1.0),
            # p, q, r; three and two; two each
            ("paraphrase prompts", 3, 2.5, 2.0),
            # w, x, y, z; four and one; 3, 3, 1, 0
            ("neighborhood prompts", 4, 2.5, 7 / 4),
            # f, g; two and two; 2, 1, 2, 0
            ("generation prompts", 2, 2.0, 5 / 4),
        ],
        columns=["item", "total", "per_relation", "per_record"],
    )
    pd.testing.assert_frame_equal(composition(iter(records)), expected)


def second_count(records: list[Record]) -> pd.DataFrame:
    """The same from one long frame of texts."""
    rows = []
    for number, each in enumerate(records):
        rewrite = each.to_json()["requested_rewrite"]
        new = rewrite["target_new"]["str"]
        statement = rewrite["prompt"].replace("{}", rewrite["subject"]) + " " + new
        texts = {
            "records": [str(number)],
            "subjects": [rewrite["subject"]],
            "objects": [new],
            "counterfactual statements": [statement],
        }
        for item in ITEMS[4:]:
            texts[item] = each.to_json()[item.replace(" ", "_")]
        rows += [
            (item, rewrite["relation_id"], number, text)
            for item in ITEMS
            for text in (*texts[item], None)  # None is not counted and keeps the group.
        ]
    frame = pd.DataFrame(rows, columns=["item", "relation", "record", "text"])
    count = {
        "total": frame.groupby("item", sort=False)["text"].nunique(),
        "per_relation": frame.groupby(["item", "relation"], sort=False)["text"].nunique(),
        "per_record": frame.groupby(["item", "record"], sort=False)["text"].nunique(),
    }
    for name in ("per_relation", "per_record"):
        count[name] = count[name].groupby("item", sort=False).mean()
    return pd.DataFrame(count).reset_index()


def test_the_composition_of_atlas_counterfact_is_that_of_a_second_count():
    records = list(counterfact(only=["sport", "instrument", "maker", "language"]))[:300]
    found = composition(records)
    assert list(found["item"]) == ITEMS
    pd.testing.assert_frame_equal(found, second_count(records))
    # What a count of all texts, equal or not, would give.
    near = sum(len(each.neighborhood_prompts) for each in records)
    assert found.set_index("item").loc["neighborhood prompts", "total"] < near
    assert found["per_relation"].lt(found["total"]).all()


def test_no_records_have_no_composition():
    found = composition([])
    assert list(found["total"]) == [0] * len(ITEMS)
    assert found[["per_relation", "per_record"]].isna().all(axis=None)


@pytest.mark.parametrize(
    ("item", "changed"),
    [
        ("subjects", {"subject": "C"}),
        ("objects", {"new": "Quito"}),
        ("paraphrase prompts", {"said": ("p", "new")}),
        ("neighborhood prompts", {"near": ("new",)}),
        ("generation prompts", {"free": ("new",)}),
    ],
)
def test_each_item_counts_its_own_texts(item, changed):
    before = [record(0, "P1", "A", "Rome", near=("x",), free=("f",))]
    same = {"number": 1, "relation": "P1", "subject": "A", "new": "Rome", "near": ("x",)}
    more = record(**{**same, "free": ("f",), **changed})
    was, now = (composition(some).set_index("item")["total"] for some in (before, [*before, more]))
    grown = set(now.index[now > was]) - {"records", "counterfactual statements"}
    assert grown == {item}
