"""The paper's own numbers: Tables 1 and 2 of Meng et al. (2022), as they are printed.

Each row is an editor, then every score and half of its 95 % interval; S has none. `paper_tables` sets them beside ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from factlens import metrics, zsre_scores


@dataclass(frozen=True)
class Numbers:
    """The rows of a table of the paper, of one model."""

    rows: str
    records: int
    """How many they are means over."""
    protocol: str


ZSRE = Numbers(
    rows="""
        none       22.2 0.5  21.3 0.5  24.2 0.5
        ft         99.6 0.1  82.1 0.6  23.2 0.5
        ft-l       92.3 0.4  47.2 0.7  23.4 0.5
        ke         65.5 0.6  61.4 0.6  24.9 0.5
        ke-zsre    92.4 0.3  90.0 0.3  23.8 0.5
        mend       75.9 0.5  65.3 0.6  24.1 0.5
        mend-zsre  99.4 0.1  99.3 0.1  24.1 0.5
        rome       99.8 0.0  88.1 0.5  24.2 0.5
    """,
    records=10_000,
    protocol=zsre_scores.PROTOCOL,
)
"""Table 1, of GPT-2 XL. The row of MEND-zsRE is misprinted there as MEND-CF."""

COUNTERFACT: Mapping[str, Numbers] = {
    "GPT-2 XL": Numbers(
        rows="""
            none     30.5   22.2 0.9  -4.8 0.3  24.7 0.8  -5.0 0.3  78.1 0.6    5.0 0.2  626.6 0.3  31.9 0.2
            ft       65.1  100.0 0.0  98.8 0.1  87.9 0.6  46.6 0.8  40.4 0.7   -6.2 0.4  607.1 1.1  40.5 0.3
            ft-l     66.9   99.1 0.2  91.5 0.5  48.7 1.0  28.9 0.8  70.3 0.7    3.5 0.3  621.4 1.0  37.4 0.3
            kn       35.6   28.7 1.0  -3.4 0.3  28.0 0.9  -3.3 0.2  72.9 0.7    3.7 0.2  570.4 2.3  30.3 0.3
            ke       52.2   84.3 0.8  33.9 0.9  75.4 0.8  14.6 0.6  30.9 0.7  -11.0 0.5  586.6 2.1  31.2 0.3
            ke-cf    18.1   99.9 0.1  97.0 0.2  95.8 0.4  59.2 0.8   6.9 0.3  -63.2 0.7  383.0 4.1  24.5 0.4
            mend     57.9   99.1 0.2  70.9 0.8  65.4 0.9  12.2 0.6  37.9 0.7  -11.6 0.5  624.2 0.4  34.8 0.3
            mend-cf  14.9  100.0 0.0  99.2 0.1  97.0 0.3  65.6 0.7   5.5 0.3  -69.9 0.6  570.0 2.1  33.2 0.3
            rome     89.2  100.0 0.1  97.9 0.2  96.4 0.3  62.7 0.8  75.4 0.7    4.2 0.2  621.9 0.5  41.9 0.3
        """,
        records=7_500,
        protocol=metrics.PROTOCOL,
    ),
    "GPT-J": Numbers(
        rows="""
            none     23.6   16.3 1.6  -7.2 0.7  18.6 1.5  -7.4 0.6  83.0 1.1    7.3 0.5  621.8 0.6  29.8 0.5
            ft       25.5  100.0 0.0  99.9 0.0  96.6 0.6  71.0 1.5  10.3 0.8  -50.7 1.3  387.8 7.3  24.6 0.8
            ft-l     68.7   99.6 0.3  95.0 0.6  47.9 1.9  30.4 1.5  78.6 1.2    6.8 0.5  622.8 0.6  35.5 0.5
            mend     63.2   97.4 0.7  71.5 1.6  53.6 1.9  11.0 1.3  53.9 1.4   -6.0 0.9  620.5 0.7  32.6 0.5
            rome     91.5   99.9 0.1  99.4 0.3  99.1 0.3  74.1 1.3  78.9 1.2    5.2 0.5  620.1 0.9  43.0 0.6
        """,
        records=2_000,
        protocol=metrics.PROTOCOL,
    ),
}
"""Table 2, by model."""


def read(text: str, scores: Sequence[str], without_margin: Sequence[str] = ()) -> pd.DataFrame:
    """The rows as a frame: `editor`, each score with its `..._margin`, NaN for those that have none."""
    margins = {score: f"{score}_margin" for score in scores}
    printed = [
        name
        for score in scores
        for name in ((score,) if score in without_margin else (score, margins[score]))
    ]
    rows: list[dict[str, object]] = []
    for line in text.strip().splitlines():
        editor, *numbers = line.split()
        rows.append({"editor": editor, **dict(zip(printed, map(float, numbers), strict=True))})
    columns = [name for score in scores for name in (score, margins[score])]
    return pd.DataFrame(rows).reindex(columns=["editor", *columns])
