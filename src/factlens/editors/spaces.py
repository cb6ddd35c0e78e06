"""Which numbers of an editor are chosen on a model, and settings drawn from them: as many for one editor as for another.

An editor without numbers that were chosen on the model itself has its default setting: the published one, or what its method takes of a
model of which nothing is known. Beside it n - 1 settings are drawn. The range of each number is cut into n - 1 parts, evenly by its
logarithm (layers evenly), and the middle of each part is taken once: a Latin square. Which values stand together is drawn by sha256, and
of `SQUARES` such draws the one is taken whose two nearest settings are furthest apart. The same seed gives the same settings on every machine.

Settings near one that did well are drawn in the same way, from the half of each range around it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import dist

from factlens.benchmarks.draws import drawn

LAYER = "layer"
SQUARES = 100
DIGITS = 3
"""Significant digits of a drawn number, so that a config can show it whole."""


@dataclass(frozen=True)
class Range:
    """Positive numbers from one to another."""

    low: float
    high: float

    def at(self, share: float) -> float:
        """The number at a share of the way, by the logarithm."""
        return float(self.low * (self.high / self.low) ** share)

    def around(self, number: float) -> "Range":
        """The half of it, by the logarithm, with the number in its middle; less where it would pass an end."""
        part = (self.high / self.low) ** 0.25
        middle = min(max(number, self.low), self.high)
        return Range(max(self.low, middle / part), min(self.high, middle * part))


@dataclass(frozen=True)
class Space:
    """The numbers that are chosen, with their ranges."""

    numbers: Mapping[str, Range]
    layers: bool = True
    """Whether the layer is among them, which may be any of the model's."""

    @property
    def names(self) -> tuple[str, ...]:
        """The numbers' names, the layer's first."""
        return (*((LAYER,) if self.layers else ()), *self.numbers)


@dataclass(frozen=True)
class Setting:
    """One setting: a layer, where there is one to be chosen, and numbers."""

    layer: int | None
    numbers: Mapping[str, float]


def draw(space: Space, depth: int, count: int, *mark: str) -> list[Setting]:
    """`count` settings of a model with `depth` layers; `mark` is what the draw depends on."""
    squares = [_square(space.names, count, (*mark, str(number))) for number in range(SQUARES)]
    # The first of those that are alike, as all are of one number.
    best = max(squares, key=_apart) if count else []
    return [_setting(space, depth, shares) for shares in best]


def near(
    space: Space, depth: int, count: int, around: Setting, *mark: str, further: int = 1
) -> list[Setting]:
    """`count` settings near another: half of each number's range around it, cut at the range's ends, and `further` layers to either side."""
    narrow = {name: each.around(around.numbers[name]) for name, each in space.numbers.items()}
    if around.layer is None:
        return draw(Space(narrow, layers=False), depth, count, *mark)
    layers = range(max(0, around.layer - further), min(depth, around.layer + further + 1))
    found = draw(Space(narrow), len(layers), count, *mark)
    return [Setting(layers[int(str(each.layer))], each.numbers) for each in found]


def rounded(number: float) -> float:
    """To `DIGITS` significant digits."""
    return float(f"{number:.{DIGITS}g}")


def _square(names: Sequence[str], count: int, mark: tuple[str, ...]) -> list[tuple[float, ...]]:
    """For each setting a share of each number's range; every share stands once for every number."""
    places = [str(place) for place in range(count)]
    orders = [[(int(place) + 0.5) / count for place in drawn(places, *mark, n)] for n in names]
    return list(zip(*orders, strict=True))


def _apart(square: Sequence[tuple[float, ...]]) -> float:
    """How far the two nearest points are from each other; rounded, so that no machine sees a difference where there is none."""
    return round(min((dist(*pair) for pair in combinations(square, 2)), default=0.0), 9)


def _setting(space: Space, depth: int, shares: Sequence[float]) -> Setting:
    named = dict(zip(space.names, shares, strict=True))
    layer = int(named[LAYER] * depth) if space.layers else None
    return Setting(layer, {n: each.at(named[n]) for n, each in space.numbers.items()})
