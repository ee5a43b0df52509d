"""Scores of the small Qwen2.5-VL for videos on clips of one size, beside what guessing gives."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from visiontrim.methods.evs import EVS
from visiontrim.zoo.canvas import Grid
from visiontrim.zoo.clips import CLIP_TYPES, ask_clip, draw_clip
from visiontrim.zoo.evaluate import BLIND_SCENES, Progressing, Scores, compare, controls, most_frequent
from visiontrim.zoo.questions import Question
from visiontrim.zoo.suite import Sample
from visiontrim.zoo.watching import held_out_clips

CLIP_SIZE = "12x12"
"""Rows and columns of the frames that are scored by default."""
CLIPS = 40
"""Clips that are scored by default."""


def blind_clip_answers(samples: Sequence[Sample], grid: Grid, clips: int = BLIND_SCENES // 4) -> list[str]:
    """The most frequent answer to each question about training clips of ``grid``; to an unseen one that of its type."""

    def asked() -> Iterator[Question | None]:
        for seed in range(clips):
            clip = draw_clip(seed, grid)
            rng = random.Random(f"{seed} {grid} blind")
            yield from (ask_clip(rng, clip, type) for type in CLIP_TYPES)

    return most_frequent(asked(), samples)


def clip_report(
    bundle: Any,
    grid: Grid,
    num_clips: int,
    keep: int,
    control_clips: int,
    progress: Progressing = lambda *_: None,
) -> Scores:
    """Score a model, as :func:`visiontrim.zoo.load_video` loads it, on held-out clips: stock ``generate()``.

    On the first ``control_clips`` also with the controls and with ``evs``, all with ``keep`` tokens of a clip.
    ``progress`` hears how many questions are answered, of how many.
    """
    samples = list(held_out_clips(grid, num_clips))
    ways = controls(keep, bundle.model.config.text_config.num_hidden_layers)
    ways[f"evs {keep}"] = lambda _: EVS(keep=keep)
    return compare(bundle, samples, ways, blind_clip_answers(samples, grid), control_clips, progress)
