"""What an editor is trained on: edits, the same in other words, and text that they should leave alone.

    generic    a passage, to be gone on with as another text does      (the WikiText variants of MEND and KE)
    cf         CounterFact's records of the training split             (MEND-CF, KE-CF)
    zsre       zsRE's                                                  (MEND-zsRE, KE-zsRE)

Everything is a pure function of the records, the corpus and the tokenizer.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise, zip_longest
from pathlib import Path
from typing import Any

from factlens import models
from factlens.benchmarks import atlas_counterfact, atlas_zsre, counterfact, zsre
from factlens.benchmarks.draws import digest, is_held, is_tuned
from factlens.corpora import Corpus
from factlens.errors import FactFileError
from factlens.facts import Rewrite
from factlens.models import Model

SEEDS = 4
"""Of the bundled records: each gives other new objects to the same subjects."""
DOCUMENTS = 4000
"""Documents that are read at most: in turn one for unrelated texts, and one for passages."""
PASSAGE, CONTINUATION = 24, 10
"""Tokens of a passage, and of what is to follow it, at most; the last number is the paper's."""
SHORTEST = 8
"""Words of a passage, and tokens of an unrelated text, at least."""
Told = Callable[[str], None] | None
"""Who is told of a row of a file that cannot be used."""


@dataclass(frozen=True)
class Lesson:
    """One edit to be practised."""

    rewrite: Rewrite
    paraphrases: tuple[str, ...]
    """Prompts after which the new object is to follow too."""
    unrelated: tuple[str, ...]
    """Texts of which the edit should change nothing; none where any text of the corpus serves."""


@dataclass(frozen=True)
class Lessons:
    """All of them, and the plain texts beside them."""

    train: tuple[Lesson, ...]
    held: tuple[Lesson, ...]
    """Of other subjects, or passages, than `train`."""
    texts: tuple[str, ...]
    source: str
    """What they were made of; the same source gives the same lessons."""


def lessons(
    model: Model,
    data: str,
    corpus: Corpus,
    *,
    records: Path | None = None,
    text_tokens: int = 32,
    on_bad_row: Told = None,
) -> Lessons:
    """The lessons of `data`, "generic", "cf" or "zsre".

    Args:
        model: whose tokenizer cuts texts to a length.
        data: what to practise.
        corpus: where passages and unrelated texts come from.
        records: a file in CounterFact's or zsRE's official form, of which the subjects for training are taken; without it the
            bundled records.
        text_tokens: length of the unrelated texts.
        on_bad_row: told of each record of the file that cannot be used, and is then left out.

    Raises:
        FactFileError: a file that cannot be read, or with too few records for training.
    """
    tokenizer = models.tokenizer(model)
    documents = list(islice(corpus.documents(0), DOCUMENTS))
    texts = tuple(_cuts(tokenizer, documents[::2], text_tokens))
    if data == "generic":
        made = list(_passages(tokenizer, documents[1::2]))
    elif data == "cf":
        made = [_of_counterfact(each) for each in _counterfact_records(records, on_bad_row)]
    else:
        made = [_of_zsre(each) for each in _zsre_records(records, on_bad_row)]
    held = tuple(each for each in made if _is_held(each))
    train = tuple(each for each in made if not _is_held(each))
    if not (held and train and texts):
        raise FactFileError(
            f"{records or corpus.name} gives {len(made)} records to train on, and {corpus.name} {len(texts)} texts: too few (of records those "
            "of one subject in four are taken, of texts those of eight words or more)"
        )
    of = "" if records is None else digest(*(repr(each) for each in made))[:16]
    return Lessons(train, held, texts, " ".join(filter(None, (corpus.name, corpus.digest, of))))


def _is_held(lesson: Lesson) -> bool:
    """Whether it is for measuring while training, by its subject, or its passage."""
    return is_held(lesson.rewrite.subject.casefold() or lesson.rewrite.prompt)


# -- records ---------------------------------------------------------------------------------------


def _counterfact_records(file: Path | None, on_bad_row: Told) -> list[counterfact.Record]:
    if file is not None:
        every = counterfact.read_records(file, on_bad_row=on_bad_row)
        return [each for each in every if is_tuned(each.subject)]
    return _in_turn([atlas_counterfact.counterfact(seed=seed).tune for seed in range(SEEDS)])


def _of_counterfact(record: counterfact.Record) -> Lesson:
    return Lesson(record.rewrite, record.paraphrase_prompts, ())


def _zsre_records(file: Path | None, on_bad_row: Told) -> list[zsre.Record]:
    if file is not None:
        every = zsre.read_records(file, on_bad_row=on_bad_row)
        return [each for each in every if is_tuned(each.subject)]
    return _in_turn([atlas_zsre.zsre(seed=seed).train for seed in range(SEEDS)])


def _of_zsre(record: zsre.Record) -> Lesson:
    _, _, (asked, answer) = record.asked
    return Lesson(record.rewrite, (record.rephrase,), (f"{asked} {answer}",))


def _in_turn(several: Sequence[Sequence[Any]]) -> list[Any]:
    """The first of each, then the second of each, and so on."""
    return [each for group in zip_longest(*several) for each in group if each is not None]


# -- plain text ------------------------------------------------------------------------------------


def _cuts(tokenizer: Any, documents: Sequence[str], tokens: int) -> Iterator[str]:
    """The beginning of each document, in whole words; short documents are left out."""
    for document in documents:
        cut = first_words(tokenizer, document, tokens)
        if len(tokenizer(cut)["input_ids"]) >= min(SHORTEST, tokens):
            yield cut


def _passages(tokenizer: Any, documents: Sequence[str]) -> Iterator[Lesson]:
    """Each document's beginning, to be gone on with by the words of the next one's; the paraphrase lacks its first words.

    Differs from the paper, where what follows is a sample of a smaller model.
    """
    cuts = [first_words(tokenizer, each, PASSAGE + CONTINUATION) for each in documents]
    for one, other in pairwise(cuts):
        passage = first_words(tokenizer, one, PASSAGE)
        target = first_words(tokenizer, other, CONTINUATION)
        words = passage.split()
        if len(words) >= SHORTEST and target and not one.startswith(f"{passage} {target}"):
            follows = first_words(tokenizer, one[len(passage) :].strip(), CONTINUATION)
            rewrite = Rewrite(passage, "", target, follows or None)
            yield Lesson(rewrite, (" ".join(words[len(words) // 3 :]),), ())


def first_words(tokenizer: Any, text: str, tokens: int) -> str:
    """As many whole words from the text's beginning as fit into so many tokens, one space between them."""
    text = " ".join(text.split())
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    if len(offsets) <= tokens:
        return text
    end = int(offsets[tokens][0])
    cut = text[:end] if text[end : end + 1] == " " else text[:end].rpartition(" ")[0]
    return cut.strip()
