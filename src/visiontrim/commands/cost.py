"""``visiontrim cost``: what a method saves, by arithmetic."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from visiontrim.commands.options import MOST, Answer, Json, Keeps, Methods, Size, Text, console, every, size_of

if TYPE_CHECKING:
    from visiontrim.measure.cost import Cost

EPILOG = (
    "Examples:  visiontrim cost llava-1.5-7b --keep 64 --batch 8\n\n"
    "visiontrim cost qwen2.5-vl-7b --size 1792x1792 --method visiontrim --method fastv --keep 0.25\n\n"
    "visiontrim cost --list"
)


def cost(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A preset, a directory or config.json, a hub name, or bundled."),
    ] = "llava-1.5-7b",
    method: Methods = ["visiontrim"],  # noqa: B006  # typer copies it
    keep: Keeps = [],  # noqa: B006
    text: Text = 60,
    answer: Answer = 64,
    batch: Annotated[int, typer.Option(min=1, max=MOST, help="Prompts at a time, each with one picture.")] = 1,
    size: Size = None,
    as_json: Json = False,
    show: Annotated[bool, typer.Option("--list", help="List the presets and stop.")] = False,
) -> None:
    """Count FLOPs, cache and tokens of a model from its configuration alone: no weights, no GPU.

    FLOPs are 2 per multiply-add; docs/cost.md has the formula. The method's own arithmetic is not in them: `visiontrim
    bench` times it.
    """
    from visiontrim.core.registry import load_method
    from visiontrim.measure.cost import costs
    from visiontrim.measure.shapes import Shape, preset_names

    if show:
        for name in preset_names():
            print(f"{name:20} {Shape.load(name).checkpoint}")
        return
    chosen = [load_method("none"), *every(method, keep)]
    shape = Shape.load(model)
    if size is not None:
        shape = shape.seeing(*size_of(size))
    plain, *ours = costs(shape, chosen, text=text, answer=answer, batch=batch)
    if as_json:
        setting = {"model": shape.name, "checkpoint": shape.checkpoint, "text": text, "answer": answer, "batch": batch}
        setting |= {"dtype": str(shape.dtype).removeprefix("torch.")}
        print(json.dumps(setting | {"plain": plain.to_dict(), "methods": [one.to_dict() for one in ours]}))
        return
    screen = console()
    screen.print(_table(f"{shape.name}, batch {batch}, {text} text tokens, {answer} answered", plain, ours))
    for one in ours:
        screen.print(f"{one.method}, vision tokens by decoder layer: {_runs(one.per_layer)}", soft_wrap=True)


def _table(title: str, plain: Cost, ours: list[Cost]) -> Table:
    """A column for the plain model, and two for each method: the number, and its share of the plain model's."""
    from visiontrim.report import scaled

    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in ("plain", *(name for one in ours for name in (one.method, "of plain"))):
        table.add_column(name, justify="right")
    rows = [
        ("vision tokens in", "vision_tokens", ""),
        ("mean per decoder layer", "mean", ""),
        ("vision encoder", "vision", "FLOP"),
        ("prefill", "prefill", "FLOP"),
        ("decoding", "decode", "FLOP"),
        ("all", "flops", "FLOP"),
        ("KV of vision tokens", "kv_vision", "B"),
        ("KV after the prompt", "kv_prompt", "B"),
        ("KV after the answer", "kv_answer", "B"),
    ]
    for title, key, unit in rows:
        before, cells = getattr(plain, key), []
        for one in ours:
            after = getattr(one, key)
            cells += [
                scaled(after, unit, before) if unit else f"{after:.4g}",
                f"{after / before:.1%}" if before else "-",
            ]
        table.add_row(title, scaled(before, unit) if unit else f"{before:.4g}", *cells)
    return table


def _runs(per_layer: tuple[float, ...]) -> str:
    """``0-1: 576, 2-31: 288``."""
    runs = []
    for count, layers in itertools.groupby(enumerate(per_layer), key=lambda pair: pair[1]):
        first, *rest = [layer for layer, _ in layers]
        runs.append(f"{first}-{rest[-1]}: {count:g}" if rest else f"{first}: {count:g}")
    return ", ".join(runs)
