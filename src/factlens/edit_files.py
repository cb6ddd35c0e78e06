"""Edits as values, what is added to which weight of which model, and their files.

A file is safetensors, a few kilobytes for a change of rank one, and nothing in it is executed. Its metadata has one key,
"factlens", whose JSON holds the format, the kind of each weight's change, and the edit's info; the tensors are called by
the weight and the part, such as `blocks.5.mlp.W_out.left`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from factlens.changes import (
    KINDS,
    Change,
    added,
    check_parts,
    cosines,
    kind_of,
    rank_of,
    shape_of,
    tensors_of,
)
from factlens.errors import EditError, EditFileError, FactError
from factlens.facts import Rewrite
from factlens.files import written_whole
from factlens.fingerprints import provenance
from factlens.models import Model

FORMAT = "factlens-edit/1"
_KEY = "factlens"


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of some weights of one model, and where it comes from. Edits of one model add.

    Raises:
        EditError: no change, a weight's name that is none, sides that do not fit together, NaN, or an info that is not plain
            JSON.
    """

    changes: Mapping[str, Change]
    """By the weight's name in TransformerLens's words, such as "blocks.5.mlp.W_out"."""
    info: Mapping[str, object] = field(default_factory=dict)
    """The model, its fingerprint and processing, the editor, its config, the rewrites, and the versions (`info_for`)."""

    def __post_init__(self) -> None:
        if not self.changes:
            raise EditError("an edit of no weight; give at least one change")
        for name, change in self.changes.items():
            check_parts(name, kind_of(change), tensors_of(change))
        object.__setattr__(self, "info", _plain(self.info))

    @property
    def rewrites(self) -> tuple[Rewrite, ...]:
        """The facts that the edit changes.

        Raises:
            EditError: the info holds something else in their place.
        """
        given = self.info.get("rewrites", [])
        try:
            return tuple(Rewrite(**each) for each in given)  # type: ignore[attr-defined]
        except (TypeError, FactError) as error:
            raise EditError(f"the edit's rewrites cannot be read: {error}") from None

    def __add__(self, other: "Edit") -> "Edit":
        """Both edits as one, of the same model: the changes summed (and still factored), the rewrites of both.

        The info keeps what the two agree on, and lists both under "parts".

        Raises:
            EditError: they belong to different models.
        """
        if self.info.get("fingerprint") != other.info.get("fingerprint"):
            raise EditError(
                f"edits of different models cannot be added: {whose(self)}, and {whose(other)}"
            )
        changes = dict(self.changes)
        for name, change in other.changes.items():
            changes[name] = added(changes[name], change) if name in changes else change
        agreed = {key: self.info[key] for key in self.info if self.info[key] == other.info.get(key)}
        rewrites = [asdict(each) for each in (*self.rewrites, *other.rewrites)]
        parts = [part for each in (self, other) for part in _parts(each)]
        return Edit(changes, {**agreed, "rewrites": rewrites, "parts": parts})

    def describe(self) -> pd.DataFrame:
        """One row for each weight: `weight, kind, rank, norm`.

        `rank` is the largest that the form allows, `norm` the Frobenius norm of the change.
        """
        rows = [
            (name, kind_of(change), rank_of(change), change.norm())
            for name, change in self.changes.items()
        ]
        return pd.DataFrame(rows, columns=["weight", "kind", "rank", "norm"])

    def save(self, path: str | Path) -> Path:
        """Write the edit to one safetensors file; `load` reads it back.

        Raises:
            OutputError: the place cannot be written. Nothing half-written stays behind.
        """
        return _write(path, self.changes, self.info)

    @classmethod
    def load(cls, path: str | Path) -> "Edit":
        """Read an edit that `save` wrote. Nothing in the file is executed.

        Raises:
            EditFileError: not there, no safetensors (a pickle, say), cut short, of another format, or with NaN.
        """
        loaded = cls(*_read(path))
        try:
            _ = loaded.rewrites
        except EditError as error:
            raise EditFileError(f"{path} is damaged: {error}") from None
        return loaded


def info_for(
    model: Model,
    editor: str,
    config: Mapping[str, object],
    rewrites: Sequence[Rewrite],
    **more: object,
) -> dict[str, object]:
    """What an edit says of itself: the model as it is now (`fingerprints.provenance`), the editor, its config, the rewrites.

    The name of the model's configuration file is under "model_config", `config` under "config".
    """
    about = provenance(model)
    return {
        **about,
        "model_config": about["config"],
        "editor": editor,
        "config": dict(config),
        "rewrites": [asdict(rewrite) for rewrite in rewrites],
        **more,
    }


def difference(one: Edit, other: Edit) -> pd.DataFrame:
    """How alike two edits are, one row for each weight that both change: `weight, cosine, cosine_left, cosine_right`.

    `cosine` is that of the two changes as vectors; the other two are those of their factors (which neurons, and what is
    written), and NaN where one of the changes is not of rank one.

    Raises:
        EditError: a weight has other sizes in the one than in the other.
    """
    rows = []
    for name in [name for name in one.changes if name in other.changes]:
        a, b = one.changes[name], other.changes[name]
        if shape_of(a) != shape_of(b):
            raise EditError(
                f"{name} is {shape_of(a)} in one edit and {shape_of(b)} in the other; they are of different models"
            )
        rows.append((name, *cosines(a, b)))
    return pd.DataFrame(rows, columns=["weight", "cosine", "cosine_left", "cosine_right"])


def whose(edit: Edit) -> str:
    """The beginning of a sentence: which model the edit was made for."""
    name, given = edit.info.get("model"), edit.info.get("fingerprint")
    if given is None:
        return "the edit does not say which model it was made for"
    return f"the edit was made for {name} ({str(given)[:12]})"


def _parts(edit: Edit) -> list[object]:
    parts = edit.info.get("parts")
    return parts if isinstance(parts, list) else [dict(edit.info)]


# -- files ----------------------------------------------------------------------------------------


def _plain(info: Mapping[str, object]) -> dict[str, Any]:
    """`info` as JSON has it (lists for tuples, text for keys), so that what is stored is what is read back.

    Raises:
        EditError: something that is no number, text, list or mapping, or a number that is not finite.
    """
    try:
        return json.loads(json.dumps(dict(info), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise EditError(
            f"an edit's info must be plain JSON ({error}); give numbers, text, lists and mappings"
        ) from None


def _write(path: str | Path, changes: Mapping[str, Change], info: Mapping[str, object]) -> Path:
    """Write an edit, whole or not at all.

    Raises:
        OutputError: the place cannot be written.
    """
    kinds = {name: kind_of(change) for name, change in changes.items()}
    about = {"format": FORMAT, "changes": kinds, "info": _plain(info)}
    tensors = {
        f"{name}.{key}": each.detach().cpu().contiguous().clone()
        for name, change in changes.items()
        for key, each in tensors_of(change).items()
    }
    content = save(tensors, metadata={_KEY: json.dumps(about)})
    with written_whole(path) as partial:
        partial.write_bytes(content)
    return Path(path)


def _read(path: str | Path) -> tuple[dict[str, Change], dict[str, Any]]:
    """Read the changes and the info of an edit that `_write` wrote.

    Raises:
        EditFileError: not there, not safetensors, cut short, another format, or numbers that make no edit.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            about = _about(file.metadata(), path)
            # Cloned: what is read from the file is mapped, and would change with it.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise EditFileError(f"there is no edit at {path}") from None
    except OSError as error:
        raise EditFileError(f"cannot read the edit {path}: {error.strerror or error}") from None
    except (SafetensorError, ValueError, RuntimeError) as error:
        if isinstance(error, EditFileError):
            raise
        line = " ".join(str(error).split())[:120]
        raise EditFileError(
            f"{path} is no safetensors file, or is cut short ({line}); factlens reads no pickled edits"
        ) from None
    try:
        changes = {name: _change(name, kind, tensors) for name, kind in about["changes"].items()}
        if tensors:  # What is left of them.
            raise EditError(f"the tensor {min(tensors)[:80]!r} belongs to no change")
        info = _plain(about["info"])
    except EditError as error:
        raise EditFileError(f"{path} is damaged: {error}") from None
    return changes, info


def _about(metadata: Mapping[str, str] | None, path: str | Path) -> dict[str, Any]:
    text = (metadata or {}).get(_KEY)
    if text is None:
        raise EditFileError(
            f"{path} is a safetensors file but no edit of factlens: it lacks the metadata '{_KEY}'"
        )
    try:
        about = json.loads(text)
    except (ValueError, RecursionError):
        raise EditFileError(f"{path} is damaged: its metadata is not JSON") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else None
        raise EditFileError(
            f"{path} is in the format {str(found)[:80]!r}; this factlens reads {FORMAT!r}"
        )
    if not all(isinstance(about.get(key), dict) for key in ("changes", "info")):
        raise EditFileError(f"{path} is damaged: its metadata lacks the changes or the info")
    return about


def _change(name: str, kind: object, tensors: dict[str, Tensor]) -> Change:
    """Take the parts of one change out of `tensors`."""
    cls = KINDS.get(str(kind))
    if cls is None:
        raise EditError(f"{name[:80]!r} has a change of kind {str(kind)[:80]!r}")
    names = {key: f"{name}.{key}" for key in (field.name for field in fields(cls))}
    parts = {key: tensors.pop(each) for key, each in names.items() if each in tensors}
    check_parts(name, str(kind), parts)
    return cls(**parts)
