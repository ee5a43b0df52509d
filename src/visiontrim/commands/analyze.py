"""``visiontrim analyze shift | dispersion | layers``: where a model looks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from visiontrim.commands.options import Device, Dtype, DtypeName, Model, Threads, load_speaker

app = typer.Typer(
    help="Where the language model and the vision encoder look, over a stream of questions.",
    epilog="Example:  visiontrim analyze shift --data questions.jsonl --limit 200 --out shift",
    no_args_is_help=True,
)

Data = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="JSON lines: image, question; or LLaVA's conversations. Default: bundled."),
]
Limit = Annotated[int, typer.Option(min=1, help="Prompts to look at.")]
Out = Annotated[Path, typer.Option(metavar="NAME", help="Writes NAME.png and NAME.json.")]


@app.command()
def shift(
    data: Data = None,
    limit: Limit = 100,
    out: Out = Path("shift"),
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = DtypeName.auto,
    threads: Threads = None,
) -> None:
    """Which places of the image each layer attends to, beside the encoder's attention."""
    _analyze("shift", data, limit, out, model, device, dtype, threads)


@app.command()
def dispersion(
    data: Data = None,
    limit: Limit = 100,
    out: Out = Path("dispersion"),
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = DtypeName.auto,
    threads: Threads = None,
) -> None:
    """How widely attention is spread over the image: sorted and summed up, and as a histogram."""
    _analyze("dispersion", data, limit, out, model, device, dtype, threads)


@app.command()
def layers(
    data: Data = None,
    limit: Limit = 100,
    out: Out = Path("layers"),
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = DtypeName.auto,
    threads: Threads = None,
) -> None:
    """How much of each layer's attention goes to the image, and how even it is there."""
    _analyze("layers", data, limit, out, model, device, dtype, threads)


def _analyze(
    kind: str,
    data: Path | None,
    limit: int,
    out: Path,
    model: str | None,
    device: str,
    dtype: DtypeName,
    threads: int | None,
) -> None:
    from visiontrim.analyze import plots
    from visiontrim.analyze.attention import observe
    from visiontrim.evaluate.suites import SHAPES, read_items, shapes
    from visiontrim.plotting import pyplot

    pyplot()  # told before the work, if it is missing
    speaker = load_speaker(model, None, device, dtype, threads)
    found = observe(speaker, shapes("standard") if data is None else read_items(data), limit)
    picture, numbers = out.with_name(f"{out.name}.png"), out.with_name(f"{out.name}.json")
    getattr(plots, kind)(found, picture)
    source = f"{SHAPES}/standard" if data is None else str(data)
    numbers.write_text(json.dumps({"model": speaker.name, "data": source} | found.to_dict()) + "\n", encoding="utf-8")
    print(f"{picture}\n{numbers}")
