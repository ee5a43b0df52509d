"""``visiontrim eval`` and ``visiontrim tune``: is it still right, and which setting is the cheapest that is."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

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
from visiontrim.core.errors import TrimError

EVAL_EPILOG = "Example:  visiontrim eval --methods visiontrim,visionzip --keep 64,32 --scenes 20"
TUNE_EPILOG = "Example:  visiontrim tune --data my.jsonl --target-retention 0.99 --methods visiontrim,visionzip"

Methods = Annotated[
    str, typer.Option(metavar="A,B[:K=V],...", help="Methods by name, with options, or all; controls are always there.")
]
Keeps = Annotated[str, typer.Option(metavar="N,N,...", help="Budgets: vision tokens per decoder layer, in the mean.")]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Directory of log and report; the log is gone on with.")]
Batch = Annotated[int, typer.Option(min=1, help="Questions at a time.")]
Scenes = Annotated[int | None, typer.Option(min=1, help="Only the first so many scenes, or pictures of a file.")]
Minutes = Annotated[float | None, typer.Option(min=0, help="Ask no further batch that would take longer than this.")]
Json = Annotated[bool, typer.Option("--json", help="Print the scores as JSON instead of the first table.")]


def evaluate(
    suite: Annotated[
        str,
        typer.Option(metavar="shapes|canvases|FILE", help="Bundled suite (canvases: for bundled-qwen), or JSON lines."),
    ] = "shapes",
    split: Annotated[
        str | None,
        typer.Option(
            help="Of shapes: standard, hard, turns or video; of canvases: rows x columns, each cell a vision token. "
            "Default: standard, or 16x16."
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
    scenes: Scenes = None,
    minutes: Minutes = None,
    out: Out = Path("visiontrim-eval"),
    batch: Batch = 32,
    model: Model = None,
    text_tower: TextTower = None,
    device: Device = "auto",
    dtype: Dtype = DtypeName.auto,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Score methods on questions, beside the plain model, random and uniform tokens; writes a report."""
    from visiontrim.evaluate import evaluation
    from visiontrim.evaluate.asking import Cell, Examiner, Log
    from visiontrim.evaluate.examples import examples
    from visiontrim.evaluate.report import markdown, page, sections
    from visiontrim.evaluate.suites import load_suite

    if ablation is None:
        chosen = evaluation.all_methods() if methods == "all" else methods_of(methods)
        blocks = [evaluation.Block.comparison(chosen, amounts_of(keep))]
    else:
        names = evaluation.ablations() if ablation == "all" else ablation.split(",")
        blocks = [evaluation.ablation(name) for name in names]
    cells = [cell for block in blocks for cell in block.cells]
    for cell in cells:
        cell.load()  # unknown names are told before anything is asked
    questions = load_suite(suite, split, scenes)
    speaker = load_speaker(model, text_tower, device, dtype, threads)
    out.mkdir(parents=True, exist_ok=True)
    examiner = Examiner(speaker, questions, Log(out / "log.jsonl"), batch)
    answers = evaluation.evaluate(examiner, cells, minutes, _progress())
    scored = [(block, block.scores(answers)) for block in blocks]
    found = [section for block, scores in scored for section in sections(block, answers, scores)]
    if ablation is None and len(blocks[0].methods) > 2:
        block = blocks[0]
        ours = "visiontrim" if "visiontrim" in block.methods else block.methods[2]
        found += examples(examiner, answers, Cell(ours, block.keeps[-1]), Cell("random", block.keeps[-1]))
    for section in found:
        if section.picture is not None:
            section.picture.save(out / section.file)
    title = f"{questions.name}, answered by {speaker.name}"
    text = evaluation.preamble(answers, examiner, shlex.join(["visiontrim", *sys.argv[1:]]))
    (out / "table.md").write_text(markdown(title, text, found), encoding="utf-8")
    (out / "report.html").write_text(page(title, text, found), encoding="utf-8")
    if as_json:
        rows = [evaluation.to_dict(score) for _, scores in scored for score in scores]
        print(json.dumps({"questions": len(answers.items), "plain": evaluation.to_dict(answers.whole), "scores": rows}))
        return
    print(markdown(title, text, found[:1] if ablation is None else found))
    print(f"{out / 'table.md'}\n{out / 'report.html'}")


def tune(
    data: Annotated[
        str, typer.Option(metavar="FILE", help="JSON lines: image, question and, if known, answer; or shapes.")
    ],
    target_retention: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the plain model's right answers (of its answers, if unknown).")
    ] = 0.99,
    methods: Methods = "visiontrim,visionzip,uniform",
    keep: Keeps = "288,192,128,96,64,48,32,16",
    scenes: Scenes = None,
    minutes: Minutes = None,
    out: Out = Path("visiontrim-tune"),
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
    from visiontrim.evaluate.asking import Cell, Examiner, Log
    from visiontrim.evaluate.suites import load_suite
    from visiontrim.plotting import pyplot

    pyplot()  # told before the work, if it is missing
    chosen = evaluation.all_methods() if methods == "all" else methods_of(methods)
    cells = [Cell(method, amount) for amount in amounts_of(keep) for method in chosen]
    for cell in cells:
        cell.load()
    questions = load_suite(data, scenes=scenes)
    speaker = load_speaker(model, text_tower, device, dtype, threads)
    out.mkdir(parents=True, exist_ok=True)
    examiner = Examiner(speaker, questions, Log(out / "log.jsonl"), batch)
    tuned = tuning.tune(evaluation.evaluate(examiner, cells, minutes, _progress()), cells, target_retention)
    if not tuned.scores:
        raise TrimError(f"none of {methods} works on this model at any of keep={keep}")
    tuning.draw(tuned, out / "frontier.png")
    best = tuned.chosen
    setting = None if best is None else tuning.spelled(best.method, best.keep)
    if as_json:
        rows = [evaluation.to_dict(score) for score in tuned.scores]
        print(json.dumps({"target": target_retention, "setting": setting, "scores": rows}))
        return
    for score in tuned.frontier:
        sure = ", in its 95 % interval too" if tuned.is_sure(score) else ""
        share = 100 * (score.retention or 0)
        print(f"{score.mean:7.1f} tokens per layer  {share:5.1f} %{sure}  {tuning.spelled(score.method, score.keep)}")
    print(f"\n--method {setting}" if setting else f"\nno setting keeps {100 * target_retention:g} %: give more tokens")
    print(out / "frontier.png")


def _progress() -> Callable[[int, int, int], None]:
    """Tells on standard error, where that is a terminal, how far it is."""
    if not sys.stderr.isatty():
        return lambda batch, batches, cells: None
    return lambda batch, batches, cells: print(
        f"\rbatch {batch + 1} of {batches}, cell {cells} ", end="", file=sys.stderr, flush=True
    )
