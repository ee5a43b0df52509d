"""``visiontrim doctor``: whether a model and the installed releases keep what this package promises."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from visiontrim.commands.options import Device, Json, console, quiet, status

if TYPE_CHECKING:
    from visiontrim.doctor import Diagnosis

EPILOG = (
    "Examples:  visiontrim doctor\n\n"
    "visiontrim doctor --model llava-hf/llava-1.5-7b-hf --json\n\n"
    "visiontrim doctor --model ./my-model || echo 'do not trust it'"
)


def doctor(
    model: Annotated[
        str,
        typer.Option(
            metavar="ID_OR_DIR",
            help="bundled, bundled-qwen, bundled-natural, bundled-video, a preset, a directory or config.json, or a "
            "hub name.",
        ),
    ] = "bundled",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Check that a model keeps the promises on the installed releases, before you trust it.

    Of a large model, or one that is not on the disk, two layers with random weights are tried: no weights are loaded.
    The exit code is 1 if a promise is broken. A bug report starts with what this prints.
    """
    from visiontrim.ask import on_device
    from visiontrim.doctor import diagnose

    quiet()
    with status(f"trying {model}"):
        found = diagnose(model, on_device(device))
    if as_json:
        print(json.dumps(found.to_dict()))
    else:
        _show(found)
    if not found.sound:
        raise typer.Exit(1)


def _show(found: Diagnosis) -> None:
    from visiontrim.engine.upstream import RELEASES

    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    tick, cross = ("✓", "✗") if unicode else ("ok", "NO")
    screen = console()
    facts = Table.grid(padding=(0, 2))
    for name, number in found.versions.items():
        known = f" (known to work: {', '.join(RELEASES)})" if name == "transformers" else ""
        facts.add_row(name, number + known)
    facts.add_row("accelerator", found.accelerator)
    facts.add_row("model", f"{found.model}: {found.tried}")
    facts.add_row("family", found.family)
    screen.print(facts)
    if found.possible:
        table = Table("possible", "", "")
        for one in found.possible:
            table.add_row(one.what, tick if one.possible else "-", one.why)
        screen.print(table)
    table = Table("promise", "", "found", "seconds")
    table.columns[3].justify = "right"
    for result in found.promises:
        table.add_row(result.promise, tick if result.kept else cross, result.said, f"{result.seconds:.1f}")
    screen.print(table)
    broken = sum(not result.kept for result in found.promises)
    if broken:
        screen.print(
            f"{broken} of {len(found.promises)} promises broken: do not trust answers of this model", soft_wrap=True
        )
