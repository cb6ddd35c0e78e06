"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

ModelName = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="atlas (bundled), a hub name such as gpt2-xl, or a local folder."
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; the GPU if there is one.")]
Workers = Annotated[
    int, typer.Option(help="Processes with a model each (needs Ray for more than one).")
]
RayAddress = Annotated[
    str | None, typer.Option(help="A running Ray cluster: auto, or ray://host:10001.")
]
Precision = Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")]
Noise = Annotated[
    str,
    typer.Option(
        help="gaussian, uniform, rome (the official draws), replace (random tokens of other names), swap (other "
        "subjects of equal length), 'swap:<other subject>'."
    ),
]
Level = Annotated[
    str | None,
    typer.Option(
        help="A number, '2x' the model's own, or 'facts': 3 sigma over the given subjects."
    ),
]
Samples = Annotated[int | None, typer.Option(help="Noise draws per fact; 10 by default.")]
