"""What the loop of an evaluation must know of a benchmark, and tables of means that refuse to mix protocols."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from factlens.benchmarks.references import References
from factlens.errors import PlanError
from factlens.metrics import half_width
from factlens.models import Model

PROTOCOLS = ("protocol", "text_protocol")
"""Columns that say how numbers were had."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """How records of one kind are measured. A case is a record with all that must be known of the unedited model."""

    name: str
    record: type
    scoring: str
    """The first two parts of the protocol: scoring and decoding."""
    labels: tuple[str, ...]
    """Attributes of a record that its row begins with."""
    scores: tuple[str, ...]
    """Columns of shares and of differences of probability, of which tables give the mean."""
    text_scores: tuple[str, ...]
    """Those that need generated text."""
    counts: tuple[str, ...]
    """Further columns that a case has."""
    lacking: Callable[[Any], str]
    """Why a record cannot be measured; empty if it can."""
    cases: Callable[..., list[Any]]
    """`(model, records, others, together) -> cases`: of the unedited model. `together` are all records whose edits are on the model at once."""
    measure: Callable[[Model, Any, "Texts | None"], dict[str, object]]
    """The scores of a case by the model as it stands."""

    def protocol(self, mode: str) -> str:
        """Scoring, decoding, mode and version."""
        return f"{self.scoring}/{mode}/1"


@dataclass(frozen=True)
class Texts:
    """What texts are generated, and what they are compared with."""

    tokens: int
    """Of a text with its prompt, as far as the model's positions go."""
    references: References


def text_protocol(tokens: int, mode: str) -> str:
    """How generated texts are scored; numbers of texts of other lengths do not compare."""
    return f"entropy-tfidf/top-5-of-{tokens}/{mode}/1"


def one_protocol(frame: pd.DataFrame) -> str:
    """The protocol of all numbers of a frame.

    Raises:
        PlanError: there are several, which do not compare, or none.
    """
    for column in PROTOCOLS:
        found = sorted(set(frame[column])) if column in frame else ["one"]
        if len(found) != 1:
            named = " and ".join(found) or "none"
            raise PlanError(
                f"a table has numbers of one protocol, not of {named}; make one for each"
            )
    return str(frame["protocol"].iloc[0])


def means(frame: pd.DataFrame, scores: Sequence[str]) -> dict[str, float]:
    """The mean of each score in per cent, and `..._margin`, half of its 95 % interval over records."""
    row = {}
    for score in scores:
        row[score] = 100 * float(frame[score].mean())
        row[f"{score}_margin"] = 100 * half_width(frame[score])
    return row
