"""``visiontrim methods`` and ``visiontrim models``: what there is."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer
from rich.table import Table

from visiontrim.commands.options import Json, console

METHODS_EPILOG = "Example:  visiontrim methods --json | jq '.[].name'"
MODELS_EPILOG = "Example:  visiontrim models --json | jq '.[].model_type'"


def show_methods(as_json: Json = False) -> None:
    """List the methods with their papers and options."""
    from visiontrim.core.method import Layers
    from visiontrim.core.registry import list_methods

    rows = []
    for name, cls in list_methods().items():
        fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]  # methods are dataclasses
        rows.append(
            {
                "name": name,
                "stages": [str(step.site) for step in cls().steps_for(Layers(encoder=23, decoder=32))],
                "text_aware": cls.text_aware,
                "merges": cls.merges,
                "paper": cls.paper,
                "summary": cls.summary,
                "options": {field.name: field.default for field in fields},
            }
        )
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("method", "stages", "reads the question", "merges", "options", "summary", "paper")
    for row in rows:
        options = ", ".join(f"{option}={default}" for option, default in row["options"].items())
        flags = ["yes" if row[flag] else "" for flag in ("text_aware", "merges")]
        stages = row["stages"] if len(row["stages"]) <= 4 else [row["stages"][0], "...", row["stages"][-1]]
        table.add_row(row["name"], ", ".join(stages), *flags, options, row["summary"], row["paper"])
    console().print(table)


def show_models(
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of docs/models.md.")] = False,
) -> None:
    """List the families of models, and what works with each."""
    from visiontrim.models import list_families

    rows = [{"model_type": name} | family.supports() for name, family in list_families().items()]
    if as_json:
        print(json.dumps(rows))
        return
    titles = {key: key.replace("_", " ") for key in rows[0]}
    cells = [[_cell(row[key]) for key in titles] for row in rows]
    if markdown:
        for line in ([*titles.values()], ["---"] * len(titles), *cells):
            print(f"| {' | '.join(line)} |")
        return
    table = Table(*titles.values())
    for line in cells:
        table.add_row(*line)
    console().print(table)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list) else str(value)
