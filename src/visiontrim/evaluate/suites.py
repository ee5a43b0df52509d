"""The suites that can be asked by name: the bundled ones, official benchmarks, and files of questions."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from visiontrim.core.errors import TrimError
from visiontrim.evaluate.benchmarks import list_benchmarks, open_benchmark
from visiontrim.evaluate.files import SUFFIXES, FileAnswers, read_items
from visiontrim.evaluate.frames import Frames
from visiontrim.evaluate.items import Item, Suite
from visiontrim.zoo import SPLITS, held_out_canvases, held_out_clips
from visiontrim.zoo.canvas_scores import CANVASES as SIZES
from visiontrim.zoo.canvas_scores import SCENES as NUM_CANVASES
from visiontrim.zoo.canvas_scores import parse_grid
from visiontrim.zoo.clip_scores import CLIP_SIZE
from visiontrim.zoo.clip_scores import CLIPS as NUM_CLIPS
from visiontrim.zoo.natural_questions import LONGEST
from visiontrim.zoo.natural_scenes import NATURAL
from visiontrim.zoo.suite import Sample

SHAPES = "shapes"
"""Name of the suite that the bundled LLaVA answers."""
CANVASES = "canvases"
"""Name of the suite that the bundled Qwen2.5-VL answers."""
CLIPS = "clips"
"""Name of the suite of videos, which the bundled Qwen2.5-VL for videos answers."""
SHAPES_TOKENS = 3
"""Answers of both have at most two words, and an end token; those about natural scenes have more."""
FREE_TOKENS = 32
"""Longest answer to the questions of a file."""


def load_suite(
    suite: str,
    split: str | None = None,
    scenes: int | None = None,
    images: Path | None = None,
    frames: int | None = None,
) -> Suite:
    """A suite by its name.

    The bundled ``"shapes"`` in one of its splits, ``"canvases"`` or ``"clips"`` of one size, an official benchmark as
    ``NAME:ROOT``, or a file or folder of questions. ``scenes`` takes only the questions about the first so many scenes,
    pictures or, of MMBench, questions with their rotations. ``images`` is the folder of the pictures, ``frames`` how
    many of a video are shown. Raises :class:`TrimError` for unknown names and for files that hold no questions.
    """
    if suite == CANVASES:
        split = split or SIZES[0]
        drawn = held_out_canvases(parse_grid(split), scenes or NUM_CANVASES)
        return Suite(f"{CANVASES}/{split}", tuple(map(_drawn, drawn)), SHAPES_TOKENS, unit="canvases")
    if suite == CLIPS:
        split = split or CLIP_SIZE
        drawn = held_out_clips(parse_grid(split), scenes or NUM_CLIPS)
        return Suite(f"{CLIPS}/{split}", tuple(map(_drawn, drawn)), SHAPES_TOKENS, unit="clips")
    if suite == SHAPES:
        split = split or "standard"
        if split not in SPLITS:
            raise TrimError(f"there is no split {split!r}: choose {', '.join(SPLITS)}")
        longest = LONGEST if split == NATURAL.name else SHAPES_TOKENS
        return Suite(f"{SHAPES}/{split}", tuple(shapes(split, scenes)), longest, unit="scenes")
    if split is not None:
        raise TrimError(f"--split is of {SHAPES}, {CANVASES} and {CLIPS}, not of {suite}: leave it away")
    if suite.partition(":")[0] in list_benchmarks():
        return _benchmark(suite, scenes, images, frames)
    path = Path(suite)
    if not (path.suffix in SUFFIXES or path.is_dir()):
        names = ", ".join(list_benchmarks())
        raise TrimError(
            f"there is no suite {suite!r}: choose {SHAPES}, {CANVASES} or {CLIPS}, a benchmark as NAME:ROOT ({names}), "
            "or give a file FILE.jsonl of questions"
        )
    items = first_groups(read_items(path, images), scenes)
    if not items:
        raise TrimError(f"{suite} holds no questions about pictures")
    return Suite(path.name, items, FREE_TOKENS, FileAnswers())


def _benchmark(suite: str, scenes: int | None, images: Path | None, frames: int | None) -> Suite:
    benchmark, files = open_benchmark(suite, images)
    items = first_groups(benchmark.read(files), scenes)
    if not items:
        raise TrimError(f"{suite} holds no questions: get a new copy of its files")
    if files.lacking and not any(item.answers for item in items):
        raise TrimError(files.lacking[0])
    notes = (*benchmark.notes(items), *files.lacking)
    if frames is not None:
        items = tuple(_shortened(item, frames) for item in items)
    return Suite(benchmark.name, items, benchmark.max_new_tokens, benchmark, notes, benchmark.unit)


def _shortened(item: Item, frames: int) -> Item:
    sources = [replace(one, count=frames) if isinstance(one, Frames) else one for one in item.sources]
    return replace(item, sources=tuple(sources))


def first_groups(items: Iterable[Item], groups: int | None = None, questions: int | None = None) -> tuple[Item, ...]:
    """All questions of the first so many groups, or of as many groups as give at least so many questions."""
    items = tuple(items)
    sizes: dict[str, int] = {}
    for item in items:
        sizes[item.group] = sizes.get(item.group, 0) + 1
    kept = list(sizes) if groups is None else list(itertools.islice(sizes, groups))
    if questions is not None:
        before = itertools.accumulate((sizes[group] for group in kept), initial=0)
        kept = [group for group, count in zip(kept, before, strict=False) if count < questions]
    chosen = set(kept)
    return tuple(item for item in items if item.group in chosen)


def check_pictures(items: Sequence[Item]) -> None:
    """Raise :class:`TrimError` where pictures or videos of the questions are not there: before a model is loaded."""
    paths: dict[Path, None] = {}
    for item in items:
        for source in item.sources:
            if isinstance(source, Frames):
                paths[source.path] = None
            elif isinstance(source, str) and "://" not in source:
                paths[Path(source)] = None
    lacking = [path for path in paths if not path.exists()]
    if lacking:
        raise TrimError(
            f"{len(lacking):,} of {len(paths):,} pictures or videos are missing, the first is {lacking[0]}: --images "
            "DIR says where they are"
        )


def slug(suite: Suite, name: str) -> str:
    """A name for a folder that is this suite's alone; ``name`` is how it was asked for."""
    path = Path(name)
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", suite.name).strip("-.") or "suite"
    if path.exists():
        return f"{plain}-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:6]}"
    return plain


def shapes(split: str, scenes: int | None = None) -> Iterator[Item]:
    """The questions of a split of the bundled suite, drawn as they are needed."""
    return map(_drawn, SPLITS[split].samples(scenes))


def _drawn(sample: Sample) -> Item:
    group = str(sample.scene_seed)
    name = f"{group}/{sample.type}/{len(sample.earlier) or sample.number}"
    return Item(name, group, sample.images, sample.question, (sample.answer,), sample.type, sample.prompt)
