"""Editors: each turns rewrites into an `Edit` and leaves the model's weights as it found them.

An editor is a function `(model, rewrites, config) -> Edit`. One that can work on many independent rewrites at once registers how
(`register_each`), and `each` uses it.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from factlens.edits import Edit
from factlens.errors import EditError, FactWarning
from factlens.facts import Rewrite
from factlens.models import Model

Editor = Callable[..., Edit]
"""`(model, one Rewrite or several, config) -> Edit`."""
EachEditor = Callable[..., list[Edit]]
"""`(model, rewrites, config) -> list[Edit]`: one independent edit for each rewrite."""

EACH: dict[Editor, EachEditor] = {}
"""Editors that can optimise independent edits side by side, and how."""


def register_each(editor: Editor, each: EachEditor) -> None:
    """Say how `editor` makes many independent edits at once; they must be those that it makes one by one."""
    EACH[editor] = each


def several(rewrites: Rewrite | Sequence[Rewrite]) -> list[Rewrite]:
    """What an editor was given, as a list."""
    return [rewrites] if isinstance(rewrites, Rewrite) else list(rewrites)


@contextmanager
def unremarked() -> Iterator[None]:
    """Without the warning of an edit that did not take or had little to do: whether edits take is then what is measured."""
    with warnings.catch_warnings():
        for said in ("the edit of .* did not take", "the model says .* already"):
            warnings.filterwarnings("ignore", said, FactWarning)
        yield


def each(
    editor: Editor, model: Model, rewrites: Sequence[Rewrite], config: Any = None
) -> list[Edit]:
    """One independent `Edit` for each rewrite: side by side where the editor can, else one by one.

    Raises:
        EditError: another number of edits came back, something else than edits, or whatever the editor refuses.
    """
    if editor not in EACH:
        return [made(editor(model, rewrite, config)) for rewrite in rewrites]
    edits = [made(edit) for edit in EACH[editor](model, rewrites, config)]
    if len(edits) != len(rewrites):
        raise EditError(
            f"{len(rewrites)} rewrites gave {len(edits)} edits; each needs one of its own"
        )
    return edits


def made(edit: object) -> Edit:
    """What an editor gave, if it is an edit: without this nothing at all would be measured as if it were one.

    Raises:
        EditError: it is something else.
    """
    if not isinstance(edit, Edit):
        raise EditError(f"the editor gave {type(edit).__name__}, and no Edit")
    return edit
