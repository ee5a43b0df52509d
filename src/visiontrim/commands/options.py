"""Options that the commands about cost and speed share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from visiontrim.core.method import Method

Methods = Annotated[
    list[str],
    typer.Option(
        "--method", metavar="NAME[:K=V,...]", help="Method, several joined by |, or a recipe file. May be repeated."
    ),
]
Keeps = Annotated[
    list[str],
    typer.Option(
        "--keep",
        metavar="N|F",
        help="Vision tokens to keep per image, a number or a fraction. May be repeated: every "
        "method is run with each. Default: the method's.",
    ),
]
Text = Annotated[int, typer.Option(min=1, help="Text tokens of the prompt.")]
Answer = Annotated[int, typer.Option(min=1, help="Tokens of the answer.")]
Size = Annotated[
    str | None,
    typer.Option(
        metavar="HxW[xFRAMES]", help="Picture in pixels, or a video. Default: the preset's, or the encoder's."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def spelled(methods: Sequence[str], keeps: Sequence[str]) -> list[Method]:
    """Every method with every budget, methods first."""
    from visiontrim.core.registry import load_method

    amounts = [{"keep": amount_of(keep)} for keep in keeps] or [{}]
    return [load_method(method, **amount) for method in methods for amount in amounts]


def amount_of(text: str) -> int | float:
    """A number of tokens or a fraction. Raises :class:`typer.BadParameter` for anything else."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    raise typer.BadParameter(f"--keep: {text!r} is neither a number of tokens (64) nor a fraction (0.25)")


def size_of(text: str) -> tuple[int, int, int]:
    """Height, width, and frames (0 for an image). Raises :class:`typer.BadParameter` for anything else."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(?:x([1-9]\d*))?", text)
    if found is None:
        raise typer.BadParameter(f"--size: {text!r} is no size: write 672x672, or 224x224x8 for a video of 8 frames")
    height, width, frames = (int(number or 0) for number in found.groups())
    return height, width, frames
