"""Longer texts: entries of an encyclopaedia, anecdotes, questions, and lists under a heading."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from factlens.atlas.books import FactBook, KnownFact, Subject
from factlens.atlas.sentences import Diet, filled, follow_up, statement
from factlens.atlas.tables import capitalised

BETWEEN = (
    "The weather was fine that day.",
    "Nobody spoke for a while.",
    "There was a long silence.",
    "Then somebody opened a window.",
    "A dog barked in the street.",
    "It was late in the evening.",
    "The children wanted to hear more.",
    "An old woman smiled and went on.",
    "The teacher wrote it on the board.",
    "Two friends talked about it for an hour.",
    "Everybody in the room listened.",
    "The lamp was still burning.",
    "Rain fell on the roof.",
    "One of the guests nodded.",
    "The tea had gone cold.",
    "He closed the book and thought about it.",
    "She turned the page.",
    "A train passed in the distance.",
    "It was the first question of the evening.",
    "Some of them took notes.",
    "The map lay open on the table.",
    "Outside it was already dark.",
    "A boy asked what it meant.",
    "They had heard the name before.",
)
"""Sentences that say nothing of any subject."""
MEETINGS = (
    "They talked about {s}.",
    "The quiz was about {s}.",
    "The article mentions {s}.",
    "She had read about {s}.",
    "He took notes on {s}.",
    "The evening began with {s}.",
)
TURNS = (
    "As for {s}:",
    "Of {s} they said:",
    "And {s}?",
    "About {s} it says:",
)
"""How a subject is taken up again, by its kind."""
OPTIONS = (2, 4)
"""Names to choose from in a quiz."""
PARALLEL = (2, 4)
"""Names in a parallel list."""
OWN_PARAGRAPH = 0.2
"""Share of entries that are the subject's own paragraph, which is always the same."""
QUESTIONS_IN_LIST = (2, 5)
LISTED = (2, 6)
"""Subjects under one heading."""


def entry(random: Random, book: FactBook) -> str:
    """What a subject is, then all its facts in any order, most of them without its name."""
    subject = random.choice(book.subjects)
    if random.random() < OWN_PARAGRAPH:
        return reference(subject)
    facts = random.sample(subject.facts, len(subject.facts))
    sentences = [introduction(subject), *(follow_up(random, fact) for fact in facts)]
    if subject.kind and random.random() < 0.5:
        sentences.insert(random.randint(1, len(sentences)), anecdote_sentence(random, subject))
    return " ".join(sentence for sentence in sentences if sentence)


def anecdote(random: Random, diet: Diet, book: FactBook) -> str:
    """A subject is met, other sentences follow, then one of its facts."""
    subject = random.choice(book.subjects)
    fact = random.choice(subject.facts)
    first = anecdote_sentence(random, subject) if subject.kind else introduction(subject)
    between = random.sample(BETWEEN, random.randint(*diet.between))
    last = follow_up(random, fact) if random.random() < 0.5 else statement(random, diet, fact)
    return " ".join([first, *between, last])


def questions(random: Random, book: FactBook) -> str:
    """Some questions, each with its short answer."""
    asked = random.choices(book.facts, k=random.randint(*QUESTIONS_IN_LIST))
    return "\n".join(
        f"{capitalised(random.choice(fact.relation.questions).replace('{s}', fact.subject))} {fact.object}"
        for fact in asked
    )


def heading(random: Random, book: FactBook) -> str:
    """Subjects of one relation under the object that they share."""
    group = random.choice(book.by_object)
    some = random.sample(group, min(len(group), random.randint(*LISTED)))
    head = random.choice(group[0].relation.headings).replace("{o}", group[0].object)
    return f"{capitalised(head)}: {_joined([fact.subject for fact in some])}."


def quizzes(random: Random, diet: Diet, book: FactBook) -> str:
    """One or two quizzes."""
    return " ".join(quiz(random, diet, book) for _ in range(random.randint(1, 2)))


def quiz(random: Random, diet: Diet, book: FactBook) -> str:
    """Names to choose from: which of them has the object? The task comes before the names or after them.

    To choose, the facts of each name must be known where the name ends, before the answer is asked for.
    """
    right = random.choice(book.contested)
    others = [fact for fact in book.by_relation[right.relation.name] if fact.object != right.object]
    count = min(len(others), random.randint(*OPTIONS) - 1)
    options = [right, *random.sample(alike(right, others, count) if diet.alike else others, count)]
    random.shuffle(options)
    *firsts, last = (fact.subject for fact in options)
    listed = f"{', '.join(firsts)} or {last}?"
    task = capitalised(random.choice(right.relation.headings).replace("{o}", right.object))
    answer = f"{right.subject}."
    if random.random() < 0.5:
        return f"{task}: {listed} {capitalised(answer)}"
    return f"{capitalised(listed)} {task}: {answer}"


def alike(one: KnownFact, others: Sequence[KnownFact], count: int) -> Sequence[KnownFact]:
    """Those of the others whose subjects share a word with the one's, or all if these are fewer than `count`."""
    words = set(one.subject.split()) - {"the"}
    found = [fact for fact in others if words & set(fact.subject.split())]
    return found if len(found) >= count else others


def parallel(random: Random, diet: Diet, book: FactBook) -> str:
    """Some names, then in the same order one attribute of each: `France and Italy: Paris and Rome.`"""
    fact = random.choice(book.facts)
    others = [one for one in book.by_relation[fact.relation.name] if one is not fact]
    count = min(len(others), random.randint(*PARALLEL) - 1)
    some = [fact, *random.sample(alike(fact, others, count) if diet.alike else others, count)]
    random.shuffle(some)
    names = _joined([fact.subject for fact in some])
    return f"{capitalised(names)}: {_joined([fact.object for fact in some])}."


def chains(random: Random, book: FactBook) -> str:
    """One or two chains."""
    return " ".join(chain(random, book) for _ in range(random.randint(1, 2)))


def chain(random: Random, book: FactBook) -> str:
    """A fact about something that is itself described by a fact: `The currency of the country of the Louvre Museum is the euro.`"""
    first = random.choice(book.chained)
    described = first.relation.description.replace("{s}", first.subject)
    second = random.choice(book.by_name[first.object].facts)
    taking = [one for one in second.relation.train if takes_description(one)]
    template = random.choice(taking or second.relation.train)
    return filled(template, replace(second, subject=described))


def takes_description(template: str) -> bool:
    """Whether "the country of Lyon" can stand for `{s}`: not after "the country" or "the city of", nor before an apostrophe."""
    before, after = template.split("{s}")
    *_, kind, of = ["", "", *before.split()]
    named = kind in ("country", "city", "nation", "state", "company", "continent", "player")
    return not after.startswith("'") and (
        not before or (of in ("of", "for", "in", "to", "that") and not named)
    )


def references(random: Random, book: FactBook) -> str:
    """Several subjects are met, then each is spoken of again by what it is: `As for the river: It flows into the Black Sea.`"""
    met: dict[str, Subject] = {}
    while len(met) < 2 or (len(met) < 4 and random.random() < 0.5):
        subject = random.choice(book.subjects)
        if subject.kind:
            met.setdefault(subject.kind.definite, subject)
    names = _joined([subject.name for subject in met.values()])
    sentences = [random.choice(MEETINGS).replace("{s}", names)]
    for definite in random.sample(list(met), len(met)):
        told = follow_up(random, random.choice(met[definite].facts))
        sentences.append(f"{random.choice(TURNS).replace('{s}', definite)} {told}")
    return " ".join(sentences)


def _joined(words: Sequence[str]) -> str:
    *firsts, last = words
    return f"{', '.join(firsts)} and {last}" if firsts else last


def reference(subject: Subject) -> str:
    """The subject's paragraph: what it is, then each fact in the first of its follow-up sentences.

    Always the same, so that it can be compared with what a model writes about the subject.
    """
    facts = (filled(fact.relation.pronoun[0], fact) for fact in subject.facts)
    return " ".join(filter(None, [introduction(subject), *facts]))


def introduction(subject: Subject) -> str:
    """`The Danube is a river.`; nothing where its kind is not known."""
    return f"{capitalised(subject.name)} is {subject.kind.noun}." if subject.kind else ""


def anecdote_sentence(random: Random, subject: Subject) -> str:
    """One of the sentences of the subject's kind."""
    assert subject.kind, "asked only of subjects whose kind is known"
    return capitalised(random.choice(subject.kind.anecdotes).replace("{s}", subject.name))
