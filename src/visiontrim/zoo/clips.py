"""Clips: canvases on which, from frame to frame, one object moves, one appears and one may vanish.

Background, clutter and light stay, noise is drawn for every frame. No two objects of a clip have the same colour and
kind, so that what moved has a name. Knows no model.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int
from PIL import Image, ImageDraw

from visiontrim.zoo.canvas import CELL, Grid, add_noise, cell_owner, draw_clutter, place_object
from visiontrim.zoo.questions import Question, ask
from visiontrim.zoo.scenes import COLORS, RGB, SHAPES, SIZE, Object, _draw_object, _tint, is_free
from visiontrim.zoo.video import MOTION_TYPES

FRAMES = (4, 8)
"""Frames of a clip, at least and at most."""
OBJECTS = (4, 6)
STEP = 3
"""Cells that an object moves from frame to frame along an axis, at most."""
MOVED = 4
"""Cells between its first and its last place along an axis, at least."""
VANISHING = 0.5
"""Share of the clips in which an object vanishes."""
CLIP_TYPES = ("color", "shape", "read", "exist", *MOTION_TYPES)
"""The first four are about everything that the clip shows in some frame."""


@dataclass(frozen=True, eq=False, slots=True)
class Clip:
    """Frames in order of time, and what they show."""

    images: tuple[Image.Image, ...]
    objects: tuple[Object, ...]
    """Everything that some frame shows, at its last place."""
    moved: int
    """Which of ``objects`` moves."""
    appeared: int
    """Which of them is in the last frame and not in the first one."""
    owner: Int[np.ndarray, "frames cells"]
    """For each cell, row-major, 0 for background or i for ``objects[i - 1]``."""
    middle: Int[np.ndarray, "frames objects"]
    """The cell that holds the middle of each object, -1 where it is not there."""


def draw_clip(seed: int, grid: Grid, frames: int | None = None) -> Clip:
    """The clip of this seed on ``grid``, always the same one; of 4 to 8 ``frames`` by default."""
    rng = random.Random(f"clip {seed} {grid}")
    frames = frames or rng.randint(*FRAMES)
    background = _background(rng, grid)
    while True:
        placed = _objects(rng, grid)
        path = _path(rng, placed[0][0], [obj for obj, _ in placed[1:]], grid, frames)
        if path is not None:
            break
    since = {1: range(rng.randint(1, frames - 1), frames)}
    if rng.random() < VANISHING:
        since[2] = range(rng.randint(1, frames - 1))
    order = rng.sample(range(len(placed)), len(placed))  # nothing is told by which object is drawn first
    images, owners, middle = [], [], []
    light = rng.getrandbits(32)
    for time in range(frames):
        image, regions = background.copy(), Image.new("L", background.size, 0)
        canvas, region_canvas = ImageDraw.Draw(image), ImageDraw.Draw(regions)
        there: dict[int, Object] = {}
        for number, which in enumerate(order, 1):
            if time in since.get(which, range(frames)):
                there[number] = path[time] if which == 0 else placed[which][0]
                _draw_object(there[number], placed[which][1], canvas, number, region_canvas)
        images.append(add_noise(random.Random(light), image, time))
        owners.append(cell_owner(regions, there, grid))
        middle.append([there[number].patch if number in there else -1 for number in range(1, 1 + len(order))])
    objects = [path[-1] if which == 0 else placed[which][0] for which in order]
    return Clip(tuple(images), tuple(objects), order.index(0), order.index(1), np.stack(owners), np.array(middle))


def ask_clip(rng: random.Random, clip: Clip, type: str) -> Question | None:
    """A question of one of CLIP_TYPES with exactly one right answer, or None if the clip allows none."""
    if type not in MOTION_TYPES:
        return ask(rng, clip.objects, type)
    obj = clip.objects[clip.moved if type == "moved" else clip.appeared]
    return Question(type, f"what {type} ?", f"{obj.color} {obj.kind}")


def _background(rng: random.Random, grid: Grid) -> Image.Image:
    height, width = grid[0] * CELL, grid[1] * CELL
    gray = rng.randint(60, 190)
    image = Image.new("RGB", (width, height), _tint(rng, (gray, gray, gray), 18))
    for _ in range(round(rng.randint(3, 12) * width * height / SIZE**2)):
        draw_clutter(rng, ImageDraw.Draw(image), width, height)
    return image


def _objects(rng: random.Random, grid: Grid) -> list[tuple[Object, RGB]]:
    """Objects of different names, none touching another one; at least three."""
    while True:
        palette = rng.sample(list(COLORS), rng.randint(3, 6))
        shapes = rng.sample(SHAPES, rng.randint(2, 5))
        placed: list[tuple[Object, RGB]] = []
        for _ in range(4 * rng.randint(*OBJECTS)):
            if len(placed) == OBJECTS[1]:
                break
            new = place_object(rng, [obj for obj, _ in placed], palette, shapes, grid)
            names = {(obj.color, obj.kind) for obj, _ in placed}
            if new is not None and (new[0].color, new[0].kind) not in names:
                placed.append(new)
        if len(placed) >= OBJECTS[0]:
            return placed[: rng.randint(OBJECTS[0], len(placed))]


def _path(rng: random.Random, obj: Object, others: Sequence[Object], grid: Grid, frames: int) -> list[Object] | None:
    """The object in every frame, by whole cells from one to the next; None if there is no room, or it comes back."""
    rows, cols = grid
    path = [obj]
    for _ in range(frames - 1):
        last = path[-1]
        for _ in range(20):
            right, down = rng.randint(-STEP, STEP), rng.randint(-STEP, STEP)
            x, y = last.x + CELL * right, last.y + CELL * down
            inside = min(x, y, cols * CELL - x, rows * CELL - y) > obj.radius
            if (right or down) and inside and is_free(x, y, obj.radius, others):
                path.append(replace(last, x=x, y=y, patch=last.patch + down * cols + right))
                break
        else:
            return None
    moved = max(abs(path[-1].x - obj.x), abs(path[-1].y - obj.y)) / CELL
    return path if moved > MOVED - 0.5 else None
