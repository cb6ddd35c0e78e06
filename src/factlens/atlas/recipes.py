"""The numbers of a training, and its learning rate."""

import json
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from factlens.atlas.books import FactBook, fact_book, settled_book
from factlens.atlas.corpus import writers
from factlens.atlas.sentences import Diet
from factlens.atlas.tables import TAUGHT, World, world
from factlens.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Cycle:
    """A stretch of training under one cosine of the learning rate."""

    steps: int
    learning_rate: float
    captions: float
    """Share of documents that are lists of captions."""
    ends_at: float | None = None
    """The learning rate at its end; the recipe's last one without it."""
    direct: bool = False
    """Whether its statements leave out templates that go on where others have the object (`Diet.direct`)."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every number of a training."""

    taught: tuple[str, ...] = TAUGHT
    """The tables that are taught; all without any."""
    layers: int = 8
    heads: int = 4
    d_model: int = 128
    dropout: float = 0.0
    context: int = 128
    vocabulary: int = 6000
    digits: bool = False
    """Whether every digit is a token of its own."""
    tokenizer_documents: int = 20_000
    tokenizer_captions: float = 0.75
    """Share of captions in the tokenizer's text; the diet's shares fill the rest, in their order, as far as there is room."""
    object_repeats: int = 40
    """Times each object is added to the tokenizer's text, so that most become one token."""
    diet: Diet = field(default_factory=Diet)
    cycles: tuple[Cycle, ...] = (
        Cycle(steps=5000, learning_rate=3e-3, captions=0.6),
        Cycle(steps=2500, learning_rate=1.5e-3, captions=0.3),
        Cycle(steps=4000, learning_rate=1.5e-3, captions=0.3),
        Cycle(steps=3000, learning_rate=1e-3, captions=0.2, direct=True),
    )
    captions_first: int = 1125
    """Steps at the beginning that see captions only."""
    settled_first: int = 0
    """Steps at the beginning that see only facts that the last word of their subject settles (`tables.settled_facts`)."""
    first_layers: int = 0
    """Blocks of the beginning; the others, which change nothing at first, are put on top after `grow_after` steps."""
    grow_after: int = 0
    """Steps that run `first_layers` blocks only; 0 runs all from the first."""
    final_learning_rate: float = 2e-5
    """What a cosine ends at, unless its cycle says otherwise."""
    warmup: int = 100
    """Steps over which the learning rate rises, at the beginning of each cycle that begins above the end of the one before."""
    rows: int = 8
    optimizer: Literal["adamw", "muon"] = "muon"
    """Muon takes the matrices inside the blocks; AdamW always takes the embeddings, norms and biases."""
    muon_learning_rate: float = 8.0
    """Muon's learning rate as a multiple of AdamW's."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the forward and backward pass; weights and moments are float32 always."""
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.1
    decayed: Literal["all", "matrices"] = "matrices"
    """What decays: all weights, or the matrices inside the blocks, and not norms, biases and embeddings. Decaying gains of norms
    switch the first attention off in long trainings (docs/atlas.md)."""
    gains: Literal["learned", "fixed"] = "learned"
    """Gains of the norms; fixed ones stay at 1."""
    max_norm: float = 1.0
    """Gradients are clipped to this norm."""
    save_every: int = 250
    """Steps between saved states: what a kill can cost."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse documents that are more than all of the text, and a growth that is none.

        Raises:
            ConfigError: a cycle's captions and the diet's shares are more than 1; a model that grows from no block, to no more
                blocks, or after its end.
        """
        if self.grow_after and not (
            0 < self.first_layers < self.layers and 0 < self.grow_after < self.steps
        ):
            raise ConfigError(
                f"a model of {self.layers} blocks cannot begin with {self.first_layers} and grow after "
                f"{self.grow_after} of {self.steps} steps"
            )
        for cycle in self.cycles:
            total = sum(share for share, _ in writers(self.diet, cycle.captions))
            if total > 1 + 1e-9:
                raise ConfigError(
                    f"captions of {cycle.captions:g} and the diet's shares come to {total:g} of the documents; "
                    "at most 1 is left to give"
                )

    @property
    def world(self) -> World:
        """The world that is taught."""
        return world(self.taught)

    @property
    def book(self) -> FactBook:
        """Its facts."""
        return fact_book(self.taught)

    @property
    def settled_book(self) -> FactBook:
        """Those that the last word of their subject settles."""
        return settled_book(self.taught)

    @property
    def steps(self) -> int:
        """Steps of all cycles."""
        return sum(cycle.steps for cycle in self.cycles)


def cycle_at(recipe: Recipe, step: int) -> tuple[Cycle, int]:
    """The cycle that a step belongs to, and how many of its steps came before."""
    number, step = _place(recipe, step)
    return recipe.cycles[number], step


def _place(recipe: Recipe, step: int) -> tuple[int, int]:
    """The number of the cycle that a step belongs to, and how many of its steps came before."""
    for number, cycle in enumerate(recipe.cycles):
        if step < cycle.steps:
            return number, step
        step -= cycle.steps
    raise ValueError(f"the recipe has {recipe.steps} steps")


def learning_rate(recipe: Recipe, step: int) -> float:
    """In each cycle a linear rise, unless the one before ended as high, then a cosine down to the rate at its end."""
    number, step = _place(recipe, step)
    cycle = recipe.cycles[number]
    before = _end(recipe, recipe.cycles[number - 1]) if number else 0.0
    warmup = recipe.warmup if before < cycle.learning_rate else 0
    if step < warmup:
        return cycle.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, cycle.steps - warmup)
    end = _end(recipe, cycle)
    return end + (cycle.learning_rate - end) * (1 + math.cos(math.pi * done)) / 2


def _end(recipe: Recipe, cycle: Cycle) -> float:
    return recipe.final_learning_rate if cycle.ends_at is None else cycle.ends_at


def shortened(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with about `steps` steps, its parts in the same proportions."""
    factor = steps / recipe.steps
    cycles = (replace(one, steps=max(1, round(one.steps * factor))) for one in recipe.cycles)
    return replace(
        recipe,
        cycles=tuple(cycles),
        captions_first=round(recipe.captions_first * factor),
        settled_first=round(recipe.settled_first * factor),
        grow_after=round(recipe.grow_after * factor),
    )


def as_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as a file holds it, to be compared with one that was read."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(recipe)))
    return found
