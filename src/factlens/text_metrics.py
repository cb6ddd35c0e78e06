"""Scores of free text: how varied it is, how like what it should be about, and whether it says an object (ROME, Section 3.3)."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")
"""A word, or one mark of punctuation."""
TERM = re.compile(r"\b\w\w+\b")
"""What TF-IDF counts: scikit-learn's own pattern, which leaves out words of one letter."""


# -- fluency ---------------------------------------------------------------------------------------


def generation_entropy(texts: Iterable[str]) -> float:
    """GE: the mean over texts of H2 / 3 + 2 H3 / 3, the entropies of their bi- and trigrams in bits; NaN without texts.

    Text that repeats itself has little of it. Differs from the paper's code: words are cut off at punctuation by one pattern
    (`WORD`), where that code takes NLTK's tokenizer.
    """
    cut = [WORD.findall(text) for text in texts]
    found = [ngram_entropy(words, 2) / 3 + 2 * ngram_entropy(words, 3) / 3 for words in cut]
    return float(np.mean(found)) if found else float("nan")


def ngram_entropy(words: Sequence[str], n: int) -> float:
    """The entropy in bits of the frequencies of runs of `n` words; 0 where there are none."""
    counts = Counter(zip(*(words[start:] for start in range(n)), strict=False))
    shares = np.array([*counts.values()], dtype=float) / max(1, counts.total())
    return float(np.abs((shares * np.log2(shares)).sum()))


# -- consistency -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TfIdf:
    """How much each word says, learned from texts: what makes a text a vector."""

    columns: Mapping[str, int]
    """The place of each word."""
    idf: Float[np.ndarray, " word"]
    """ln((1 + texts) / (1 + texts with the word)) + 1."""

    def vector(self, text: str) -> Float[np.ndarray, " word"]:
        """Counts of words times `idf`, of length 1; zeros where no word is known."""
        found = np.zeros(len(self.columns))
        for term, count in Counter(_terms(text)).items():
            if term in self.columns:
                found[self.columns[term]] = count
        found = found * self.idf
        length = np.linalg.norm(found)
        return found / length if length > 0 else found


def fit_tfidf(texts: Iterable[str]) -> TfIdf:
    """TF-IDF with scikit-learn's defaults: small letters, smooth idf, Euclidean norm."""
    counts: Counter[str] = Counter()
    number = 0
    for text in texts:
        counts.update(set(_terms(text)))
        number += 1
    terms = sorted(counts)
    seen = np.array([counts[term] for term in terms], dtype=float)
    idf = np.log((1 + number) / (1 + seen)) + 1
    return TfIdf({term: place for place, term in enumerate(terms)}, idf)


def reference_score(by: TfIdf, texts: Sequence[str], references: Sequence[str]) -> float:
    """RS: the cosine of the vectors of the joined texts and of the joined references; NaN where there are none of either."""
    if not texts or not references:
        return float("nan")
    return float(by.vector(" ".join(texts)) @ by.vector(" ".join(references)))


def _terms(text: str) -> list[str]:
    return TERM.findall(text.lower())


# -- free generation -------------------------------------------------------------------------------


def says(continuation: str, object_: str) -> bool:
    """Whether a text that follows a prompt begins with the object, as whole words: `Rome` is not said by `Romeo`."""
    begun = continuation.lstrip()
    return begun.startswith(object_) and not re.match(r"\w", begun[len(object_) :])
