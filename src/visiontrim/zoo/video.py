"""Videos: a few frames of one scene in which one object moves on from frame to frame and another one appears."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from visiontrim.zoo.questions import Question, ask
from visiontrim.zoo.scenes import (
    GRID,
    PATCH,
    STANDARD,
    Object,
    Scene,
    draw_background,
    is_free,
    margin_of,
    paint,
    place_objects,
)

FRAMES = 4
MOTION_TYPES = ("moved", "appeared")
"""what moved ? / what appeared ?  The answer is a colour and a kind that no other object has together."""
VIDEO_TYPES = ("color", "shape", "read", "exist", *MOTION_TYPES)
"""The first four are asked about the last frame, which holds every object, and are true of the others as far as these
show the object."""
STEP = (2, 4)
"""By how many patches the object moves between two frames, at least and at most, along one axis or both."""


@dataclass(frozen=True, eq=False, slots=True)
class Video:
    """Frames in order of time."""

    frames: tuple[Scene, ...]
    moved: Object
    """As it is in the last frame."""
    appeared: Object
    """It is in the last frame and not in the first one."""


def draw_video(seed: int, frames: int = FRAMES) -> Video:
    """The video of this seed, always the same one: background and clutter stay, noise is drawn for every frame."""
    rng = random.Random(f"video {seed}")
    background = draw_background(rng, STANDARD)
    while True:
        placed = place_objects(rng, STANDARD)
        names = Counter((obj.color, obj.kind) for obj, _ in placed)
        named = [n for n, (obj, _) in enumerate(placed) if names[obj.color, obj.kind] == 1]
        if len(named) < 2:
            continue
        mover, comer = rng.sample(named, 2)
        others = [obj for n, (obj, _) in enumerate(placed) if n != mover]
        path = _path(rng, placed[mover][0], others, frames)
        if path is not None:
            break
    since = rng.randint(1, frames - 1)
    scenes = []
    for number, obj in enumerate(path):
        there = [*placed]
        there[mover] = (obj, placed[mover][1])
        if number < since:
            del there[comer]
        noise = np.random.default_rng((seed, number))
        scenes.append(paint(random.Random(f"video {seed} brightness"), noise, background, there))
    return Video(tuple(scenes), path[-1], placed[comer][0])


def _path(rng: random.Random, obj: Object, others: Sequence[Object], frames: int) -> list[Object] | None:
    """The object in every frame, by whole patches from one to the next; None if there is no room to go on."""
    path = [obj]
    margin = margin_of(obj.radius)
    for _ in range(frames - 1):
        for _ in range(30):
            right, down = rng.randint(-STEP[1], STEP[1]), rng.randint(-STEP[1], STEP[1])
            row, column = divmod(path[-1].patch, GRID)
            inside = all(margin <= place < GRID - margin for place in (row + down, column + right))
            x, y = path[-1].x + PATCH * right, path[-1].y + PATCH * down
            if max(abs(right), abs(down)) >= STEP[0] and inside and is_free(x, y, obj.radius, others):
                path.append(replace(obj, x=x, y=y, patch=(row + down) * GRID + column + right))
                break
        else:
            return None
    return path


def ask_video(rng: random.Random, video: Video, type: str) -> Question | None:
    """A question of one of VIDEO_TYPES with exactly one right answer, or None if the video allows none."""
    if type not in MOTION_TYPES:
        return ask(rng, video.frames[-1].objects, type)
    obj = video.moved if type == "moved" else video.appeared
    return Question(type, f"what {type} ?", f"{obj.color} {obj.kind}")
