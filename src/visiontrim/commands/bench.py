"""``visiontrim bench``: how fast a method is, beside the plain model and the ideal."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from visiontrim.commands.options import (
    Answer,
    Device,
    Dtype,
    DtypeName,
    Json,
    Keeps,
    Methods,
    Size,
    Text,
    Threads,
    check_file,
    console,
    every,
    size_of,
)
from visiontrim.commands.progress import Progress
from visiontrim.core.errors import TrimError

if TYPE_CHECKING:
    from visiontrim.measure.bench import Subject

EPILOG = (
    "Examples:  visiontrim bench --keep 64 --keep 144 --batch 1 --batch 8 --plot time.png\n\n"
    "visiontrim bench llava-1.5-7b --layers 4 --method visiontrim --method random --keep 64 --answer 8\n\n"
    "visiontrim bench qwen2.5-vl-7b --size 3584x3584 --dtype bfloat16 --device cuda --out speed.json"
)
ATTENTIONS = "choose sdpa or eager, or install the package of another one"


def bench(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="bundled, a preset (random weights), a hub name, or a directory."),
    ] = "bundled",
    method: Methods = ["visiontrim"],  # noqa: B006  # typer copies it
    keep: Keeps = [],  # noqa: B006
    batch: Annotated[list[int], typer.Option(min=1, help="Prompts at a time. May be repeated.")] = [1],  # noqa: B006
    text: Text = 60,
    answer: Answer = 64,
    size: Size = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Decoder layers of a preset, the encoder in proportion. Default: all.")
    ] = None,
    text_tower: Annotated[
        str | None,
        typer.Option(metavar="ID_OR_DIR", help="CLIP model that reads the question; for presets a random one is made."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often everything is timed, by turns.")] = 10,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="Count CPU seconds: for machines that others use too.")
    ] = False,
    threads: Threads = None,
    device: Device = "auto",
    dtype: Dtype = DtypeName.auto,
    attention: Annotated[str, typer.Option(help="Attention implementation: sdpa, eager, flash_attention_2.")] = "sdpa",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON file to write.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Picture to draw: time against tokens.")] = None,
    as_json: Json = False,
) -> None:
    """Time the plain model, the method, and the ideal by turns, and measure their memory.

    The ideal is the model itself, fed as many vision tokens as the method leaves, at no cost. Prompts are noise. Steps
    of decoding are compared one by one in turn, ideal over ours in CPU time; beside the ideal stands the ideal against
    itself, which is the noise.
    """
    import torch

    from visiontrim.evaluate.benchmarks.base import save_text
    from visiontrim.images import check_output
    from visiontrim.measure.bench import Load, environment
    from visiontrim.measure.bench import bench as run
    from visiontrim.plotting import pyplot

    if out is not None:
        check_file(out, "--out")
    if plot is not None:
        check_file(plot, "--plot")
        check_output(plot)
        pyplot()
    chosen = every(method, keep)
    if threads is not None:
        torch.set_num_threads(threads)
    subject = _subject(model, layers, size, text_tower, device, dtype, attention, (max(batch), text, answer))
    told: dict[str, Any] = {
        "model": subject.name,
        "text": text,
        "answer": answer,
        "rounds": rounds,
        "cpu_time": cpu_time,
    }
    told |= {"when": datetime.now(UTC).isoformat(timespec="seconds"), "environment": environment(subject.model)}
    told["batches"] = []
    for rows in batch:
        load = Load(rows, text, answer, rounds, cpu_time=cpu_time)
        found = run(subject, chosen, load, Progress(f"calls, batch {rows}"))
        told["batches"].append({"batch": rows, "rows": found})
        if out is not None:  # after every batch: what is measured is kept
            save_text(json.dumps(told, indent=1) + "\n", out)
    if plot is not None:
        from visiontrim.measure.plot import time_against_tokens

        time_against_tokens(told, plot)
    if as_json:
        print(json.dumps(told))
        return
    for batched in told["batches"]:
        console().print(
            _table(
                f"{subject.name}, batch {batched['batch']}, medians of {rounds} rounds, times in ms",
                batched["rows"],
                answer,
            )
        )


def _subject(
    name: str,
    layers: int | None,
    size: str | None,
    text_tower: str | None,
    device: str,
    dtype: DtypeName,
    attention: str,
    load_of: tuple[int, int, int],
) -> Subject:
    """What is timed; ``load_of`` are the most prompts, their text tokens, and those of the answer."""
    import torch
    from transformers.utils import logging

    from visiontrim.ask import load, on_device
    from visiontrim.measure.bench import Subject, noise_tower
    from visiontrim.measure.room import check_room
    from visiontrim.measure.shapes import Shape, preset_names
    from visiontrim.models.checkpoints import loaded
    from visiontrim.models.family import family_of

    logging.disable_progress_bar()
    shape = Shape.load(name)
    if size is not None:
        shape = shape.seeing(*size_of(size))
    place = on_device(device)
    number = (
        getattr(torch, dtype.value)
        if dtype is not DtypeName.auto
        else torch.float32
        if place.type == "cpu"
        else shape.dtype
    )
    batch, text, answer = load_of
    if name not in preset_names():
        if layers is not None:
            raise TrimError(f"--layers is for presets, of which {name!r} is none: choose {', '.join(preset_names())}")
        check_room(shape, place, number, batch=batch, text=text, answer=answer, weights=False)
        speaker = load(name, text_tower=text_tower, device=device, dtype=dtype.value)
        model: Any = speaker.model
        loaded("attention implementation", attention, model.set_attn_implementation, ATTENTIONS)
        return Subject(name, model, shape.picture, speaker.text_tower, speaker.processor)
    shape = shape if layers is None else shape.sliced(layers)
    check_room(shape, place, number, batch=batch, text=text, answer=answer, weights=True)

    def build(chosen: str) -> Any:
        return shape.build(str(place), number, chosen)

    model = loaded("attention implementation", attention, build, ATTENTIONS)
    model.generation_config.eos_token_id = None
    return Subject(shape.name, model, shape.picture, *noise_tower(family_of(model)))


def _table(title: str, rows: list[dict[str, Any]], answer: int) -> Table:
    """Medians; times in milliseconds. ``answer`` are the tokens of an answer."""
    from visiontrim.report import scaled

    table = Table(title=title, title_justify="left")
    table.add_column("")
    names = (
        *("tokens", "answer", "opening", "vision", "method", "prefill", "step", "total", "CPU"),
        *("of plain", "ideal/ ours", "its CPU", "its step", "KV", "peak"),
    )
    for name in names:
        table.add_column(name, justify="right")
    largest = {key: max(row[key] for row in rows) for key in ("kv_bytes", "peak_bytes")}  # a unit for each column
    for row in rows:
        times = [f"{1e3 * median:.4g}" for _, median, _ in row["seconds"].values()]
        ideal = row.get("ideal_of_ours")
        step = row.get("step_ideal_of_ours", row.get("step_noise"))
        table.add_row(
            row["name"],
            f"{row['tokens']:.4g}",
            f"{answer}",
            *times,
            f"{row['of_plain']['total'][1]:.3f}",
            *((f"{ideal[key][1]:.3f}" for key in ("total", "cpu")) if ideal else ("", "")),
            f"{step['cpu'][1]:.3f}" if step else "",
            *(scaled(row[key], "B", of) for key, of in largest.items()),
        )
    return table
