"""Scenes of any size: the world of :mod:`visiontrim.zoo.scenes` on canvases made of cells of 12 pixels.

A model with dynamic resolution sees a canvas of ``rows`` x ``cols`` cells as that many vision tokens. Objects are as
large as in a scene; there are 4 to 9 of them on 16 x 16 cells (192 x 192 pixels) and fewer on a smaller canvas.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int
from PIL import Image, ImageDraw

from visiontrim.zoo.scenes import (
    COLORS,
    DIGITS,
    LETTERS,
    RGB,
    SHAPES,
    SIZE,
    Object,
    Scene,
    _draw_object,  # how an object looks is the same in both worlds
    _tint,
)

CELL = 12
"""Width of a cell in pixels. Centres of two objects never share a cell."""
OWNED_SHARE = 0.19
"""An object owns a cell when it covers at least this share of it, and more of it than any other object."""

Grid = tuple[int, int]
"""Rows and columns of cells."""


def draw_canvas(seed: int, grid: Grid, most: int = 9, fewest: int = 4) -> Scene:
    """The scene of this seed on ``grid``, always the same one; its ``patch_owner`` and ``patch`` count cells.

    Up to ``fewest`` to ``most`` objects on 256 cells; on a smaller canvas ``most`` shrinks with the area.
    """
    rng = random.Random(f"{seed} {grid}")
    height, width = grid[0] * CELL, grid[1] * CELL
    area = width * height / SIZE**2
    gray = rng.randint(60, 190)
    image = Image.new("RGB", (width, height), _tint(rng, (gray, gray, gray), 18))
    owners = Image.new("L", (width, height), 0)
    canvas, owner_canvas = ImageDraw.Draw(image), ImageDraw.Draw(owners)
    for _ in range(round(rng.randint(3, 12) * area)):
        draw_clutter(rng, canvas, width, height)

    palette = rng.sample(list(COLORS), rng.randint(3, 6))
    shapes = rng.sample(SHAPES, rng.randint(2, 5))
    objects: list[Object] = []
    for _ in range(rng.randint(fewest, max(fewest, round(most * min(1.0, area) + 0.5 * (area < 1))))):
        placed = place_object(rng, objects, palette, shapes, grid)
        if placed is None:  # no room left for an object of this size
            continue
        obj, fill = placed
        objects.append(obj)
        _draw_object(obj, fill, canvas, len(objects), owner_canvas)
    return Scene(add_noise(rng, image), tuple(objects), cell_owner(owners, dict(enumerate(objects, 1)), grid))


def in_square(objects: Sequence[Object], grid: Grid) -> list[Object]:
    """The objects where they would be if the canvas were stretched to a scene: questions measure distances there."""
    rows, cols = grid
    return [dataclasses.replace(o, x=o.x * SIZE / (cols * CELL), y=o.y * SIZE / (rows * CELL)) for o in objects]


def draw_clutter(rng: random.Random, canvas: ImageDraw.ImageDraw, width: int, height: int) -> None:
    """A line or a blob of low saturation, which no question asks about."""
    gray = rng.randint(40, 210)
    fill = _tint(rng, (gray, gray, gray), 15)
    x, y = rng.randint(0, width), rng.randint(0, height)
    right, down = rng.randint(-60, 60), rng.randint(-60, 60)
    if rng.random() < 0.6:
        canvas.line([x, y, x + right, y + down], fill=fill, width=rng.randint(1, 3))
    else:
        canvas.ellipse([x, y, x + abs(right) // 2 + 3, y + abs(down) // 2 + 3], fill=fill)


def place_object(
    rng: random.Random, placed: list[Object], palette: list[str], shapes: list[str], grid: Grid
) -> tuple[Object, RGB] | None:
    """A new object away from those already placed, and its colour with a tint; None if 30 tries found no room."""
    rows, cols = grid
    u = rng.random()
    kind = "digit" if u < 0.25 else "letter" if u < 0.40 else rng.choice(shapes)
    if kind in ("digit", "letter"):
        radius = rng.uniform(6.5, 9)
    else:
        radius = rng.uniform(6, 8.5) if rng.random() < 0.7 else rng.uniform(8.5, 13)
    for _ in range(30):
        # 3 to 9 of 12 pixels into a cell: which cell holds the centre is never a matter of a pixel
        x = CELL * rng.randrange(cols) + rng.uniform(3, 9)
        y = CELL * rng.randrange(rows) + rng.uniform(3, 9)
        inside = min(x, y, cols * CELL - x, rows * CELL - y) > radius
        if inside and all((x - o.x) ** 2 + (y - o.y) ** 2 > (radius + o.radius + 4) ** 2 * 1.15 for o in placed):
            break
    else:
        return None
    color = rng.choice(palette)
    value = {"digit": DIGITS, "letter": LETTERS}.get(kind)
    cell = int(y // CELL) * cols + int(x // CELL)
    obj = Object(kind, color, rng.choice(value) if value else None, x, y, radius, cell)
    return obj, _tint(rng, COLORS[color], 18)


def add_noise(rng: random.Random, image: Image.Image, frame: int = 0) -> Image.Image:
    """Gaussian noise of standard deviation 4, 6 or 8, another one in each ``frame``, and a horizontal ramp of
    brightness."""
    seed = rng.getrandbits(32)
    noise = np.random.default_rng((seed, frame) if frame else seed)
    noise = noise.standard_normal((image.height, image.width, 3), dtype=np.float32)
    ramp = np.linspace(-rng.randint(0, 20), rng.randint(0, 20), image.width)[None, :, None]
    pixels = np.asarray(image) + noise * rng.choice([4, 6, 8]) + ramp
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def cell_owner(owners: Image.Image, objects: Mapping[int, Object], grid: Grid) -> Int[np.ndarray, " cells"]:
    """The object that covers most of each cell, from the picture of object numbers, which start at 1."""
    rows, cols = grid
    cells = np.asarray(owners).reshape(rows, CELL, cols, CELL).swapaxes(1, 2).reshape(rows * cols, CELL * CELL)
    covered = np.stack([(cells == number).sum(1) for number in objects], 1)
    owner = np.where(covered.max(1) >= OWNED_SHARE * CELL**2, np.array([*objects])[covered.argmax(1)], 0)
    for number, obj in objects.items():
        owner[obj.patch] = number
    return owner
