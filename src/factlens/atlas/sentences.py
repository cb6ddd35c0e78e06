"""Sentences and captions: the smallest texts, each a pure function of a random generator."""

from dataclasses import dataclass
from random import Random

from factlens.atlas.books import FactBook, KnownFact
from factlens.atlas.tables import capitalised, state


@dataclass(frozen=True, kw_only=True)
class Diet:
    """How documents are made. Shares are of documents; what they leave are plain statements."""

    biographies: float = 0.03
    """Share of several facts about one subject, some of them with pronouns."""
    reversed: float = 0.02
    """Share of sentences that name the object first."""
    entries: float = 0.05
    """Share of entries of an encyclopaedia: what the subject is, and everything known of it."""
    anecdotes: float = 0.04
    """Share of little stories, in which the fact comes some sentences after the name."""
    questions: float = 0.03
    """Share of lists of questions with short answers."""
    headings: float = 0.02
    """Share of lists of subjects under an object that they share."""
    quizzes: float = 0.0
    """Share of questions with names to choose from."""
    parallels: float = 0.0
    """Share of lists of names followed by an attribute of each."""
    chains: float = 0.0
    """Share of facts about something that is named by another fact."""
    references: float = 0.0
    """Share of stories of several subjects, of which one is spoken of again by its kind."""
    alike: bool = False
    """Whether the names of a quiz or a parallel list share words where they can."""
    captions_in_list: tuple[int, int] = (3, 9)
    caption_objects: tuple[int, int] = (1, 1)
    """Attributes after each name of a caption."""
    statements_in_document: tuple[int, int] = (1, 3)
    lead_in: float = 0.08
    """Share of statements that begin with words such as "It is said that"."""
    pronoun: float = 0.6
    """Share of the later sentences of a biography that use a pronoun."""
    direct: bool = False
    """Whether statements leave out templates such as `The capital of {s} is called`, which go on where others have the object."""
    between: tuple[int, int] = (0, 2)
    """Sentences between an anecdote and its fact."""


LEAD_INS = (
    "It is said that",
    "It is well known that",
    "As everyone knows,",
    "According to the book,",
    "We learned that",
    "Many people know that",
)
SEPARATORS = ("\n", ". ", "; ", ", ")


def captions(random: Random, diet: Diet, book: FactBook) -> str:
    """A list of names, each with attributes of it: `France Paris; the Louvre Museum Paris`."""
    separator = random.choice(SEPARATORS)
    count = random.randint(*diet.captions_in_list)
    listed: list[tuple[str, tuple[KnownFact, ...]]]
    if diet.caption_objects == (1, 1):  # One draw for all, as when the shipped model was trained.
        listed = [(f.subject, (f,)) for f in random.choices(book.facts, k=count)]
    else:
        listed = [drawn(random, diet, book) for _ in range(count)]
    return separator.join(
        f"{capitalised(name) if random.random() < 0.5 else name} {' '.join(f.object for f in facts)}"
        for name, facts in listed
    )


def drawn(random: Random, diet: Diet, book: FactBook) -> tuple[str, tuple[KnownFact, ...]]:
    """The subject of a random fact, with some of its facts."""
    name = random.choice(book.facts).subject
    every = book.by_name[name].facts
    count = min(len(every), random.randint(*diet.caption_objects))
    return name, tuple(random.sample(every, count))


def statement(random: Random, diet: Diet, fact: KnownFact) -> str:
    """One fact in one of its training templates."""
    relation = fact.relation
    template = random.choice(relation.direct if diet.direct else relation.train)
    stated = state(fact.relation.name, template, fact.subject, fact.object)
    sentence = f"{stated.prompt} {stated.object}."
    if random.random() >= diet.lead_in or any(mark in template for mark in "?:"):
        return sentence
    if template.startswith("{s}"):
        sentence = fact.subject + sentence[len(stated.subject) :]
    else:
        sentence = sentence[0].lower() + sentence[1:]
    return f"{random.choice(LEAD_INS)} {sentence}"


def follow_up(random: Random, fact: KnownFact) -> str:
    """One fact about a subject that was named before."""
    return filled(random.choice(fact.relation.pronoun), fact)


def filled(template: str, fact: KnownFact) -> str:
    """A template with its subject and object, as a sentence."""
    return (
        capitalised(template.replace("{o}", fact.object).replace("{s}", fact.subject)).rstrip(".")
        + "."
    )


def biography(random: Random, diet: Diet, book: FactBook) -> str:
    """Several facts about one subject, the first by its name."""
    facts = list(random.choice(book.by_subject))
    random.shuffle(facts)
    sentences = [statement(random, diet, facts[0])]
    for fact in facts[1:]:
        if random.random() < diet.pronoun:
            sentences.append(follow_up(random, fact))
        else:
            sentences.append(statement(random, diet, fact))
    return " ".join(sentences)


def reversed_statement(random: Random, book: FactBook) -> str:
    """One fact, the object first."""
    fact = random.choice(book.facts)
    return filled(random.choice(fact.relation.reverse), fact)
