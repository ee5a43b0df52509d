"""``visiontrim eval`` and ``visiontrim tune``: is it still right, and which setting is the cheapest that is."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visiontrim.commands.options import (
    Device,
    Dtype,
    DtypeName,
    Model,
    TextTower,
    Threads,
    amounts_of,
    load_speaker,
    methods_of,
)
from visiontrim.commands.progress import Progress, stoppable
from visiontrim.core.errors import TrimError

if TYPE_CHECKING:  # torch and transformers take seconds to import: --help must not wait for them
    from visiontrim.evaluate.asking import Cell
    from visiontrim.evaluate.evaluation import Block
    from visiontrim.evaluate.items import Suite
    from visiontrim.evaluate.log import Log

EVAL_EPILOG = "Example:  visiontrim eval --methods visiontrim,visionzip --keep 64,32 --scenes 20"
TUNE_EPILOG = "Example:  visiontrim tune --data my.jsonl --target-retention 0.99 --methods visiontrim,visionzip"

Methods = Annotated[
    str,
    typer.Option(
        metavar="A,B[:K=V],...", help="Methods by name, with options, all among them; controls are always there."
    ),
]
Keeps = Annotated[str, typer.Option(metavar="N,N,...", help="Budgets: vision tokens per decoder layer, in the mean.")]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Folder of log and report; the log is gone on with. Default: one of the suite's own."
    ),
]
Batch = Annotated[int, typer.Option(min=1, help="Questions at a time.")]
Scenes = Annotated[
    int | None,
    typer.Option(min=1, help="Only the first so many scenes, or pictures of files, with all their questions."),
]
Images = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder of the pictures. Default: beside the questions, as instructed."),
]
ProtocolName = Annotated[
    str,
    typer.Option(
        "--protocol",
        help="How questions are put: chat (the model's template), llava-1.5 (that of published numbers: its template "
        "and system sentence, padding), bare (the question alone).",
    ),
]
Template = Annotated[str | None, typer.Option(help="chat or vicuna_v1. Default: the protocol's.")]
Pad = Annotated[
    bool | None, typer.Option("--pad/--no-pad", help="Pad pictures to a square with the mean colour, or do not.")
]
Suffix = Annotated[
    bool | None, typer.Option("--suffix/--no-suffix", help="Send what a benchmark adds to its questions, or do not.")
]
Guide = Annotated[str | None, typer.Option(help="What guides text-aware methods: the whole prompt, or the question.")]
AnswerTokens = Annotated[int | None, typer.Option(min=1, help="Longest answer. Default: the benchmark's.")]
Minutes = Annotated[float | None, typer.Option(min=0, help="Ask no further batch that would take longer than this.")]
Json = Annotated[bool, typer.Option("--json", help="Print the scores as JSON instead of the first table.")]


def evaluate(
    suite: Annotated[
        str,
        typer.Option(
            metavar="NAME|NAME:ROOT|FILE",
            help="shapes, canvases or clips, which are bundled (canvases for bundled-qwen, clips for bundled-video), "
            "an official benchmark and the folder of its files, or questions in a file or a folder.",
        ),
    ] = "shapes",
    split: Annotated[
        str | None,
        typer.Option(
            help="Of shapes: standard, hard, turns, video or natural; of canvases and clips: rows x columns, each "
            "cell a vision token. Default: standard, natural for bundled-natural, 16x16, or 12x12."
        ),
    ] = None,
    methods: Methods = "visiontrim",
    keep: Keeps = "192,128,64,32",
    ablation: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="fusion, stages, tgvc, layer, split, window, iterations, luvc-language, luvc-vision, luvc, or all.",
        ),
    ] = None,
    images: Images = None,
    scenes: Scenes = None,
    minutes: Minutes = None,
    seeds: Annotated[int, typer.Option(min=1, help="Draws of the random control; their spread is told.")] = 5,
    out: Out = None,
    batch: Batch = 32,
    protocol: ProtocolName = "chat",
    template: Template = None,
    pad: Pad = None,
    suffix: Suffix = None,
    guide: Guide = None,
    answer: AnswerTokens = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of each video. Default: 8.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="List the official benchmarks, and exit.")] = False,
    model: Model = None,
    text_tower: TextTower = None,
    device: Device = "auto",
    dtype: Dtype = DtypeName.auto,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Score methods on questions, beside the plain model, random and uniform tokens and smaller pictures."""
    from visiontrim.evaluate import evaluation, output
    from visiontrim.evaluate.asking import Examiner
    from visiontrim.evaluate.log import NAME, Log, claimed
    from visiontrim.evaluate.protocol import protocol as chosen_protocol

    if listed:
        _list(as_json)
        return
    blocks = _blocks(methods, keep, ablation, seeds)
    cells = _cells(blocks)
    how = chosen_protocol(protocol, template=template, pad=pad, suffix=suffix, guide=guide, max_new_tokens=answer)
    if suite == "shapes":
        split = _split_of(model, split)
    questions, folder = _questions(suite, split, scenes, images, out, "visiontrim-eval", frames)
    with claimed(folder), stoppable(f"answers are in {folder / NAME}, and the same command goes on"):
        speaker = load_speaker(model, text_tower, device, dtype, threads)
        log = warned(Log(folder / NAME))
        examiner = Examiner(speaker, questions, log, batch, how)
        answers = evaluation.evaluate(examiner, cells, minutes, Progress("batches x methods"))
        command = shlex.join(["visiontrim", *sys.argv[1:]])
        written = output.write(folder, command, examiner, answers, blocks, illustrated=ablation is None)
    if as_json:
        print(json.dumps(written.numbers))
        return
    print(written.brief)
    for path in written.files:
        print(path)


def tune(
    data: Annotated[
        str,
        typer.Option(metavar="FILE", help="JSON lines: image, question and, if known, answer; or any suite of eval."),
    ],
    target_retention: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of the plain model's score (of its answers, if nothing is known)."),
    ] = 0.99,
    methods: Methods = "visiontrim,visionzip,uniform",
    keep: Keeps = "288,192,128,96,64,48,32,16",
    images: Images = None,
    scenes: Scenes = None,
    minutes: Minutes = None,
    out: Out = None,
    batch: Batch = 32,
    model: Model = None,
    text_tower: TextTower = None,
    device: Device = "auto",
    dtype: Dtype = DtypeName.auto,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Find the cheapest method and budget that keep the plain model's answers, and draw the frontier."""
    from visiontrim.evaluate import evaluation
    from visiontrim.evaluate import tune as tuning
    from visiontrim.evaluate.asking import Cell, Examiner
    from visiontrim.evaluate.log import NAME, Log, claimed
    from visiontrim.plotting import pyplot

    pyplot()  # told before the work, if it is missing
    chosen = _chosen(methods)
    cells = [Cell(method, amount) for amount in amounts_of(keep) for method in chosen]
    for cell in cells:
        cell.load()
    questions, folder = _questions(data, None, scenes, images, out, "visiontrim-tune")
    with claimed(folder), stoppable(f"answers are in {folder / NAME}, and the same command goes on"):
        speaker = load_speaker(model, text_tower, device, dtype, threads)
        examiner = Examiner(speaker, questions, warned(Log(folder / NAME)), batch)
        answers = evaluation.evaluate(examiner, cells, minutes, Progress("batches x settings"))
        tuned = tuning.tune(answers, cells, target_retention)
        if not tuned.scores:
            raise TrimError(f"none of {methods} works on this model at any of keep={keep}")
        tuning.draw(tuned, folder / "frontier.png")
    best = tuned.chosen
    setting = None if best is None else tuning.spelled(best.method, best.keep)
    if as_json:
        rows = [score.to_dict() for score in tuned.scores]
        told = {"target": target_retention, "setting": setting, "advice": tuned.advice, "questions": tuned.questions}
        print(json.dumps(told | {"groups": tuned.groups, "scores": rows}))
        return
    for score in tuned.frontier:
        sure = ", in its 95 % interval too" if tuned.is_sure(score) else ""
        share = 100 * (score.retention or 0)
        print(f"{score.mean:7.1f} tokens per layer  {share:5.1f} %{sure}  {tuning.spelled(score.method, score.keep)}")
    print(f"\n--method {setting}\n{tuned.advice}" if setting else f"\n{tuned.advice}")
    print(folder / "frontier.png")


def _blocks(methods: str, keep: str, ablation: str | None, seeds: int) -> list[Block]:
    from visiontrim.evaluate import evaluation

    if ablation is None:
        chosen = _chosen(methods)
        return [evaluation.Block.comparison(chosen, amounts_of(keep), seeds)]
    names = evaluation.ablations() if ablation == "all" else ablation.split(",")
    return [evaluation.ablation(name) for name in names]


def _chosen(methods: str) -> list[str]:
    """The methods of a list, in which "all" stands for every method for single images."""
    from visiontrim.evaluate.evaluation import all_methods

    return [name for part in methods_of(methods) for name in (all_methods() if part == "all" else [part])]


def _cells(blocks: list[Block]) -> list[Cell]:
    cells = [cell for block in blocks for cell in block.asked]
    for cell in cells:
        cell.load()  # unknown names are told before anything is asked
    return cells


def _split_of(model: str | None, split: str | None) -> str | None:
    """The split that is meant. Raises :class:`TrimError` for natural scenes and a bundled model without their words."""
    from visiontrim.ask import BUNDLED, BUNDLED_NATURAL, BUNDLED_QWEN
    from visiontrim.zoo.natural_questions import MORE_WORDS
    from visiontrim.zoo.natural_scenes import NATURAL

    if split is None and model == BUNDLED_NATURAL:
        return NATURAL.name
    if split == NATURAL.name and model in (None, BUNDLED, BUNDLED_QWEN):
        raise TrimError(
            f"the model {model or BUNDLED} knows no {', '.join(MORE_WORDS)}, {len(MORE_WORDS)} words of the split "
            f"{split}: --model {BUNDLED_NATURAL} does"
        )
    return split


def _questions(
    suite: str,
    split: str | None,
    scenes: int | None,
    images: Path | None,
    out: Path | None,
    home: str,
    frames: int | None = None,
) -> tuple[Suite, Path]:
    """The suite with all its pictures in place, and the folder of its answers."""
    from visiontrim.evaluate.suites import check_pictures, load_suite, slug

    questions = load_suite(suite, split, scenes, images, frames)
    check_pictures(questions.items)
    return questions, out or Path(home) / slug(questions, suite)


def warned(log: Log) -> Log:
    """The log, after telling what is wrong with it."""
    for note in log.notes:
        print(f"visiontrim: {note}", file=sys.stderr)
    return log


def _list(as_json: bool) -> None:
    from rich.table import Table

    from visiontrim.commands.options import console
    from visiontrim.evaluate.benchmarks import list_benchmarks

    found = list_benchmarks()
    fields = ("title", "metric", "papers", "checked", "licence", "where")
    if as_json:
        rows: dict[str, Any] = {name: {f: getattr(one, f) for f in fields} for name, one in found.items()}
        print(json.dumps(rows))
        return
    table = Table("NAME", "metric", "papers print", "rules checked on")
    for name, one in found.items():
        table.add_row(name, one.metric, one.papers, one.checked)
    console().print(table)
