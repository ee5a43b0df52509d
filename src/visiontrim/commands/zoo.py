"""``visiontrim zoo train | eval | phrases | validity | card``: the models that ship."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visiontrim.commands.options import Command, check_file, quiet
from visiontrim.core.errors import TrimError

if TYPE_CHECKING:
    from visiontrim.ask import Speaker
    from visiontrim.zoo.evaluate import Scores
    from visiontrim.zoo.suite import Sample

app = typer.Typer(
    help="The models that ship: train them, score them, describe them.",
    epilog="Example:  visiontrim zoo eval --split hard --scenes 50",
    no_args_is_help=True,
)


class StageName(StrEnum):
    """In the order in which they build on each other; vision builds on none."""

    basics = "basics"
    decoder = "decoder"
    longer = "longer"
    vision = "vision"
    joint = "joint"
    polish = "polish"
    seeing = "seeing"
    reading = "reading"
    looking = "looking"
    settling = "settling"
    ship = "ship"


class Recipe(StrEnum):
    shapes = "shapes"
    natural = "natural"


_NATURAL = (StageName.seeing, StageName.reading, StageName.looking, StageName.settling)
STAGES = {
    Recipe.shapes: tuple(stage for stage in StageName if stage not in _NATURAL),
    Recipe.natural: (*_NATURAL, StageName.ship),
}


@app.command(cls=Command, epilog="Example:  visiontrim zoo train --out runs/llava --stage vision")
def train(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory of checkpoints, logs and the finished model.")],
    recipe: Annotated[
        Recipe, typer.Option(help="shapes: the bundled model, from scratch. natural: that of natural scenes, from it.")
    ] = Recipe.shapes,
    stage: Annotated[
        StageName | None,
        typer.Option(
            help=f"One stage alone, of shapes {', '.join(STAGES[Recipe.shapes])} (vision can run beside the three "
            f"before it), of natural {', '.join(STAGES[Recipe.natural])}."
        ),
    ] = None,
    minutes: Annotated[float, typer.Option(min=0, help="Stop each stage at the first checkpoint after this.")] = 1e9,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Train a bundled LLaVA. The same command again goes on where it was stopped."""
    if stage is not None and stage not in STAGES[recipe]:
        raise TrimError(f"{stage.value} is no stage of {recipe.value}: choose {', '.join(STAGES[recipe])}")
    from visiontrim.zoo.training.recipe import train_natural, train_stage

    stages = train_natural if recipe is Recipe.natural else train_stage
    for name in STAGES[recipe] if stage is None else (stage,):
        for line in stages(name.value, out, minutes, threads):
            print(f"{name.value}: {json.dumps(line)}", flush=True)


class ModelName(StrEnum):
    llava = "llava"
    qwen = "qwen"
    natural = "natural"
    video = "video"


@app.command("eval", cls=Command, epilog="Example:  visiontrim zoo eval qwen --split 16x12 --scenes 20")
def evaluate(
    name: Annotated[
        ModelName, typer.Argument(metavar="MODEL", help="llava, qwen, natural or video.")
    ] = ModelName.llava,
    split: Annotated[
        list[str] | None,
        typer.Option(
            help="Of llava: standard, hard, turns or video; by default the first. Of natural: natural, by default, or "
            "one of llava's. Of qwen: rows x columns of cells of 12 pixels, such as 16x12; by default four sizes. Of "
            "video: the same of a frame, by default 12x12. May be repeated."
        ),
    ] = None,
    scenes: Annotated[int | None, typer.Option(min=1, help="Only the first scenes of each split.")] = None,
    keep: Annotated[int, typer.Option(min=1, help="Vision tokens left by the random and the oracle selection.")] = 64,
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Another checkpoint (llava: holds llava and clip).")
    ] = None,
    control_scenes: Annotated[int, typer.Option(min=1, help="Scenes that the controls are scored on.")] = 100,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON file that the scores are added to.")] = None,
) -> None:
    """Accuracy on held-out questions, with 95 % intervals, beside what guessing and few tokens give."""
    import torch

    torch.set_num_threads(threads)
    if out is not None:
        check_file(out, "--out")
        _known(out)
    if name in (ModelName.qwen, ModelName.video):
        evaluate = _evaluate_qwen if name is ModelName.qwen else _evaluate_video
        evaluate(split, scenes, keep, model, control_scenes, out)
        return
    from visiontrim.commands.progress import Progress
    from visiontrim.zoo.evaluate import report
    from visiontrim.zoo.loading import NATURAL_DIR, load
    from visiontrim.zoo.suite import SPLITS

    natural = name is ModelName.natural
    chosen = split or ["natural" if natural else next(iter(SPLITS))]
    known = [one for one in SPLITS if natural or one != "natural"]
    for one in chosen:
        if one not in known:
            raise TrimError(f"there is no split {one!r} of {name.value}: choose {', '.join(known)}")
    quiet()
    bundle = load(model or (NATURAL_DIR if natural else None))
    for one in chosen:
        progress = Progress(f"{one}: questions x ways to look")
        _print(report(bundle, SPLITS[one], scenes, keep, control_scenes, progress), one, out)


def _evaluate_qwen(
    canvases: list[str] | None, scenes: int | None, keep: int, model: Path | None, control_scenes: int, out: Path | None
) -> None:
    from visiontrim.commands.progress import Progress
    from visiontrim.zoo.canvas_scores import CANVASES, SCENES, canvas_report, parse_grid, pooled
    from visiontrim.zoo.dynamic import load_qwen

    quiet()
    grids = {text: parse_grid(text) for text in canvases or CANVASES}
    bundle, scores = load_qwen(model), []
    for text, grid in grids.items():
        progress = Progress(f"canvases of {text}: questions x ways to look")
        scores.append(canvas_report(bundle, grid, scenes or SCENES, keep, control_scenes, progress))
        _print(scores[-1], f"canvases of {text}", out)
    if len(scores) > 1:
        _print(pooled(scores), f"canvases of {', '.join(grids)}", out)


def _evaluate_video(
    sizes: list[str] | None, scenes: int | None, keep: int, model: Path | None, control_scenes: int, out: Path | None
) -> None:
    from visiontrim.commands.progress import Progress
    from visiontrim.zoo.canvas_scores import parse_grid
    from visiontrim.zoo.clip_scores import CLIP_SIZE, CLIPS, clip_report
    from visiontrim.zoo.watching import load_video

    quiet()
    bundle = load_video(model)
    for text, grid in {text: parse_grid(text) for text in sizes or [CLIP_SIZE]}.items():
        progress = Progress(f"clips of {text}: questions x ways to look")
        _print(clip_report(bundle, grid, scenes or CLIPS, keep, control_scenes, progress), f"clips of {text}", out)


def _print(scores: Scores, name: str, out: Path | None) -> None:
    print(f"### {scores.title(name)}\n\n{scores.table()}\n")
    if out is not None:
        from visiontrim.evaluate.benchmarks.base import save_text

        save_text(json.dumps(_known(out) | {name: scores.to_dict()}, indent=1) + "\n", out)


def _known(file: Path) -> dict[str, Any]:
    """Scores that are there already."""
    try:
        known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise TrimError(f"{file} holds no scores ({error}): give another file") from error
    if not isinstance(known, dict):
        raise TrimError(f"{file} holds no scores, but a {type(known).__name__}: give another file")
    return known


@app.command(cls=Command, epilog="Example:  visiontrim zoo phrases --scenes 20")
def phrases(
    scenes: Annotated[int, typer.Option(min=1, help="Held-out scenes; every object of each is named.")] = 100,
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Holds llava and clip. Default: this package.")
    ] = None,
) -> None:
    """How well the text tower's name of an object finds its patches, by which embedding of a patch."""
    import itertools

    from visiontrim.commands.progress import Progress
    from visiontrim.zoo.loading import load
    from visiontrim.zoo.phrases import EMBEDDINGS, phrase_scores

    quiet()
    bundle = load(model)
    progress, seen = Progress("scenes x embeddings"), itertools.count(1)
    total = scenes * len(EMBEDDINGS)
    print("| `visual_projection` of | phrases | AUC | best patch lies on the object |\n|---|---|---|---|")
    for name in EMBEDDINGS:
        found = phrase_scores(bundle, scenes, name, lambda: progress(next(seen), total))
        print(f"| `{name}` | {found.phrases} | {found.area:.4f} | {found.hits:.1%} |")


VALIDITY = "validity.json"


@app.command(cls=Command, epilog="Example:  visiontrim zoo validity --out docs/results/table")
def validity(
    name: Annotated[ModelName, typer.Argument(metavar="MODEL", help="llava, qwen or natural.")] = ModelName.llava,
    scenes: Annotated[int, typer.Option(min=1, help="Held-out scenes, with all their questions.")] = 44,
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Another checkpoint (llava: holds llava and clip).")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Questions at a time.")] = 32,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Folder of log and figures; that of `visiontrim eval` saves its answers."),
    ] = Path("visiontrim-validity"),
) -> None:
    """How well the model predicts what is known of LLaVA-1.5-7B; printed whatever it is."""
    import torch

    from visiontrim.commands.progress import Progress, stoppable
    from visiontrim.evaluate import validity as figures
    from visiontrim.evaluate.asking import Examiner
    from visiontrim.evaluate.benchmarks.base import save_json
    from visiontrim.evaluate.log import NAME, Log, claimed
    from visiontrim.evaluate.suites import load_suite

    torch.set_num_threads(threads)
    speaker, suite, samples, tokens = _bed(name, model, scenes)
    with claimed(out), stoppable(f"answers are in {out / NAME}, and the same command goes on"):
        examiner = Examiner(speaker, load_suite(*suite, scenes=scenes), Log(out / NAME), batch)
        found = figures.validity(examiner, samples, tokens, Progress("batches x methods"))
        save_json(found, out / VALIDITY, indent=1)
    print(f"{figures.title(found)}\n\n{figures.table(found)}\n\n{out / VALIDITY}")


def _bed(name: ModelName, model: Path | None, scenes: int) -> tuple[Speaker, tuple[str, str], list[Sample], int]:
    """A bundled model, the name and split of its suite, the questions themselves, and the tokens of a picture."""
    import dataclasses

    from visiontrim import zoo
    from visiontrim.ask import BUNDLED, BUNDLED_NATURAL, BUNDLED_QWEN
    from visiontrim.commands.options import DtypeName, load_speaker
    from visiontrim.zoo.canvas_scores import CANVASES, parse_grid
    from visiontrim.zoo.natural_questions import normalise_natural

    if name is ModelName.qwen:
        grid = parse_grid(CANVASES[0])
        speaker = load_speaker(BUNDLED_QWEN, None, "cpu", DtypeName.float32)
        if model is not None:
            other, processor = zoo.load_qwen(model)
            speaker = dataclasses.replace(speaker, model=other, processor=processor)
        return speaker, ("canvases", CANVASES[0]), list(zoo.held_out_canvases(grid, scenes)), grid[0] * grid[1]
    if name is ModelName.video:
        raise TrimError("what is known of LLaVA-1.5-7B is about pictures: choose llava, qwen or natural, not video")
    natural = name is ModelName.natural
    split = "natural" if natural else "standard"
    if natural and model is not None:  # whose words are those of natural scenes, though none may ship
        speaker = load_speaker(BUNDLED, None, "cpu", DtypeName.float32)
        speaker = dataclasses.replace(speaker, name=BUNDLED_NATURAL, normalise=normalise_natural)
    else:
        speaker = load_speaker(BUNDLED_NATURAL if natural else BUNDLED, None, "cpu", DtypeName.float32)
    if model is not None:
        bundle = zoo.load(model)
        speaker = dataclasses.replace(
            speaker, model=bundle.model, processor=bundle.processor, text_tower=bundle.text_tower
        )
    return speaker, ("shapes", split), list(zoo.SPLITS[split].samples(scenes)), 576


@app.command(cls=Command, epilog="Example:  visiontrim zoo card docs/results/llava/llava.json")
def card(
    results: Annotated[
        Path, typer.Argument(metavar="FILE", help="What `visiontrim zoo eval --out FILE` or `zoo validity` wrote.")
    ],
) -> None:
    """Print the tables of the model card, as Markdown, from stored scores."""
    from visiontrim.evaluate import validity as figures
    from visiontrim.zoo.evaluate import Scores

    if not results.exists():
        raise TrimError(f"there is no {str(results)!r}: write it with `visiontrim zoo eval --out {results}`")
    stored = _known(results)
    if "ranks" in stored:
        print(f"{figures.title(stored)}\n\n{figures.table(stored)}")
        return
    for name, data in stored.items():
        try:
            scores = Scores.from_dict(data)
        except (KeyError, TypeError, ValueError) as error:
            raise TrimError(f"{results} holds no scores of {name!r} ({type(error).__name__} {error})") from error
        _print(scores, name, out=None)
