"""Tables of `factlens tune` made by hand."""

from __future__ import annotations

import pandas as pd

from factlens.tunables import tunable
from factlens.tunings import best

HOW = "12 settings of each editor on 3 records of atlas-CounterFact that are not tested on, seed 0"
DEFAULT = {
    "layer": 0,
    "max_norm_ratio": 4.0,
    "learning_rate": 1e-3,
    "max_change": 5e-3,
    "threshold": 0.2,
    "erase": 2.0,
    "write": 1.0,
    "scale": 1.0,
}
SCORES = ("S", "ES", "PS", "NS", "retention", "KL")


def table(editor: str, settings: list[dict]) -> pd.DataFrame:
    """One row for each setting, of which a dictionary says what differs."""
    rows = [
        {
            "editor": editor,
            "setting": number,
            **{name: DEFAULT[name] for name in tunable(editor).space.names},
            "how": HOW,
            **dict.fromkeys(SCORES, 50.0),
            **{f"{name}_margin": 2.0 for name in SCORES},
            "n": 3,
            "failed": 0,
            **given,
        }
        for number, given in enumerate(settings)
    ]
    made = pd.DataFrame(rows)
    made.insert(2, "taken", made.index == best(made))
    return made
