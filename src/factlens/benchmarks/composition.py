"""What a set of CounterFact records is made of (ROME, Table 3)."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pandas as pd

from factlens.benchmarks.counterfact import Record

ITEMS: Mapping[str, Callable[[Record], Iterable[str]]] = {
    "subjects": lambda record: [record.subject],
    "objects": lambda record: [record.target_new.text],
    "counterfactual statements": lambda record: [
        f"{record.rewrite.prompt} {record.target_new.text}"
    ],
    "paraphrase prompts": lambda record: record.paraphrase_prompts,
    "neighborhood prompts": lambda record: record.neighborhood_prompts,
    "generation prompts": lambda record: record.generation_prompts,
}
"""What a record has of each item; the table's first row counts the records themselves."""


def composition(records: Iterable[Record]) -> pd.DataFrame:
    """How many records, subjects, objects, statements and prompts there are: in all, per relation and per record.

    Columns: `item, total, per_relation, per_record`. Every number counts distinct texts: `total` in all records, `per_relation` in
    the records of each relation, `per_record` in each record, the last two as means. So a prompt that serves two relations counts
    in both, and CounterFact's ten generation prompts a record, of which many are the same, are about three, as in the paper.
    Objects are the new ones, o*, of which a record has one. Texts are compared verbatim.
    """
    listed = list(records)
    by_relation: dict[str, list[Record]] = {}
    for record in listed:
        by_relation.setdefault(record.relation_id, []).append(record)
    groups = list(by_relation.values())
    rows: list[dict[str, Any]] = [
        {
            "item": "records",
            "total": len(listed),
            "per_relation": _mean(map(len, groups)),
            "per_record": _mean(1 for _ in listed),
        }
    ]
    for item, texts in ITEMS.items():
        rows.append(
            {
                "item": item,
                "total": _distinct(listed, texts),
                "per_relation": _mean(_distinct(group, texts) for group in groups),
                "per_record": _mean(_distinct([record], texts) for record in listed),
            }
        )
    return pd.DataFrame(rows)


def _distinct(records: Iterable[Record], texts: Callable[[Record], Iterable[str]]) -> int:
    return len({text for record in records for text in texts(record)})


def _mean(counts: Iterable[int]) -> float:
    """The mean, NaN of nothing."""
    return float(pd.Series(list(counts), dtype=float).mean())
