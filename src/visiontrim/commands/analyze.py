"""``visiontrim analyze shift | dispersion | layers``: where a model looks."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from visiontrim.commands.options import Device, Dtype, DtypeName, Model, Threads, check_file, load_speaker
from visiontrim.commands.progress import Progress, stoppable
from visiontrim.core.errors import TrimError

EPILOG = "Example:  visiontrim analyze shift --data questions.jsonl --limit 200 --out shift"


class Kind(StrEnum):
    shift = "shift"
    dispersion = "dispersion"
    layers = "layers"


class Definition(StrEnum):
    text = "text"
    last = "last"
    all = "all"
    image = "image"


Data = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Questions in any form that eval reads, as llava_v1_5_mix1k.jsonl. Default: bundled."
    ),
]
Images = Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the pictures. Default: beside the file.")]
Limit = Annotated[int, typer.Option(min=1, help="Prompts to look at.")]
Out = Annotated[
    Path | None,
    typer.Option(metavar="NAME", help="Writes NAME.png and NAME.json. Default: the kind's name."),
]
Definitions = Annotated[
    list[Definition] | None,
    typer.Option("--definition", help="Whose attention, as published: may be repeated. Default: all four."),
]
Layers = Annotated[
    list[int] | None,
    typer.Option("--layer", min=0, help="Decoder layer to draw: may be repeated. Default: up to eight."),
]


def analyze(
    kind: Annotated[
        Kind,
        typer.Argument(
            help="Which places of the image each layer attends to, beside the encoder's attention; how widely its "
            "attention is spread there; or how much of it goes to the image.",
        ),
    ],
    data: Data = None,
    images: Images = None,
    limit: Limit = 100,
    definition: Definitions = None,
    layer: Layers = None,
    out: Out = None,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = DtypeName.auto,
    threads: Threads = None,
) -> None:
    """Where the language model and the vision encoder look, over a stream of questions."""
    from visiontrim.analyze import plots
    from visiontrim.analyze.attention import QUERIES, observe
    from visiontrim.evaluate.benchmarks.base import save_text
    from visiontrim.evaluate.files import read_items
    from visiontrim.evaluate.suites import SHAPES, shapes
    from visiontrim.plotting import pyplot

    out = out or Path(kind.value)
    picture, numbers = out.with_name(f"{out.name}.png"), out.with_name(f"{out.name}.json")
    for path in (picture, numbers):
        check_file(path, "--out")
    why = ""
    try:
        pyplot()
    except TrimError as error:
        why = str(error)
    items = shapes("standard") if data is None else read_items(data, images)
    speaker = load_speaker(model, None, device, dtype, threads)
    with stoppable("nothing is written: --limit takes fewer prompts"):
        found = observe(speaker, items, limit, Progress("prompts"))
    if wrong := [number for number in layer or () if number >= found.layers]:
        raise TrimError(
            f"--layer {wrong[0]}: {speaker.name} has {found.layers} decoder layers, 0 to {found.layers - 1}"
        )
    source = f"{SHAPES}/standard" if data is None else str(data)
    save_text(json.dumps({"model": speaker.name, "data": source} | found.to_dict()) + "\n", numbers)
    kinds = [one.value for one in definition] if definition else QUERIES
    drawn = [] if why else getattr(plots, kind.value)(found, picture, kinds, layer or ())
    for path in (*drawn, numbers):
        print(path)
    if why:
        print(f"visiontrim: {why}", file=sys.stderr)
