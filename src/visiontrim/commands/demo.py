"""``visiontrim demo``: a page to try methods on."""

from __future__ import annotations

from typing import Annotated

import typer

from visiontrim.commands.options import Device, Dtype, DtypeName, Model, TextTower, Threads, load_speaker, status
from visiontrim.core.errors import TrimError

EPILOG = "Example:  visiontrim demo, then http://127.0.0.1:7860 in a browser; it works offline."


def demo(
    model: Model = None,
    text_tower: TextTower = None,
    keep: Annotated[int, typer.Option(min=1, help="Where the slider starts.")] = 64,
    most: Annotated[int, typer.Option(min=1, help="Where it ends: vision tokens of a picture.")] = 576,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    device: Device = "auto",
    dtype: Dtype = DtypeName.auto,
    threads: Threads = None,
) -> None:
    """Try methods in a browser: a picture, a question, two methods side by side."""
    try:
        from visiontrim.serving.demo import page
    except ImportError as error:
        raise TrimError(
            f"the demo needs {error.name}: pip install 'visiontrim[demo]', in an environment of its own (it asks for "
            "another release of pillow than the tests)"
        ) from error
    with status(f"loading {model or 'the bundled model'}"):
        speaker = load_speaker(model, text_tower, device, dtype, threads)
    examples = []
    if model is None:
        from visiontrim.zoo import held_out

        drawn = list(held_out(4, per_scene=2))
        examples = [(sample.image, sample.question) for sample in drawn[:6]]
    page(speaker, examples, keep, most).launch(server_name=host, server_port=port, share=False, show_error=True)
