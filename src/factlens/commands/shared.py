"""What commands share: errors as one line, models and workers, places to write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from factlens.terminal import console

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from factlens.editors import Editor
    from factlens.editors.checkpoints import Method
    from factlens.executors import Executor
    from factlens.models import Model


EDITORS = {
    "rome": "editors.rome.rome",
    "ft": "editors.fine_tuning.ft",
    "ft-l": "editors.fine_tuning.ft_l",
    "attn-edit": "editors.attention.attn_edit",
    "kn": "editors.knowledge_neurons.kn",
    "mend": "editors.mend.mend",
    "mend-cf": "editors.mend.mend_cf",
    "mend-zsre": "editors.mend.mend_zsre",
    "ke": "editors.ke.ke",
    "ke-cf": "editors.ke.ke_cf",
    "ke-zsre": "editors.ke.ke_zsre",
}
"""The editors by name, and where each is."""
TRAINABLE = ("mend", "ke")
"""Editors whose networks are trained first; a suffix of their names says on what."""
INTERRUPTED = 130
"""Exit code after Ctrl-C."""
WITHOUT_LAYER = ("kn",)
"""Those that look in all layers."""


def editor_named(name: str) -> Editor:
    """The editor of `EDITORS` with this name; its module is imported only now."""
    home, function = EDITORS[name].rsplit(".", 1)
    found: Editor = getattr(import_module(f"factlens.{home}"), function)
    return found


def method_named(name: str) -> Method:
    """The way of training an editor of `TRAINABLE`.

    Raises:
        PlanError: it is none of them.
    """
    from factlens.editors.ke import KE
    from factlens.editors.mend import MEND

    if name not in TRAINABLE:
        raise usage(f"no editor {name!r} to train; there are {', '.join(TRAINABLE)}")
    return {"mend": MEND, "ke": KE}[name]


def usage(message: str) -> Exception:
    """What a command cannot make sense of, as the error to raise."""
    from factlens.errors import PlanError

    return PlanError(message)


@contextmanager
def clear_errors(kept: Path | None = None) -> Iterator[None]:
    """Errors as one line and exit code 2, warnings as one line each, Ctrl-C as one line and 130.

    `kept` is the folder of a run that the same command goes on with.
    """
    from factlens.errors import FactlensError

    def show(message: Any, category: type, *where: Any, **more: Any) -> None:
        from factlens.errors import FactWarning

        if issubclass(category, FactWarning):
            print(f"note: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        try:
            yield
        except FactlensError as error:
            print(f"factlens: {' '.join(str(error).split())}", file=sys.stderr)
            raise typer.Exit(2) from None
        except MemoryError:
            print(
                "factlens: out of memory; use fewer --samples or a narrower --dtype",
                file=sys.stderr,
            )
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            rest = (
                f"the same command goes on from {kept}" if kept else "no file was left half-written"
            )
            print(f"factlens: interrupted; {rest}", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None


def run_command(words: Sequence[object]) -> None:
    """Run one of factlens's own commands, as a user would.

    Raises:
        RunError: it failed; it has said why.
        KeyboardInterrupt: it was interrupted, and has said what is kept.
    """
    from factlens.errors import RunError

    said = [*map(str, words)]
    code = subprocess.run([sys.executable, "-m", "factlens.cli", *said], check=False).returncode
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        raise RunError(f"`factlens {' '.join(said)}` ended with {code}")


def keep_plan(path: Path, plan: Mapping[str, object]) -> None:
    """Note what a folder's results belong to, or find that they belong to it.

    Raises:
        RunError: the folder holds results of another plan.
    """
    from factlens.errors import RunError
    from factlens.files import written_whole

    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as partial:
            partial.write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
    noted = json.loads(path.read_text(encoding="utf-8"))
    if other := [name for name in plan if noted.get(name) != plan[name]]:
        raise RunError(
            f"{path.parent} holds measurements of another {', '.join(other)}; remove it, or give another --out"
        )


def load(name: str, device: str | None, dtype: str, device_map: str | None = None) -> Model:
    """The model a command is about, with a word on the terminal while it loads."""
    import torch
    from rich.markup import escape

    from factlens.models import load_model

    check_dtype(dtype)
    if device is not None:
        check_device(device)
    with console(stderr=True).status(f"loading {escape(name)}"):
        return load_model(name, device=device, dtype=getattr(torch, dtype), device_map=device_map)


def check_dtype(dtype: str) -> None:
    """Refuse a type that models do not come in."""
    known = ("float32", "bfloat16", "float16")
    if dtype not in known:
        raise usage(f"no dtype {dtype!r}; there are {', '.join(known)}")


def executor_for(
    name: str,
    device: str | None,
    device_map: str | None,
    dtype: str,
    workers: int,
    ray_address: str | None,
) -> Executor:
    """Where a run is computed: in this process, unless several workers or a cluster are asked for."""
    from factlens.executors import InProcess, ModelSource, OnRay

    if workers < 1:
        raise usage(f"--workers is a number from 1 up, not {workers}")
    if workers == 1 and ray_address is None:
        return InProcess(load(name, device, dtype, device_map))
    check_dtype(dtype)
    source = ModelSource(name=name, device=device, dtype=dtype, device_map=device_map)
    with console(stderr=True).status(f"starting {workers} workers"):
        return OnRay(source, workers, ray_address)


def check_device(device: str) -> None:
    """Refuse a device that is not there."""
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise usage(f"there is no device {device!r}; use cpu or cuda") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise usage(f"the device {device!r} is not there: torch sees no CUDA GPU; use --device cpu")


def level_of(given: str | None) -> float | str | None:
    """A noise level as `trace` takes it: numbers as numbers, words as they are."""
    try:
        return None if given is None else float(given)
    except ValueError:
        return given


def tell_left_out(rows: Sequence[str]) -> None:
    """Say which rows of a file cannot be used, the first few of them."""
    for row in rows[:5]:
        print(f"left out: {row}", file=sys.stderr)
    if len(rows) > 5:
        print(f"… and {len(rows) - 5} more rows left out", file=sys.stderr)


def check_writable(out: Path) -> None:
    """Find out before the work, not after it."""
    from factlens.errors import OutputError

    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(
            f"cannot write to the folder {out}: {nearest} is no writable folder; use --out"
        )
