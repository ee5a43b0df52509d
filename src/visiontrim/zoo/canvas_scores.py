"""Scores of the small Qwen2.5-VL on canvases of one size, beside what guessing gives."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from visiontrim.core.errors import TrimError
from visiontrim.methods.visiontrim import VisionTrim
from visiontrim.zoo.canvas import Grid, draw_canvas, in_square
from visiontrim.zoo.dynamic import QWEN_TYPES, held_out_canvases
from visiontrim.zoo.evaluate import BLIND_SCENES, Progressing, Scores, Tally, compare, controls, most_frequent
from visiontrim.zoo.questions import TYPES, Question, ask
from visiontrim.zoo.suite import Sample

CANVASES = ("16x16", "12x16", "12x12", "14x18")
"""The sizes that are scored by default, rows x columns of cells."""
SCENES = 60
"""Canvases of each size that are scored by default."""


def parse_grid(text: str) -> Grid:
    """``"16x12"`` as rows and columns of cells. Raises :class:`TrimError` for anything else, or under 8 x 8 cells."""
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) >= 8 for part in parts):
        raise TrimError(f"canvas {text!r} is no size: give rows and columns of cells, both 8 or more, such as 16x12")
    return int(parts[0]), int(parts[1])


def blind_canvas_answers(samples: Sequence[Sample], grid: Grid) -> list[str]:
    """The most frequent answer to each question on training canvases of ``grid``; to an unseen one that of its type."""

    def asked() -> Iterator[Question | None]:
        for seed in range(BLIND_SCENES):
            objects = in_square(draw_canvas(seed, grid).objects, grid)
            rng = random.Random(f"{seed} {grid} blind")
            yield from (ask(rng, objects, type) for type in QWEN_TYPES)

    return most_frequent(asked(), samples)


def canvas_report(
    bundle: Any,
    grid: Grid,
    num_scenes: int,
    keep: int,
    control_scenes: int,
    progress: Progressing = lambda *_: None,
) -> Scores:
    """Score a model, as :func:`visiontrim.zoo.load_qwen` loads it, on held-out canvases: stock ``generate()``.

    On the first ``control_scenes`` also with the controls and VisionTrim. ``progress`` hears how many questions are
    answered, of how many.
    """
    samples = list(held_out_canvases(grid, num_scenes))
    ways = controls(keep, bundle.model.config.text_config.num_hidden_layers)
    ways[f"visiontrim {keep}"] = lambda _: VisionTrim(keep=keep)
    ways[f"visiontrim {keep}, both stages"] = lambda _: VisionTrim(keep=keep, stages="both")
    return compare(bundle, samples, ways, blind_canvas_answers(samples, grid), control_scenes, progress)


def pooled(scores: Sequence[Scores]) -> Scores:
    """The scores of canvases of several sizes, as one; types in order of TYPES."""
    tallies: dict[str, Tally] = {}
    for way in scores[0].tallies:
        types = dict.fromkeys(type for one in scores for type in one.tallies[way] if type != "all")
        rows = {
            type: [one.tallies[way].get(type, (0, 0)) for one in scores]
            for type in (*sorted(types, key=TYPES.index), "all")
        }
        tallies[way] = {type: (sum(n[0] for n in row), sum(n[1] for n in row)) for type, row in rows.items()}
    return Scores(sum(one.scenes for one in scores), tallies)
