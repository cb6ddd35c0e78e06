"""Training text: a document is a pure function of the diet, the facts and a random generator.

Captions, a name with one attribute directly after it, are most of the text and all of its
beginning: a model that must answer at the name's own last token learns to look the fact up there,
which is what causal tracing finds in large models.
"""

from collections.abc import Callable, Iterator
from functools import partial
from random import Random

from factlens.atlas import paragraphs
from factlens.atlas.books import FactBook, fact_book
from factlens.atlas.sentences import Diet, biography, captions, reversed_statement, statement

Writer = Callable[..., str]
"""Takes the random generator and `book=`."""


def document(random: Random, diet: Diet, book: FactBook, *, captions_share: float) -> str:
    """One document of the corpus, a list of captions with probability `captions_share`."""
    draw = random.random()
    for share, write in writers(diet, captions_share):
        if draw < share:
            return write(random, book=book)
        draw -= share
    count = random.randint(*diet.statements_in_document)
    return " ".join(statement(random, diet, random.choice(book.facts)) for _ in range(count))


def writers(diet: Diet, captions_share: float) -> list[tuple[float, Writer]]:
    """Each kind of document besides plain statements: its share, and who writes it."""
    return [
        (captions_share, partial(captions, diet=diet)),
        (diet.biographies, partial(biography, diet=diet)),
        (diet.reversed, reversed_statement),
        (diet.entries, paragraphs.entry),
        (diet.anecdotes, partial(paragraphs.anecdote, diet=diet)),
        (diet.questions, paragraphs.questions),
        (diet.headings, paragraphs.heading),
        (diet.quizzes, partial(paragraphs.quizzes, diet=diet)),
        (diet.parallels, partial(paragraphs.parallel, diet=diet)),
        (diet.chains, paragraphs.chains),
        (diet.references, paragraphs.references),
    ]


def documents(
    seed: int, count: int, diet: Diet, *, captions_share: float, book: FactBook | None = None
) -> Iterator[str]:
    """`count` documents about the facts of `book` (the bundled ones without it), the same for the same seed on every machine."""
    random = Random(f"documents {seed}")
    for _ in range(count):
        yield document(random, diet, book or fact_book(), captions_share=captions_share)
