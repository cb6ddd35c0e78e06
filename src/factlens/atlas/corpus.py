"""Training text: a document is a pure function of the diet and a random generator.

Captions, a name with one attribute directly after it, are most of the text and all of its
beginning: a model that must answer at the name's own last token learns to look the fact up there,
which is what causal tracing finds in large models.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from random import Random

from factlens.atlas.tables import Relation, capitalised, relations, state


@dataclass(frozen=True, kw_only=True)
class Diet:
    """How documents are made. Shares are of documents, which are of similar length."""

    biographies: float = 0.06
    """Share of several facts about one subject, some of them with pronouns."""
    reversed: float = 0.02
    """Share of sentences that name the object first. What is left are plain statements."""
    captions_in_list: tuple[int, int] = (3, 9)
    statements_in_document: tuple[int, int] = (1, 3)
    lead_in: float = 0.08
    """Share of statements that begin with words such as "It is said that"."""
    pronoun: float = 0.6
    """Share of the later sentences of a biography that use a pronoun."""


@dataclass(frozen=True)
class KnownFact:
    """A subject, a relation and its object."""

    relation: Relation
    subject: str
    object: str


@dataclass(frozen=True)
class FactBook:
    """All facts, one by one and by subject."""

    facts: tuple[KnownFact, ...]
    by_subject: tuple[tuple[KnownFact, ...], ...]
    """Only subjects with at least two facts."""


LEAD_INS = (
    "It is said that",
    "It is well known that",
    "As everyone knows,",
    "According to the book,",
    "We learned that",
    "Many people know that",
)
SEPARATORS = ("\n", ". ", "; ", ", ")


def document(random: Random, diet: Diet, *, captions_share: float) -> str:
    """One document of the corpus, a list of captions with probability `captions_share`."""
    draw = random.random()
    if draw < captions_share:
        return captions(random, diet)
    if draw < captions_share + diet.biographies:
        return biography(random, diet)
    if draw < captions_share + diet.biographies + diet.reversed:
        return reversed_statement(random)
    count = random.randint(*diet.statements_in_document)
    return " ".join(statement(random, diet, random.choice(fact_book().facts)) for _ in range(count))


def documents(seed: int, count: int, diet: Diet, *, captions_share: float) -> Iterator[str]:
    """`count` documents, the same for the same seed on every machine."""
    random = Random(f"documents {seed}")
    for _ in range(count):
        yield document(random, diet, captions_share=captions_share)


def captions(random: Random, diet: Diet) -> str:
    """A list of names, each with one of its attributes: `France Paris; the Louvre Museum Paris`."""
    separator = random.choice(SEPARATORS)
    listed = random.choices(fact_book().facts, k=random.randint(*diet.captions_in_list))
    return separator.join(
        f"{capitalised(fact.subject) if random.random() < 0.5 else fact.subject} {fact.object}"
        for fact in listed
    )


def statement(random: Random, diet: Diet, fact: KnownFact) -> str:
    """One fact in one of its training templates."""
    template = random.choice(fact.relation.train)
    stated = state(fact.relation.name, template, fact.subject, fact.object)
    sentence = f"{stated.prompt} {stated.object}."
    if random.random() >= diet.lead_in or template.startswith("Question"):
        return sentence
    if template.startswith("{s}"):
        sentence = fact.subject + sentence[len(stated.subject) :]
    else:
        sentence = sentence[0].lower() + sentence[1:]
    return f"{random.choice(LEAD_INS)} {sentence}"


def biography(random: Random, diet: Diet) -> str:
    """Several facts about one subject, the first by its name."""
    facts = list(random.choice(fact_book().by_subject))
    random.shuffle(facts)
    sentences = [statement(random, diet, facts[0])]
    for fact in facts[1:]:
        if random.random() < diet.pronoun:
            template = random.choice(fact.relation.pronoun)
            sentences.append(template.replace("{o}", fact.object) + ".")
        else:
            sentences.append(statement(random, diet, fact))
    return " ".join(sentences)


def reversed_statement(random: Random) -> str:
    """One fact, the object first."""
    fact = random.choice(fact_book().facts)
    template = random.choice(fact.relation.reverse)
    filled = template.replace("{o}", fact.object).replace("{s}", fact.subject)
    return capitalised(filled) + "."


@cache
def fact_book() -> FactBook:
    """The bundled facts, in the order of the tables."""
    facts = tuple(
        KnownFact(relation, subject, object_)
        for relation in relations()
        for subject, object_ in relation.facts
    )
    groups: dict[str, list[KnownFact]] = {}
    for fact in facts:
        groups.setdefault(fact.subject, []).append(fact)
    return FactBook(facts, tuple(tuple(group) for group in groups.values() if len(group) > 1))
