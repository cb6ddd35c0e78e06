"""Shapes are checked at run time in the modules that declare any; mypy has checked the types of all the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from beartype import beartype
from jaxtyping import install_import_hook

SRC = Path(__file__).parents[1] / "src"


def shaped_modules() -> list[str]:
    """The modules that declare shapes. To check every call of every module would double the time of the tests."""
    return [
        ".".join(path.relative_to(SRC).with_suffix("").parts)
        for path in sorted(SRC.rglob("*.py"))
        if {"jaxtyping", "factlens.types"} & set(path.read_text("utf-8").split())
    ]


def checked(function: Any) -> Any:
    """`function` with its arguments checked, but for one made inside another: to decorate each new hook takes longer than to run it."""
    return function if "<locals>" in getattr(function, "__qualname__", "") else beartype(function)


def check_shapes() -> None:
    """From now on; before anything imports factlens."""
    install_import_hook(shaped_modules(), "shapes.checked")
