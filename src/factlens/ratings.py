"""The human evaluation of two editors (ROME, Section 3.6): what raters are shown, the key to it, and what they prefer.

`draw` makes two things of the editors' texts: what a page shows, which has no editor in it, and the `Key`, which stays at home.
`human_preferences` puts the answers and the key together again.
"""

import hashlib
import json
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from factlens.errors import PlanError, RatingError
from factlens.files import written_whole
from factlens.odds import odds_interval

QUESTIONS = ("consistency", "fluency")
FIRST, SECOND, TIE = "first", "second", "tie"
ANSWERS_FORMAT, KEY_FORMAT = "factlens-ratings", "factlens-ratings-key"
SHOWN = 50
"""Counterfactuals that the paper's volunteers compared."""
PAPER = {"consistency": 1.8, "fluency": 1 / 1.3}
"""The paper's odds of ROME over FT+L, by 15 volunteers on 50 counterfactuals of GPT-2 XL: "1.8 times more likely" to be rated the more
consistent, "1.3 times less likely" the more fluent. It gives no intervals."""
PAPER_RATERS = 15


@dataclass(frozen=True)
class Comparison:
    """A new fact, and what the model writes after either editor has inserted it."""

    fact: str
    """As a sentence."""
    a: str
    b: str
    case: str = ""
    """The record it is of; for the key alone."""


@dataclass(frozen=True)
class Shown:
    """A comparison as a rater sees it."""

    id: str
    """Its number on the page, which says nothing of the record or the editors."""
    fact: str
    first: str
    second: str


@dataclass(frozen=True)
class Key:
    """Which editor wrote which text of a page. Raters must not see it."""

    page: str
    editors: tuple[str, str]
    ties: bool
    """Whether "no difference" could be answered."""
    seed: int
    first: Mapping[str, str]
    """By item, the editor of its first text."""
    cases: Mapping[str, str]
    about: Mapping[str, object] = field(default_factory=dict)
    """How the texts were made."""


# -- what is shown ---------------------------------------------------------------------------------


def draw(
    comparisons: Sequence[Comparison],
    editors: tuple[str, str],
    *,
    ties: bool = False,
    seed: int | None = None,
    about: Mapping[str, object] | None = None,
) -> tuple[tuple[Shown, ...], Key]:
    """Put each comparison's two texts in random order; half of the first texts are of either editor.

    Balanced, so that a rater who likes first texts better favours neither editor. Without a `seed` one of 128 bits is drawn: from
    a guessed one anybody could draw the same order.

    Raises:
        PlanError: no comparisons, two that a rater cannot tell apart, or editors of one name.
    """
    if editors[0] == editors[1]:
        raise PlanError(f"both editors are called {editors[0]!r}; give each a name of its own")
    if not comparisons:
        raise PlanError("there is nothing to compare; give one pair of texts at least")
    if alike := [each.fact for each in comparisons if identical(each)]:
        raise PlanError(
            f"both texts about {alike[0]!r} are the same; leave such pairs out, they prefer neither editor"
        )
    seed = secrets.randbits(128) if seed is None else seed
    count = len(comparisons)
    random = np.random.default_rng(seed)
    swapped = random.permutation((np.arange(count) + random.integers(2)) % 2 == 1)
    shown, first, cases = [], {}, {}
    for number, (each, swap) in enumerate(zip(comparisons, swapped, strict=True), start=1):
        texts = (each.b, each.a) if swap else (each.a, each.b)
        shown.append(Shown(str(number), each.fact, *(text.strip() for text in texts)))
        first[str(number)], cases[str(number)] = editors[int(swap)], each.case
    page = page_id(shown, ties)
    return tuple(shown), Key(page, editors, ties, seed, first, cases, dict(about or {}))


def identical(comparison: Comparison) -> bool:
    """Whether a rater would see the same text twice."""
    return comparison.a.strip() == comparison.b.strip()


def page_id(shown: Sequence[Shown], ties: bool) -> str:
    """The name of a page: a digest of what it shows, so that the same texts in another order are another page."""
    text = json.dumps([ties, *(asdict(each) for each in shown)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# -- the key ---------------------------------------------------------------------------------------


def write_key(key: Key, path: str | Path) -> None:
    """Write a key as JSON, which `read_key` reads."""
    with written_whole(path) as partial:
        text = json.dumps({"format": KEY_FORMAT, **asdict(key)}, indent=1)
        partial.write_text(text + "\n", encoding="utf-8")


def read_key(path: str | Path) -> Key:
    """Read a page's key.

    Raises:
        RatingError: the file cannot be read, or is no key.
    """
    found = _read(path)
    if not isinstance(found, Mapping) or found.get("format") != KEY_FORMAT:
        hint = "; it is a rater's answers" if _is_answers(found) else ""
        raise RatingError(f"{path} is no key of a page of `factlens rate make`{hint}")
    if wrong := [name for name, check in _KEY.items() if not check(found.get(name))]:
        raise RatingError(
            f"{path} is a damaged key: its {wrong[0]} cannot be used; take the one beside the page"
        )
    key = Key(**{name: found[name] for name in _KEY} | {"editors": tuple(found["editors"])})
    if (
        not key.first
        or set(key.first.values()) - set(key.editors)
        or set(key.first) != set(key.cases)
    ):
        raise RatingError(
            f"{path} is a damaged key: its items do not fit its editors; take the one beside the page"
        )
    return key


def _is_names(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(each, str) for each in value.values())


def _is_pair(value: object) -> bool:
    return (
        isinstance(value, list)
        and [type(each) for each in value] == [str, str]
        and value[0] != value[1]
    )


_KEY: dict[str, Any] = {
    "page": lambda value: isinstance(value, str),
    "editors": _is_pair,
    "ties": lambda value: isinstance(value, bool),
    "seed": lambda value: isinstance(value, int),
    "first": _is_names,
    "cases": _is_names,
    "about": lambda value: isinstance(value, Mapping),
}


# -- the answers -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """What one rater preferred: by item and question "first", "second" or "tie"."""

    rater: str
    choices: Mapping[str, Mapping[str, str]]


def read_answers(path: str | Path, key: Key) -> Answers:
    """Read the file that a page saves at its end.

    Raises:
        RatingError: the file cannot be read, is no such file, is of another page than the key, or lacks answers.
    """
    found = _read(path)
    if not _is_answers(found):
        hint = (
            "; it is a key"
            if isinstance(found, Mapping) and found.get("format") == KEY_FORMAT
            else ""
        )
        raise RatingError(
            f"{path} is no file of answers that a page of `factlens rate make` saves{hint}"
        )
    if found.get("page") != key.page:
        raise RatingError(
            f"{path} answers page {found.get('page')!r}, and the key is of page {key.page!r}; give the key beside that page"
        )
    rater, answers = found.get("rater"), found.get("answers")
    if not isinstance(rater, str) or not rater.strip():
        raise RatingError(f"{path} does not say whose answers it holds: rater is {rater!r}")
    if not isinstance(answers, Mapping):
        raise RatingError(f"{path}: answers must be items with their choices, not {answers!r:.60}")
    if unknown := [item for item in answers if item not in key.first]:
        raise RatingError(f"{path} answers item {unknown[0]!r}, which the page does not have")
    allowed = (FIRST, SECOND, TIE) if key.ties else (FIRST, SECOND)
    _check_choices(path, answers, key.first, allowed)
    return Answers(rater.strip(), answers)


def _check_choices(
    path: str | Path, answers: Mapping[str, Any], items: Collection[str], allowed: Sequence[str]
) -> None:
    """Refuse what is no choice, and then what is missing: a rater who stopped early would count for the early items alone."""
    missing = []
    for item in items:
        given = answers.get(item, {})
        if not isinstance(given, Mapping):
            raise RatingError(f"{path}, item {item}: {given!r:.60} is no choice for each question")
        for question in QUESTIONS:
            if question not in given:
                missing.append(item)
            elif given[question] not in allowed:
                raise RatingError(
                    f"{path}, item {item}: {question} is {given[question]!r:.60}; it can be {', '.join(allowed)}"
                )
    if missing:
        lacking = list(dict.fromkeys(missing))
        raise RatingError(
            f"{path} is not complete: {len(lacking)} of {len(items)} items lack an answer, the first is item {lacking[0]}; "
            "let the rater finish the page and save again"
        )


def _is_answers(found: object) -> bool:
    return isinstance(found, Mapping) and found.get("format") == ANSWERS_FORMAT


def _read(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise RatingError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise RatingError(f"{path} is not JSON in UTF-8; give the file as it was saved") from None


# -- preferences -----------------------------------------------------------------------------------


def human_preferences(exports: Sequence[str | Path], key: Key | str | Path) -> pd.DataFrame:
    """Which of the two editors raters prefer: for each question its wins, the odds with 95 % intervals, and the paper's odds.

    Columns: `source` ("here" or "paper"), `question, editor, other`, then of the editor over the other `wins, losses, ties, odds, low,
    high`; `over` says what the interval is over (`odds.odds_interval`: raters and items are both clusters), `first` is the share of
    first texts among those preferred (0.5 for raters whom the order does not sway), `raters` and `items` are counts. The paper's rows
    are of ROME over FT+L, whichever editors are compared here, and have odds alone.

    Args:
        exports: the files of answers, one for each rater.
        key: the page's, or its file.

    Raises:
        RatingError: a file that cannot be used, is of another page or not complete, two of one rater, or none.
    """
    key = key if isinstance(key, Key) else read_key(key)
    if not exports:
        raise RatingError("no answers were given; give the file of one rater at least")
    found: dict[str, tuple[str | Path, Answers]] = {}
    for path in exports:
        answers = read_answers(path, key)
        if answers.rater in found:
            raise RatingError(
                f"{found[answers.rater][0]} and {path} are both of rater {answers.rater!r}; give the later one, or rename "
                "the rater in one if they are two people"
            )
        found[answers.rater] = path, answers
    everyone = [answers for _, answers in found.values()]
    rows = [_preferred(everyone, key, question) for question in QUESTIONS]
    rows += [
        {"source": "paper", "question": question, "editor": "ROME", "other": "FT+L", "odds": odds,
         "raters": PAPER_RATERS, "items": SHOWN}
        for question, odds in PAPER.items()
    ]  # fmt: skip
    return pd.DataFrame(rows).astype(dict.fromkeys(("wins", "losses", "ties"), "Int64"))


def _preferred(everyone: Sequence[Answers], key: Key, question: str) -> dict[str, object]:
    """One question's row: how often the first of the key's editors was preferred."""
    choices = np.array([[each.choices[item][question] for item in key.first] for each in everyone])
    own_first = np.array([editor == key.editors[0] for editor in key.first.values()])
    first, second = choices == FIRST, choices == SECOND
    wins = np.where(own_first, first, second)
    losses = np.where(own_first, second, first)
    found = odds_interval(wins, losses)
    decided = int(wins.sum() + losses.sum())
    return {
        "source": "here",
        "question": question,
        "editor": key.editors[0],
        "other": key.editors[1],
        "wins": int(wins.sum()),
        "losses": int(losses.sum()),
        "ties": int(choices.size - decided),
        **asdict(found),
        "first": first.sum() / decided if decided else float("nan"),
        "raters": choices.shape[0],
        "items": choices.shape[1],
    }
