"""Training text: a document is a pure function of the diet, the facts and a random generator.

Captions, a name with one attribute directly after it, are most of the text and all of its
beginning: a model that must answer at the name's own last token learns to look the fact up there,
which is what causal tracing finds in large models.
"""

from collections.abc import Iterator
from random import Random

from factlens.atlas.books import FactBook, fact_book
from factlens.atlas.paragraphs import (
    anecdote,
    chain,
    entry,
    heading,
    parallel,
    questions,
    quiz,
    references,
)
from factlens.atlas.sentences import Diet, biography, captions, reversed_statement, statement


def document(random: Random, diet: Diet, book: FactBook, *, captions_share: float) -> str:
    """One document of the corpus, a list of captions with probability `captions_share`."""
    draw = random.random() - captions_share
    if draw < 0:
        return captions(random, diet, book)
    if (draw := draw - diet.biographies) < 0:
        return biography(random, diet, book)
    if (draw := draw - diet.reversed) < 0:
        return reversed_statement(random, book)
    if (draw := draw - diet.entries) < 0:
        return entry(random, book)
    if (draw := draw - diet.anecdotes) < 0:
        return anecdote(random, diet, book)
    if (draw := draw - diet.questions) < 0:
        return questions(random, book)
    if (draw := draw - diet.headings) < 0:
        return heading(random, book)
    if (draw := draw - diet.quizzes) < 0:
        return " ".join(quiz(random, diet, book) for _ in range(random.randint(1, 2)))
    if (draw := draw - diet.parallels) < 0:
        return parallel(random, book)
    if (draw := draw - diet.chains) < 0:
        return " ".join(chain(random, book) for _ in range(random.randint(1, 2)))
    if (draw := draw - diet.references) < 0:
        return references(random, book)
    count = random.randint(*diet.statements_in_document)
    return " ".join(statement(random, diet, random.choice(book.facts)) for _ in range(count))


def documents(
    seed: int, count: int, diet: Diet, *, captions_share: float, book: FactBook | None = None
) -> Iterator[str]:
    """`count` documents about the bundled facts, the same for the same seed on every machine."""
    random = Random(f"documents {seed}")
    for _ in range(count):
        yield document(random, diet, book or fact_book(), captions_share=captions_share)
