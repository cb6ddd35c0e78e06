"""Where the texts come from over which keys are gathered: the bundled corpus, or files.

A corpus is a name and an order: document n is always the same, so that what a moment was gathered over is said by the
corpus and a number. Data sets of the hub are in `hub_corpora.py`.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from factlens.errors import MomentError
from factlens.files import sha256_of

if TYPE_CHECKING:
    from factlens.atlas.recipes import Recipe

BUNDLED = "atlas-corpus"


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order."""

    name: str
    """Stands in the names of files and in results."""
    documents: Callable[[int], Iterator[str]]
    """The documents from number n on."""
    digest: str | None = None
    """sha256, or a revision, of what the name alone does not settle."""
    remote: bool = False
    """Whether reading may fetch something."""


def bundled(seed: int = 0) -> Corpus:
    """The text that atlas was trained on: the mixture of its last training cycle, without end."""
    from factlens.atlas.recipes import Recipe

    return of_recipe(Recipe(), seed)


def of_recipe(recipe: "Recipe", seed: int = 0) -> Corpus:
    """The text of a training, as `bundled` is that of the shipped one."""
    from factlens.atlas.corpus import documents
    from factlens.atlas.recipes import Recipe

    book, share = recipe.book, recipe.cycles[-1].captions

    def read(start: int) -> Iterator[str]:
        # The generator has to be run from its beginning: seven microseconds a document.
        found = documents(seed, sys.maxsize, recipe.diet, captions_share=share, book=book)
        return islice(found, start, None)

    name, digest = BUNDLED, None
    if recipe != Recipe():
        text = json.dumps([asdict(recipe.diet), recipe.taught, share])
        name, digest = f"{BUNDLED}-variant", hashlib.sha256(text.encode()).hexdigest()
    return Corpus(name if seed == 0 else f"{name}-seed-{seed}", read, digest)


def text_files(paths: Sequence[str | Path]) -> Corpus:
    """The documents of `.txt` files, separated by blank lines, and of `.jsonl` files, one `text` in each line.

    Files are read in the order given, line by line, whatever their size.

    Raises:
        MomentError: no file, one that cannot be read, or another kind. A line that is wrong is named when it is
            reached.
    """
    files = [Path(path) for path in paths]
    if not files:
        raise MomentError("no text files given; name at least one .txt or .jsonl")
    digest = hashlib.sha256()
    for path in files:
        if path.suffix.lower() not in _READERS:
            raise MomentError(f"{path} is none of {', '.join(_READERS)}; texts are read from those")
        try:
            digest.update(sha256_of(path).encode())
        except OSError as error:
            raise MomentError(f"cannot read the texts {path}: {error.strerror}") from None

    def read(start: int) -> Iterator[str]:
        every = (text for path in files for text in _documents(path))
        return islice(every, start, None)

    shown = files[0].stem + (f"-and-{len(files) - 1}-more" if len(files) > 1 else "")
    return Corpus(f"text-{shown}", read, digest.hexdigest())


def _documents(path: Path) -> Iterator[str]:
    """The documents of one file.

    Raises:
        MomentError: a line that cannot be used, or no document at all.
    """
    found = False
    for text in _READERS[path.suffix.lower()](path):
        found = True
        yield text
    if not found:
        raise MomentError(f"{path} holds no text")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError:
                    raise MomentError(
                        f"{path}, line {number}: not UTF-8; save it as UTF-8"
                    ) from None
    except OSError as error:
        raise MomentError(f"cannot read the texts {path}: {error.strerror}") from None


def _plain_documents(path: Path) -> Iterator[str]:
    paragraph: list[str] = []
    for _, line in _lines(path):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph).strip()
            paragraph = []
    if paragraph:
        yield "".join(paragraph).strip()


def _json_documents(path: Path) -> Iterator[str]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise MomentError(f"{path}, line {number}: not JSON ({error.msg})") from None
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise MomentError(
                f'{path}, line {number}: no text; each line is a record with a "text"'
            )
        yield text


_READERS = {".txt": _plain_documents, ".jsonl": _json_documents}
