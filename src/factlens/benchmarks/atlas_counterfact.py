"""atlas-CounterFact: records of CounterFact's form, built from the bundled fact tables, so that every experiment runs offline.

A pure function of the tables, the seed and, where one is given, the model. What is drawn is drawn by sha256, so that a record
does not depend on which others there are.
"""

from collections.abc import Callable, Collection, Sequence
from functools import cache

import pandas as pd

from factlens import metrics
from factlens.atlas import Relation
from factlens.atlas.tables import Split, World, state, world
from factlens.benchmarks.counterfact import Record, Target
from factlens.benchmarks.draws import Drawn, digest, drawn, is_of, new_object, numbered
from factlens.engines.problems import Progress, no_progress
from factlens.facts import Fact
from factlens.models import Model

NEIGHBOURS = 3
"""At least so many other subjects must have the true object, or the fact is left out."""
PROMPTS = 10
"""At most so many neighbourhood, attribute and generation prompts, as in CounterFact."""
PARAPHRASES = 2
IMPLIED = tuple(
    frozenset(group.split())
    for group in (
        "landmark_city landmark_country place_continent place_language",
        "museum_city museum_country place_continent place_language",
        "university_city university_country place_continent place_language",
        "river_country river_mouth river_city river_source place_continent",
        "continent country_region",
        "hq company_country company_continent",
        "birthplace person_country",
        "person_country person_continent",
        "maker product_country",
        "author book_language book_country book_century",
        "director film_language film_country",
        "election_winner election_party election_state",
        "painter painting_country painting_century painting_movement",
        "museum_of_painting painting_city",
        "composer composition_country composition_language composition_century composition_period",
        "mens_champion mens_country",
        "womens_champion womens_country",
        "f1_champion f1_country",
        "team_winner winner_country",
        "team_loser loser_country",
        "event_city event_country event_continent",
        "war battle_century battle_country",
        "battle_winner battle_commander",
        "animal_class animal_family",
        "language_country language_continent",
    )
)
"""Groups of relations of which a new object of one can make another's false by right: they say nothing of one another's retention."""
ASKED = 256
"""Records whose targets are scored between two reports of progress."""

FEW_NEIGHBOURS = f"fewer than {NEIGHBOURS} other subjects have the object"
NO_OTHER = "the relation has no other object for it"
NEW_LIKELIER = "the new object is the likelier one before the edit"


Records = Drawn[Record]
"""The records of CounterFact's form."""


def counterfact(
    model: Model | None = None,
    *,
    only: Collection[str] | None = None,
    part: str | None = None,
    first: int | None = None,
    seed: int = 0,
    of: World | None = None,
    progress: Progress = no_progress,
) -> Records:
    """The atlas-CounterFact records: one counterfactual for each fact that has enough neighbours.

    The new object is drawn from the other objects of the relation; with a model, records of which it finds the new object likelier
    than the true one already are left out, as in CounterFact. The same seed gives the same records on every machine.

    Args:
        model: whose probabilities decide; None takes every record.
        only: names of the relations to take; all by default.
        part: take facts about subjects of "tune", "held" or "test" alone, which is less to ask than all.
        first: take so many records at most. The model is asked no further, so `dropped` does not count what it would have left out.
        seed: of the draws of objects, sentences, neighbours and the order.
        of: another world than the bundled one.
        progress: told (records asked, records in all).
    """
    kept: list[Record] = []
    dropped: list[tuple[str, str]] = []
    for number, relation, subject, object_ in numbered(of or world(), only):
        if part is not None and not is_of(part, subject):
            continue
        made = _record(relation, subject, object_, number, str(seed))
        if isinstance(made, Record):
            kept.append(made)
        else:
            dropped.append((relation.name, made))
    kept.sort(key=lambda each: digest(str(seed), "order", str(each.case_id)))
    if model is not None:
        kept, likelier = _true_likelier(model, kept, first, progress)
        dropped += [(each.relation_id, NEW_LIKELIER) for each in likelier]
    counts = pd.DataFrame(dropped, columns=["relation", "reason"])
    table = counts.groupby(["relation", "reason"], sort=True).size().reset_index(name="n")
    return Records(tuple(kept[:first]), table)


def other_facts(record: Record) -> list[Fact]:
    """The other facts of the record's subject, which its edit should leave alone; none where the tables do not have it.

    Each is asked in a training and in a held-out sentence. Facts that the new object changes by right are left out (`IMPLIED`).
    """
    return _bundled_others()(record)


@cache
def _bundled_others() -> Callable[[Record], list[Fact]]:
    return others_of(world())


def others_of(of: World) -> Callable[[Record], list[Fact]]:
    """`other_facts` of any world."""
    by_subject: dict[str, dict[str, tuple[Relation, str, str]]] = {}
    for relation in of.relations:
        for subject, object_ in relation.facts:
            found = by_subject.setdefault(subject.casefold(), {})
            found[relation.name] = (relation, subject, object_)

    def others(record: Record) -> list[Fact]:
        about = by_subject.get(record.subject.casefold(), {})
        if record.relation_id not in about:
            return []
        return [
            _asked(record, *fact, split)
            for name, fact in about.items()
            if name != record.relation_id and not implied(name, record.relation_id)
            for split in ("train", "held")
        ]

    return others


def implied(one: str, other: str) -> bool:
    """Whether a new object of one relation can make the other's false by right."""
    return any({one, other} <= group for group in IMPLIED)


def _asked(record: Record, relation: Relation, subject: str, object_: str, split: Split) -> Fact:
    """One of the subject's other facts in a sentence of the split."""
    templates = relation.templates(split)
    template = drawn(templates, "other", split, str(record.case_id), relation.name)[0]
    stated = state(relation.name, template, subject, object_)
    identity = f"{relation.name}/{subject}/{split}"
    return Fact(stated.prompt, stated.subject, object_, relation.name, identity)


# -- one record ------------------------------------------------------------------------------------


def _record(relation: Relation, subject: str, object_: str, number: int, seed: str) -> Record | str:
    """The record of fact `number` of the tables, or why there is none."""
    mark = (seed, relation.name, subject)
    neighbours = [name for name in _having(relation, object_) if name != subject]
    if len(neighbours) < NEIGHBOURS:
        return FEW_NEIGHBOURS
    new = new_object(relation, subject, object_, mark)
    if new is None:
        return NO_OTHER
    template, *others = drawn(relation.train, *mark, "prompt")
    held = drawn(relation.held, *mark, "paraphrase")[:PARAPHRASES]
    return Record(
        case_id=number,
        pararel_idx=relation.train.index(template),
        prompt=template.removesuffix(" {o}").replace("{s}", "{}"),
        relation_id=relation.name,
        target_new=Target(new, f"{relation.name}/{new}"),
        target_true=Target(object_, f"{relation.name}/{object_}"),
        subject=state(relation.name, template, subject, object_).subject,
        paraphrase_prompts=tuple(_prompt(relation, each, subject) for each in held),
        neighborhood_prompts=_asked_of(relation, neighbours, (*mark, "neighbours")),
        attribute_prompts=_asked_of(relation, _having(relation, new), (*mark, "attributes")),
        generation_prompts=tuple(_prompt(relation, each, subject) for each in others[:PROMPTS]),
    )


def _asked_of(
    relation: Relation, subjects: Sequence[str], mark: tuple[str, ...]
) -> tuple[str, ...]:
    """The relation asked of up to ten of the subjects, each in a training sentence of its own."""
    asked = drawn(subjects, *mark)[:PROMPTS]
    places = {each: int(digest(*mark, "template", each), 16) for each in asked}
    return tuple(
        _prompt(relation, relation.train[places[each] % len(relation.train)], each)
        for each in asked
    )


def _prompt(relation: Relation, template: str, subject: str) -> str:
    return state(relation.name, template, subject, "").prompt


def _true_likelier(
    model: Model, records: Sequence[Record], first: int | None, progress: Progress
) -> tuple[list[Record], list[Record]]:
    """The records of which the model finds the true object likelier than the new one, and the others, up to `first` of the former."""
    kept: list[Record] = []
    others: list[Record] = []
    most = len(records) if first is None else min(first, len(records))
    done, step = 0, ASKED if first is None else min(ASKED, max(first, 1))
    while done < len(records) and len(kept) < most:
        chunk = records[done : done + step]
        targets = [
            (each.rewrite.prompt, target.text)
            for each in chunk
            for target in (each.target_new, each.target_true)
        ]
        nll = metrics.score(model, targets).nll.reshape(-1, 2)
        for each, (new, true) in zip(chunk, nll.tolist(), strict=True):
            (others if new <= true else kept).append(each)
        done += len(chunk)
        progress(min(done, most), most)
    progress(most, most)
    return kept, others


# -- the tables ------------------------------------------------------------------------------------


def _having(relation: Relation, object_: str) -> list[str]:
    return [subject for subject, found in relation.facts if found == object_]
