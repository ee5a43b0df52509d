"""``visiontrim reproduce``: does the paper hold? Published numbers beside measured ones."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from visiontrim.commands.evaluate import Images, Json, Out, warned
from visiontrim.commands.options import Device, Dtype, DtypeName, Model, TextTower, Threads, load_speaker
from visiontrim.commands.progress import Progress, duration, stoppable
from visiontrim.core.errors import TrimError

if TYPE_CHECKING:  # torch and transformers take seconds to import: --help must not wait for them
    from visiontrim.evaluate.items import Suite

EPILOG = (
    "Example:  visiontrim reproduce visiontrim --model llava-hf/llava-1.5-7b-hf --benchmarks pope,gqa "
    "--root playground/data/eval"
)
DEFAULT = "gqa,scienceqa-img,textvqa,pope,mmbench,mme"


def reproduce(
    root: Annotated[Path, typer.Option(metavar="ROOT", help="The folder that eval.zip was unpacked into.")],
    method: Annotated[str, typer.Argument(help="Method whose published numbers are checked.")] = "visiontrim",
    benchmarks: Annotated[str, typer.Option(metavar="A,B,...", help="Of those of visiontrim eval --list.")] = DEFAULT,
    tokens: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Budgets. Default: 192, 128 and 64, or all that are published."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="About so many questions of each benchmark.")] = None,
    images: Images = None,
    protocol: Annotated[
        str | None, typer.Option(help="How questions are put. Default: llava-1.5; bare for the bundled models.")
    ] = None,
    out: Out = None,
    batch: Annotated[int, typer.Option(min=1, help="Questions at a time.")] = 8,
    model: Model = None,
    text_tower: TextTower = None,
    device: Device = "auto",
    dtype: Dtype = DtypeName.auto,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Ask the plain model and a method at its paper's budgets, and print published beside measured."""
    from visiontrim.ask import OWN
    from visiontrim.evaluate import output, published
    from visiontrim.evaluate import reproduce as reproducing
    from visiontrim.evaluate.asking import Examiner
    from visiontrim.evaluate.benchmarks.base import save_json, save_text
    from visiontrim.evaluate.log import NAME, Log, claimed
    from visiontrim.evaluate.protocol import protocol as chosen_protocol

    own = model in (None, *OWN)
    how = chosen_protocol(protocol or ("bare" if own else reproducing.PUBLISHED))
    whole, asked = _suites(benchmarks, root, images, limit)
    budgets = _numbers(tokens)
    folder = out or Path("visiontrim-reproduce") / method
    with claimed(folder), stoppable(f"answers are in {folder}, and the same command goes on"):
        speaker = load_speaker(model, text_tower, device, dtype, threads)
        name, excuse = reproducing.standing(speaker, how)
        settings = [published.setting(name, method, n) for n in budgets or published.usual(name, method)]
        examiners = {}
        for benchmark, suite in asked.items():
            (folder / benchmark).mkdir(exist_ok=True)
            log = warned(Log(folder / benchmark / NAME))
            examiners[benchmark] = Examiner(speaker, suite, log, batch, how)
        answers = reproducing.ask(examiners, settings, _announce, Progress("batches x settings"))
        for benchmark, found in answers.items():
            for cell in found.rows:
                if not found.error(cell):
                    output.save_answers(folder / benchmark, examiners[benchmark], found, cell)
        measured = {
            benchmark: one if isinstance(one, str) else reproducing.Measured(answers[benchmark], len(one.items))
            for benchmark, one in whole.items()
        }
        rows = reproducing.compare(name, settings, measured, excuse)
        text = [
            f"`{shlex.join(['visiontrim', *sys.argv[1:]])}`, protocol {how}.",
            *([f"**{excuse}.**"] if excuse else []),
        ]
        report = reproducing.markdown(f"{method} on {speaker.name}, published beside measured", text, rows, excuse)
        told = {"model": name, "excuse": excuse, "protocol": str(how), "rows": [row.to_dict() for row in rows]}
        save_text(report, folder / "reproduce.md")
        save_json(told, folder / "reproduce.json", indent=1)
    print(json.dumps(told) if as_json else f"{report}\n{folder / 'reproduce.md'}")


def _suites(
    benchmarks: str, root: Path, images: Path | None, limit: int | None
) -> tuple[dict[str, Suite | str], dict[str, Suite]]:
    """All benchmarks, or why one is not there; and what is asked of those that are."""
    from visiontrim.evaluate.suites import check_pictures, first_groups, load_suite

    whole: dict[str, Suite | str] = {}
    for name in filter(None, (part.strip() for part in benchmarks.split(","))):
        try:
            whole[name] = load_suite(f"{name}:{root}", images=images)
        except TrimError as error:
            whole[name] = str(error)
    there = {name: suite for name, suite in whole.items() if not isinstance(suite, str)}
    if not there:
        raise TrimError(f"none of the benchmarks is there: {next(map(str, whole.values()), 'none was named')}")
    asked = {name: suite.taking(first_groups(suite.items, questions=limit)) for name, suite in there.items()}
    for suite in asked.values():
        check_pictures(suite.items)
    return whole, asked


def _numbers(tokens: str | None) -> list[int]:
    try:
        found = [int(part) for part in (tokens or "").split(",") if part.strip()]
    except ValueError:
        raise TrimError(f"--tokens {tokens!r}: give whole numbers, as 192,128,64") from None
    if any(number < 1 for number in found):
        raise TrimError(f"--tokens {tokens!r}: give numbers from 1 on")
    return found


def _announce(answers: int, timed: int, seconds: float) -> None:
    print(
        f"visiontrim: {answers:,} answers, about {duration(seconds * answers)} by the time of the first {timed}; those "
        "in the log are not asked again",
        file=sys.stderr,
    )
