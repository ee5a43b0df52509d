"""``visiontrim methods`` and ``visiontrim models``: what there is."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from visiontrim.commands.options import Json, console
from visiontrim.core.errors import TrimError

if TYPE_CHECKING:  # torch takes seconds to import: --help must not wait for it
    from visiontrim.core.method import Method, Step

METHODS_EPILOG = (
    "Examples:  visiontrim methods --kind decoder --text-aware\n\nvisiontrim methods --json | jq '.[].name'"
)
MODELS_EPILOG = "Example:  visiontrim models --json | jq '.[].model_type'"
_ENCODER, _DECODER = 23, 32
"""Layers of the model that places are told for: LLaVA-1.5-7B, whose scored layer leaves out the last of the encoder."""


class Kind(StrEnum):
    encoder = "encoder"
    decoder = "decoder"
    video = "video"


def show_methods(
    kind: Annotated[
        Kind | None,
        typer.Option(help="Only what acts in the vision encoder or at its output, in the decoder, or is for videos."),
    ] = None,
    text_aware: Annotated[bool, typer.Option("--text-aware", help="Only what reads the question.")] = False,
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of the README.")] = False,
) -> None:
    """List the methods with their papers and options."""
    from visiontrim.core.registry import list_methods

    rows = [_row(cls) for cls in sorted(list_methods().values(), key=_order if markdown else lambda cls: cls.name)]
    rows = [row for row in rows if (kind is None or kind in row["kinds"]) and (row["text_aware"] or not text_aware)]
    if not rows:
        raise TrimError("no method is of that kind and reads the question: leave out --kind or --text-aware")
    if as_json:
        print(json.dumps(rows))
    elif markdown:
        titles = ["name", "where it acts", "text", "merges", "source"]
        lines = [
            [f"`{row['name']}`", row["place"], _cell(row["text_aware"]), _cell(row["merges"]), _source(row)]
            for row in rows
        ]
        _print_markdown(titles, lines)
    else:
        table = Table("method", "where it acts", "reads the question", "merges", "options", "summary", "paper")
        for row in rows:
            options = ", ".join(f"{option}={default}" for option, default in row["options"].items())
            flags = ["yes" if row[flag] else "" for flag in ("text_aware", "merges")]
            table.add_row(row["name"], row["place"], *flags, options, row["summary"], row["paper"])
        console().print(table)


def _row(cls: type[Method]) -> dict[str, Any]:
    steps = _steps(cls)
    return {
        "name": cls.name,
        "kinds": _kinds(cls, steps),
        "place": _place(cls, steps),
        "stages": [str(step.site) for step in steps],
        "text_aware": cls.text_aware,
        "merges": cls.merges,
        "paper": cls.paper,
        "summary": cls.summary,
        "options": {field.name: field.default for field in dataclasses.fields(cls)},  # pyright: ignore[reportArgumentType]
    }


def _steps(cls: type[Method]) -> tuple[Step, ...]:
    from visiontrim.core.method import Layers

    return cls().steps_for(Layers(encoder=_ENCODER, decoder=_DECODER))


def _kinds(cls: type[Method], steps: Sequence[Step]) -> list[Kind]:
    from visiontrim.core.method import DecoderLayer, Decoding, EncoderLayer, VisionOutput

    places = {type(step.site) for step in steps} | set(cls.also_at)
    found = [Kind.encoder] if places & {EncoderLayer, VisionOutput} else []
    found += [Kind.decoder] if places & {DecoderLayer, Decoding} else []
    return found + ([Kind.video] if cls.for_videos else [])


def _place(cls: type[Method], steps: Sequence[Step]) -> str:
    """Where a method acts by default, and what its options can change about that."""
    from visiontrim.core.method import DecoderLayer, Decoding, EncoderLayer

    said = []
    for kind, group in itertools.groupby((step.site for step in steps), type):
        layers = [site.index for site in group if isinstance(site, EncoderLayer | DecoderLayer)]
        if kind is EncoderLayer:
            said.append(f"before {_layers('encoder layer', layers, _ENCODER)}")
        elif kind is DecoderLayer:
            said.append(f"before {_layers('decoder layer', layers, _DECODER)}")
        else:
            said.append("vision encoder's output")
    said[-1:] = [f"{said[-1]} or a decoder layer"] if DecoderLayer in cls.also_at else said[-1:]
    said += ["with an option also in decoding"] if Decoding in cls.also_at else []
    said += ["videos"] if cls.for_videos else []
    return "; ".join(said) or "nowhere"


def _layers(name: str, layers: Sequence[int], depth: int) -> str:
    of = f" of {depth}" if layers[-1] > 2 else ""  # the first ones are the same in every model
    if len(layers) > 4 and list(layers) == list(range(layers[0], depth)):
        return f"every {name} from {layers[0]}{of} on"
    return f"{name}{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}{of}"


def _order(cls: type[Method]) -> tuple[Any, ...]:
    """The package's own method first, then images, videos and controls, each in the order in which a model runs."""
    from visiontrim.core.method import DecoderLayer, EncoderLayer, VisionOutput

    site = next((step.site for step in _steps(cls)), None)
    kinds = (EncoderLayer, VisionOutput, DecoderLayer, type(None))
    group = 2 if cls.paper == "control" else int(cls.for_videos)
    return cls.name != "visiontrim", group, kinds.index(type(site)), cls.name


def _source(row: dict[str, Any]) -> str:
    """The paper with links; of a control, what it does."""
    if row["paper"] == "control":
        return f"control: {row['summary']}"
    text = re.sub(r"arXiv (\d{4}\.\d{5})(?: (v\d+))?", _arxiv, row["paper"])
    text = re.sub(r"OpenReview (\w+)", r"[OpenReview \1](https://openreview.net/forum?id=\1)", text)
    return re.sub(r"docs/\w+\.md", r"[\g<0>](\g<0>)", text)


def _arxiv(found: re.Match[str]) -> str:
    number, version = found.groups(default="")
    return f"[{found[0]}](https://arxiv.org/abs/{number}{version})"


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
        _print_markdown([*titles.values()], cells)
        return
    table = Table(*titles.values())
    for line in cells:
        table.add_row(*line)
    console().print(table)


def _print_markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    for line in (titles, ["---"] * len(titles), *rows):
        print(f"| {' | '.join(line)} |")


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list) else str(value)
