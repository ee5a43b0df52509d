"""``visiontrim analyze shift | dispersion | layers``: where a model looks."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from visiontrim.commands.options import Device, Dtype, DtypeName, Model, Threads, load_speaker

EPILOG = "Example:  visiontrim analyze shift --data questions.jsonl --limit 200 --out shift"


class Kind(StrEnum):
    shift = "shift"
    dispersion = "dispersion"
    layers = "layers"


Data = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="JSON lines: image, question; or LLaVA's conversations. Default: bundled."),
]
Limit = Annotated[int, typer.Option(min=1, help="Prompts to look at.")]
Out = Annotated[
    Path | None,
    typer.Option(metavar="NAME", help="Writes NAME.png and NAME.json. Default: the kind's name."),
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
    limit: Limit = 100,
    out: Out = None,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = DtypeName.auto,
    threads: Threads = None,
) -> None:
    """Where the language model and the vision encoder look, over a stream of questions."""
    from visiontrim.analyze import plots
    from visiontrim.analyze.attention import observe
    from visiontrim.evaluate.files import read_items
    from visiontrim.evaluate.suites import SHAPES, shapes
    from visiontrim.plotting import pyplot

    pyplot()  # told before the work, if it is missing
    speaker = load_speaker(model, None, device, dtype, threads)
    found = observe(speaker, shapes("standard") if data is None else read_items(data), limit)
    out = out or Path(kind.value)
    picture, numbers = out.with_name(f"{out.name}.png"), out.with_name(f"{out.name}.json")
    getattr(plots, kind.value)(found, picture)
    source = f"{SHAPES}/standard" if data is None else str(data)
    numbers.write_text(json.dumps({"model": speaker.name, "data": source} | found.to_dict()) + "\n", encoding="utf-8")
    print(f"{picture}\n{numbers}")
