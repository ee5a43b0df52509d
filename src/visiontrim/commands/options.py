"""Options that commands share, how their texts are read, and what several of them do with these."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperCommand

from visiontrim.core.errors import TrimError

if TYPE_CHECKING:  # torch and transformers take seconds to import: --help must not wait for them
    from visiontrim.ask import Speaker
    from visiontrim.core.method import Method


class DtypeName(StrEnum):
    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


Model = Annotated[
    str | None,
    typer.Option(
        metavar="ID_OR_DIR",
        help="Hub name or directory, bundled, bundled-qwen, bundled-natural or bundled-video. Default: this package's "
        "small model.",
    ),
]
TextTower = Annotated[
    str | None,
    typer.Option(
        metavar="ID_OR_DIR",
        help="CLIP model that reads the question for methods that want it. Default: the small model's own; for other "
        "models the embeddings of their language model.",
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ...; auto: an accelerator if there is one.")]
Dtype = Annotated[DtypeName, typer.Option(help="Of the weights; auto: the checkpoint's, float32 on the CPU.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Of the CPU. Default: torch's.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]

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
        metavar="N|F,...",
        help="Vision tokens to keep per image, numbers or fractions. May be repeated: every method is run with each. "
        "Default: the method's.",
    ),
]
MOST = 10**12
"""Tokens and prompts that are counted: a number beyond is a slip."""
Text = Annotated[int, typer.Option(min=4, max=MOST, help="Text tokens of the prompt.")]
Answer = Annotated[int, typer.Option(min=1, max=MOST, help="Tokens of the answer.")]
Size = Annotated[
    str | None,
    typer.Option(
        metavar="HxW[xFRAMES]", help="Picture in pixels, or a video. Default: the preset's, or the encoder's."
    ),
]


class Command(TyperCommand):
    """A command in whose help flags have no type."""

    def get_params(self, ctx: Any) -> Any:
        params = super().get_params(ctx)
        for param in params:
            if getattr(param, "is_flag", False) and getattr(param, "metavar", None) is None:
                param.metavar = ""  # pyright: ignore[reportAttributeAccessIssue]
        return params


def amount_of(text: str) -> int | float:
    """A number of tokens or a fraction. Raises :class:`typer.BadParameter` for anything else."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    raise typer.BadParameter(f"--keep: {text!r} is neither a number of tokens (64) nor a fraction (0.25)")


def amounts_of(text: str) -> list[int | float]:
    """Several of them: ``192,128,64``."""
    return [amount_of(part) for part in text.split(",")]


def methods_of(text: str) -> list[str]:
    """Names with their options, at the commas that no option follows: ``a,b:x=1,y=2,c`` is three methods."""
    found: list[str] = []
    for part in filter(None, (part.strip() for part in re.split(r",(?![^\[]*\])", text))):
        if found and "=" in part.partition(":")[0]:
            found[-1] += f",{part}"
        else:
            found.append(part)
    return found


def size_of(text: str) -> tuple[int, int, int]:
    """Height, width, and frames (0 for an image). Raises :class:`typer.BadParameter` for anything else."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(?:x([1-9]\d*))?", text)
    if found is None:
        raise typer.BadParameter(f"--size: {text!r} is no size: write 672x672, or 224x224x8 for a video of 8 frames")
    height, width, frames = (int(number or 0) for number in found.groups())
    return height, width, frames


def every(methods: Sequence[str], keeps: Sequence[str]) -> list[Method]:
    """Every method with every budget, methods first."""
    from visiontrim.core.registry import load_method

    budgets: list[dict[str, Any]] = [{"keep": amount} for keep in keeps for amount in amounts_of(keep)] or [{}]
    return [load_method(method, **budget) for method in methods for budget in budgets]


def load_speaker(
    model: str | None, text_tower: str | None, device: str, dtype: DtypeName, threads: int | None = None
) -> Speaker:
    """The model, quietly."""
    import torch

    from visiontrim.ask import load

    quiet()
    if threads is not None:
        torch.set_num_threads(threads)
    return load(model, text_tower=text_tower, device=device, dtype=dtype.value)


def quiet() -> None:
    """Libraries say nothing but errors, and draw no bars of their own."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()


def check_file(path: Path, option: str, folder: bool = False) -> None:
    """Raise :class:`TrimError` where ``path`` cannot be written, as far as that can be told before the work.

    ``folder`` says that it will be one.
    """
    if folder and path.is_file():
        raise TrimError(f"{option} {path} is a file: give the name of a folder")
    if path.is_dir() and not folder:
        raise TrimError(f"{option} {path} is a folder: give the name of a file")
    if not path.parent.is_dir():
        raise TrimError(f"{option} {path}: {path.parent} is no folder: create it first, or write somewhere else")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise TrimError(f"{option} {path} cannot be written: write somewhere else")


def console() -> Console:
    # A pipe has no width: rich would wrap tables at 80 columns.
    return Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)


@contextmanager
def status(text: str) -> Iterator[None]:
    """A spinner on standard error while something takes its time; nothing where that is no terminal."""
    terminal = Console(stderr=True)
    with terminal.status(f"{escape(text)} ...") if terminal.is_terminal else nullcontext():
        yield
