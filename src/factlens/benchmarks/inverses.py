"""A record asked the other way round: which subject has the object? Only the bundled relations have sentences for it."""

from dataclasses import dataclass
from functools import cache

from factlens.atlas import Relation
from factlens.atlas.tables import capitalised, world
from factlens.benchmarks.counterfact import Record

END = " {s}"
"""How a sentence ends whose subject comes last."""


@dataclass(frozen=True)
class Inverse:
    """One sentence that ends where the subject begins, with either object in it."""

    new: str
    """`Lyon is the capital of`, for a subject whose new capital is Lyon."""
    true: str
    """The same with the object that was true before."""
    subject: str
    """As it is written within a sentence."""


def inverses(record: Record) -> tuple[Inverse, ...]:
    """The relation's reversed sentences that end with their subject; none for a relation or a subject that is not bundled."""
    relation, subject = _bundled().get((record.relation_id, record.subject.casefold()), (None, ""))
    if relation is None:
        return ()
    new, true = (
        [capitalised(each.replace("{o}", target.text)) for each in relation.reverse]
        for target in (record.target_new, record.target_true)
    )
    return tuple(
        Inverse(one.removesuffix(END), other.removesuffix(END), subject)
        for one, other in zip(new, true, strict=True)
        if one.endswith(END)
    )


@cache
def _bundled() -> dict[tuple[str, str], tuple[Relation, str]]:
    """Each relation with each of its subjects, by the subject in small letters."""
    return {
        (relation.name, subject.casefold()): (relation, subject)
        for relation in world().relations
        for subject, _ in relation.facts
    }
