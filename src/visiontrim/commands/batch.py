"""``visiontrim batch``: a question about each of many pictures, and the answers in a file."""

from __future__ import annotations

import functools
import os
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from visiontrim.commands.ask import Keep, MethodSpec, NewTokens
from visiontrim.commands.options import (
    Device,
    Dtype,
    DtypeName,
    Model,
    TextTower,
    Threads,
    check_file,
    load_speaker,
)
from visiontrim.commands.progress import Progress, duration, stoppable

EPILOG = (
    "Examples:  visiontrim batch photos/ --question 'What is on the table?' --out answers.jsonl "
    "--model llava-hf/llava-1.5-7b-hf --keep 64\n\n"
    "visiontrim batch rows.jsonl --out answers.jsonl --workers 2\n\n"
    "A run that was stopped goes on with the same command."
)


class Runner(StrEnum):
    local = "local"
    ray = "ray"


def batch(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT",
            help="Folder of pictures, or a .jsonl or .parquet file of image, question and, if wanted, id.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="JSON lines to write, in the order of the input.")],
    question: Annotated[str | None, typer.Option(metavar="TEXT", help="Asked where a row has none.")] = None,
    model: Model = None,
    text_tower: TextTower = None,
    method: MethodSpec = "visiontrim",
    keep: Keep = None,
    max_new_tokens: NewTokens = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that are answered at once.")] = 8,
    workers: Annotated[int, typer.Option(min=1, help="Processes, each with a model of its own.")] = 1,
    runner: Annotated[Runner, typer.Option(help="Processes of this machine, or actors of Ray.")] = Runner.local,
    gpus: Annotated[float, typer.Option(min=0.0, help="GPUs of each of Ray's actors.")] = 0.0,
    fewest: Annotated[
        int | None, typer.Option(min=1, help="Actors that Ray starts with; it adds more while rows wait.")
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Of a running Ray; default: one is started here.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = DtypeName.auto,
    threads: Threads = None,
) -> None:
    """Answer a question about each of many pictures, into a file; a bad row is a row with an error, and exit code 1."""
    from visiontrim.core.errors import TrimError
    from visiontrim.core.registry import load_method
    from visiontrim.serving import local, over_ray
    from visiontrim.serving.answerer import Settings
    from visiontrim.serving.answers import Partial
    from visiontrim.serving.rows import digest, read_rows

    recipe = load_method(method, **({} if keep is None else {"keep": keep})).to_dict()
    check_file(out, "--out")
    if runner is Runner.local and (gpus or fewest or ray_address):
        raise TrimError("--gpus, --fewest and --ray-address are of --runner ray: leave them away, or take it")
    if fewest is not None and fewest > workers:
        raise TrimError(f"--fewest {fewest} is more than --workers {workers}: Ray adds actors up to --workers")
    rows = read_rows(source, question)
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    header = {
        "model": model or "bundled",
        "text_tower": text_tower,
        "method": recipe,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "dtype": dtype.value,
        "input": digest(rows),
    }
    partial = Partial(out, header, list(map(len, batches)))
    todo, begun = partial.todo(), time.monotonic()
    if len(todo) < len(batches):
        print(f"{len(batches) - len(todo):,} of {len(batches):,} batches are answered already", file=sys.stderr)
    # several processes would fight over the cores; one may have them all
    share = threads or (None if workers == 1 else max(1, (os.cpu_count() or 1) // workers))
    settings = Settings(
        functools.partial(load_speaker, model, text_tower, device, dtype, share), recipe, max_new_tokens
    )
    progress = Progress(f"batches of {batch_size}")
    with stoppable(f"{partial.path} holds the answers so far, and the same command goes on"):
        if not todo:
            said = iter(())
        elif runner is Runner.ray:
            said = over_ray.answered(settings, batches, todo, workers, fewest=fewest, gpus=gpus, address=ray_address)
        else:
            said = local.answered(settings, batches, todo, workers)
        for done, (number, answers) in enumerate(said, len(batches) - len(todo) + 1):
            partial.add(number, answers)
            progress(done, len(batches))
        failed = partial.finish()
    partial.close()
    print(
        f"{len(rows):,} rows, {len(failed):,} failed, in {duration(time.monotonic() - begun)}: {out}", file=sys.stderr
    )
    if failed:
        first = failed[0]
        print(
            f"visiontrim: the first that failed is {first['id']!r}: {first['error']}; the same command asks again what "
            "failed",
            file=sys.stderr,
        )
        raise typer.Exit(1)
