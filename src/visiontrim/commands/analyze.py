"""``visiontrim analyze shift | dispersion | layers | horizon``: where a model looks, and how deep it has to."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from visiontrim.commands.options import Device, Dtype, DtypeName, Model, Threads, check_file, load_speaker
from visiontrim.commands.progress import Progress, stoppable
from visiontrim.core.errors import TrimError

if TYPE_CHECKING:  # torch and transformers take seconds to import: --help must not wait for them
    from visiontrim.ask import Speaker

EPILOG = "Example:  visiontrim analyze shift --data questions.jsonl --limit 200 --out shift"


class Kind(StrEnum):
    shift = "shift"
    dispersion = "dispersion"
    layers = "layers"
    horizon = "horizon"


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
    typer.Option("--layer", min=0, help="Decoder layer to draw: may be repeated. Default: up to eight; horizon: all."),
]
Chooser = Annotated[
    str | None,
    typer.Option(
        "--method",
        metavar="NAME:...{layer}",
        help="Of horizon: what random tokens are compared with, with the places {layer} and {keep}. Default: fastv.",
    ),
]
Left = Annotated[int, typer.Option("--keep", min=1, help="Of horizon: vision tokens left behind the layer.")]


def analyze(
    kind: Annotated[
        Kind,
        typer.Argument(
            help="Which places of the image each layer attends to, beside the encoder's attention; how widely its "
            "attention is spread there; how much of it goes to the image; or the layer from which on random tokens do "
            "as well as all.",
        ),
    ],
    data: Data = None,
    images: Images = None,
    limit: Limit = 100,
    definition: Definitions = None,
    layer: Layers = None,
    method: Chooser = None,
    keep: Left = 16,
    out: Out = None,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = DtypeName.auto,
    threads: Threads = None,
) -> None:
    """Where the language model and the vision encoder look, over a stream of questions, and how deep."""
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
    if kind is Kind.horizon:
        speaker = load_speaker(model, None, device, dtype, threads)
        _horizon(speaker, data, images, limit, layer, method, keep, picture, numbers, why)
        return
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


def _horizon(
    speaker: Speaker,
    data: Path | None,
    images: Path | None,
    limit: int,
    layers: list[int] | None,
    method: str | None,
    keep: int,
    picture: Path,
    numbers: Path,
    why: str,
) -> None:
    from visiontrim.analyze import horizon, plots
    from visiontrim.evaluate.asking import Examiner
    from visiontrim.evaluate.benchmarks.base import save_text
    from visiontrim.evaluate.evaluation import evaluate
    from visiontrim.evaluate.log import Log
    from visiontrim.evaluate.suites import SHAPES, check_pictures, first_groups, load_suite

    questions = load_suite(SHAPES if data is None else str(data), images=images)
    questions = questions.taking(first_groups(questions.items, questions=limit))
    check_pictures(questions.items)
    number = speaker.model.config.get_text_config().num_hidden_layers
    places = sorted(set(layers)) if layers else list(range(number))
    if places[-1] >= number:
        raise TrimError(f"--layer {places[-1]}: {speaker.name} has {number} decoder layers, 0 to {number - 1}")
    named = method or horizon.METHOD
    cells = [cell for place in places for cell in horizon.pair(named, place, keep)]
    log = numbers.with_name(f"{numbers.stem}.log.jsonl")
    with stoppable(f"answers are in {log}, and the same command goes on"):
        answers = evaluate(Examiner(speaker, questions, Log(log), 16), cells, None, Progress("batches x layers"))
    found = horizon.horizons(answers, named, places, keep)
    told = {"model": speaker.name, "data": questions.name, "method": named, "keep": keep}
    save_text(json.dumps(told | {"types": [one.to_dict() for one in found]}) + "\n", numbers)
    print(horizon.table(found, keep, answers.metric.metric) + "\n")
    for path in (*([] if why else plots.horizon(found, picture)), numbers):
        print(path)
    if why:
        print(f"visiontrim: {why}", file=sys.stderr)
