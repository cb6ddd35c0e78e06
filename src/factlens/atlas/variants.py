"""The trainings that were compared: a baseline, and recipes that differ from it in one thing each (`_instead`: other documents in the
place of a fifth of the captions), but for `longer`, `broad` and what is made of them.

`python -m factlens.atlas_search` runs them; docs/atlas.md shows what came of it, and of an earlier search on a world of more subjects with fewer facts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from factlens.atlas.recipes import Cycle, Recipe, shortened
from factlens.atlas.tables import TAUGHT

SHARE = 0.2
"""Of the documents, where others take the place of captions."""
SHORT = 3000
"""Steps of a short training."""
FEWER_STEPS = shortened(Recipe(), 6800)
"""The bundled model's recipe in the steps that a model of twice the width has time for."""
BROAD: dict[str, Any] = {
    "layers": 4,
    "d_model": 256,
    "captions_first": FEWER_STEPS.captions_first,
}
"""Half as deep and twice as wide as the baseline."""
STEADY = (
    Cycle(steps=2560, learning_rate=3e-3, captions=0.6, ends_at=3e-3),
    Cycle(steps=2240, learning_rate=3e-3, captions=0.3, ends_at=1e-3),
    Cycle(steps=1600, learning_rate=1e-3, captions=0.2, direct=True),
)
"""A learning rate that is held for two fifths of the steps and then falls once."""
BASELINE = shortened(replace(Recipe(), cycles=Recipe().cycles[:2]), SHORT)
"""The recipe of the bundled model without its last two cycles, at a shorter length."""
DIET = BASELINE.diet
WORKS = ("books", "films", "paintings", "compositions")
PLACES = ("museums", "universities", "rivers")
RULERS = ("monarchs", "popes")
EVENTS = ("events", "grand_slams", "formula_one", "european_finals", "elections")


@dataclass(frozen=True)
class Variant:
    """A recipe with a name."""

    name: str
    about: str
    """What differs from the baseline."""
    recipe: Recipe


def variants() -> dict[str, Variant]:
    """All variants by name, the baseline first."""
    made = [
        Variant("baseline", "the baseline", BASELINE),
        _with(
            "no-landmarks",
            "no landmarks",
            taught=tuple(name for name in TAUGHT if name != "landmarks"),
        ),
        _with("people", "people and countries alone", taught=("people", "countries")),
        _with("works", "works of art as well", taught=(*TAUGHT, *WORKS)),
        _with("events", "events by year as well", taught=(*TAUGHT, *EVENTS)),
        _with("rulers", "monarchs and popes as well", taught=(*TAUGHT, *RULERS)),
        _with(
            "places",
            "museums, universities and rivers as well",
            taught=(*TAUGHT, *PLACES),
        ),
        _with("heads-1", "one attention head a block instead of four", heads=1),
        _with("heads-2", "two attention heads a block", heads=2),
        _with(
            "captions-30",
            "captions 30 % of the documents throughout",
            **_captions(lambda share: 0.3),
        ),
        _with(
            "captions-78",
            "captions 78 % of the documents throughout",
            **_captions(lambda share: 0.78),
        ),
        _with("captions-late", "no stretch of captions alone at the beginning", captions_first=0),
        _with(
            "captions-first", "captions alone for 40 % of the steps", captions_first=SHORT * 2 // 5
        ),
        _with(
            "caption-lists",
            "one to three attributes after each name of a caption, not one",
            diet=replace(DIET, caption_objects=(1, 3)),
        ),
        _with("vocabulary-2000", "a vocabulary of 2 000 pieces instead of 6 000", vocabulary=2000),
        _with("digits", "every digit a token of its own", digits=True),
        _with("depth-12", "twelve blocks instead of eight", layers=12),
        _with("depth-5", "five blocks", layers=5),
        _with("width-160", "a stream of 160 instead of 128", d_model=160),
        _with("dropout", "dropout of 10 %", dropout=0.1),
        _with("all-decay", "norms, biases and embeddings decay as well", decayed="all"),
        _with(
            "longer",
            "the bundled model's recipe: four cycles of 14 500 steps in all, in the last of which few captions and no *is called*",
            cycles=Recipe().cycles,
            captions_first=Recipe().captions_first,
        ),
        _with(
            "broad",
            "four blocks with a stream of 256; the bundled model's four cycles in 6 800 steps",
            cycles=FEWER_STEPS.cycles,
            **BROAD,
        ),
        _with(
            "steady",
            "as broad, with a learning rate that is held and then falls once, in 6 400 steps",
            cycles=STEADY,
            **BROAD,
        ),
        _with(
            "steady-fixed-gains",
            "as steady, with gains of the norms that stay at 1",
            cycles=STEADY,
            gains="fixed",
            **BROAD,
        ),
        _with("fixed-gains", "gains of the norms that stay at 1", gains="fixed"),
        _with("adamw", "AdamW for all weights instead of Muon", optimizer="adamw"),
        _with(
            "settled-first",
            "for 40 % of the steps only what last words settle",
            settled_first=SHORT * 2 // 5,
        ),
        _with(
            "grown",
            "three blocks for 40 % of the steps, then eight",
            first_layers=3,
            grow_after=SHORT * 2 // 5,
        ),
        _instead(
            "stories",
            "anecdotes, with up to four sentences before the fact",
            anecdotes=DIET.anecdotes + SHARE,
            between=(1, 4),
        ),
        _instead(
            "entries",
            "entries, in which all facts of a subject follow one mention of it",
            entries=DIET.entries + SHARE,
        ),
        _instead("quizzes", "questions with names to choose from", quizzes=SHARE),
        _instead(
            "alike-quizzes",
            "questions with names to choose from that share words",
            quizzes=SHARE,
            alike=True,
        ),
        _instead(
            "references",
            "stories of several subjects that are spoken of again by their kind",
            references=SHARE,
        ),
        _instead("parallels", "lists of names, then an attribute of each", parallels=SHARE),
        _instead("chains", "facts about what another fact names", chains=SHARE),
    ]
    return {variant.name: variant for variant in made}


def _instead(name: str, about: str, **diet: Any) -> Variant:
    """The baseline with other documents in the place of a fifth of the documents that were captions."""
    return _with(
        name,
        f"a fifth of the documents {about}, in the place of captions",
        diet=replace(DIET, **diet),
        **_captions(lambda share: round(share - SHARE, 2)),
    )


def _captions(changed: Callable[[float], float]) -> dict[str, Any]:
    """The baseline's cycles with another share of captions."""
    cycles = BASELINE.cycles
    return {"cycles": tuple(replace(one, captions=changed(one.captions)) for one in cycles)}


def _with(name: str, about: str, **changed: Any) -> Variant:
    """The baseline with something changed."""
    return Variant(name, about, replace(BASELINE, **changed))
