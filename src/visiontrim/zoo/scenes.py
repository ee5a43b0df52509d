"""Procedural scenes: the pictures that the bundled models were trained on and are tested with.

A scene has 192 x 192 pixels, 24 x 24 = 576 patches of 8 pixels: a muted noisy background, clutter of low saturation and
coloured objects, each a shape, a digit or a letter: 4 to 9 in the standard world, up to 14 smaller ones in the hard
world and up to 23 in the dense one, many of them alike in colour or kind. All objects together cover about one patch in
twenty, so an answer dies when the wrong tokens are removed. Besides the pixels a scene knows which object owns which
patch.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int
from PIL import Image, ImageDraw, ImageFont

SIZE, PATCH = 192, 8
GRID = SIZE // PATCH

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (45, 80, 225),
    "yellow": (235, 215, 45),
    "purple": (150, 50, 190),
    "orange": (245, 140, 30),
    "cyan": (50, 205, 215),
    "pink": (245, 130, 190),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "diamond", "cross", "star")
DIGITS = tuple("0123456789")
LETTERS = tuple("ACHKTX")
KINDS = (*SHAPES, "digit", "letter")

FONT = Path(__file__).parent / "DejaVuSans-Bold-subset.ttf"
"""DejaVu Sans Bold, only the glyphs of DIGITS and LETTERS: scenes do not depend on the fonts of a system."""

MIN_OWNED_PIXELS = 12
"""An object owns a patch when it covers at least this many of its 64 pixels, and more of them than any other object."""

Range = tuple[float, float]
RGB = tuple[int, int, int]
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Object:
    """One coloured object; lengths in pixels, y points down."""

    kind: str
    """One of KINDS."""
    color: str
    """A key of COLORS."""
    value: str | None
    """The character of a digit or letter, None for a shape."""
    x: float
    y: float
    radius: float
    patch: int
    """Row-major index of the patch that holds the centre; the object always owns it."""

    @property
    def phrase(self) -> str:
        """The object in words of the vocabulary, as the text tower was trained on it: "a red digit 7"."""
        return f"a {self.color} {self.kind}" + (f" {self.value}" if self.value else "")


@dataclass(frozen=True, eq=False, slots=True)
class Scene:
    """A picture and what is in it."""

    image: Image.Image
    """RGB, 192 x 192."""
    objects: tuple[Object, ...]
    patch_owner: Int[np.ndarray, " patches"]
    """For each patch, row-major, 0 for background or i for ``objects[i - 1]``; [576] integers."""


@dataclass(frozen=True, slots=True)
class World:
    """What the scenes of a kind have in common; lengths in pixels, ranges include their ends."""

    name: str
    objects: tuple[int, int] = (4, 9)
    clutter: tuple[int, int] = (3, 12)
    """Lines and blobs of low saturation."""
    character_radius: Range = (6.5, 9)
    small_radius: Range = (6, 8.5)
    """Of seven shapes in ten."""
    large_radius: Range = (8.5, 13)
    alike: float = 0.0
    """Share of the objects that repeat the colour or the kind of an earlier one, but not both."""


STANDARD = World("standard")
HARD = World("hard", (9, 14), (8, 20), (5, 6.5), (4.5, 6), (6, 7.5), 0.5)
"""Three in ten of the training scenes."""
DENSE = World("dense", (16, 23), (14, 28), (4.25, 5.25), (3.75, 4.75), (4.75, 6), 0.75)
"""Only tested with: more and smaller objects, more clutter and more that is alike than training shows."""
WORLDS = {world.name: world for world in (STANDARD, HARD, DENSE)}

Placed = tuple[Object, RGB]
"""An object with its colour in the picture."""


def draw_scene(seed: int, world: World = STANDARD) -> Scene:
    """The scene of this seed in this world, always the same one."""
    rng = random.Random(seed if world == STANDARD else f"{world.name} {seed}")
    background = draw_background(rng, world)
    return paint(rng, np.random.default_rng(seed), background, place_objects(rng, world))


def draw_background(rng: random.Random, world: World) -> Image.Image:
    """A muted plain with clutter."""
    gray = rng.randint(60, 190)
    image = Image.new("RGB", (SIZE, SIZE), _tint(rng, (gray, gray, gray), 18))
    canvas = ImageDraw.Draw(image)
    for _ in range(rng.randint(*world.clutter)):
        _draw_clutter(rng, canvas)
    return image


def place_objects(rng: random.Random, world: World) -> list[Placed]:
    """As many objects as the world wants and have room, none touching another one."""
    palette = rng.sample(list(COLORS), rng.randint(3, 6))
    shapes = rng.sample(SHAPES, rng.randint(2, 5))
    placed: list[Placed] = []
    for _ in range(rng.randint(*world.objects)):
        new = _place_object(rng, world, [obj for obj, _ in placed], palette, shapes)
        if new is not None:  # else no room is left for an object of this size
            placed.append(new)
    return placed


def paint(
    rng: random.Random, noise_rng: np.random.Generator, background: Image.Image, placed: Sequence[Placed]
) -> Scene:
    """The scene with these objects in front of ``background``."""
    image = background.copy()
    # Every object is painted a second time, its number as the colour, to know afterwards which pixels are its own.
    owners = Image.new("L", (SIZE, SIZE), 0)
    canvas, owner_canvas = ImageDraw.Draw(image), ImageDraw.Draw(owners)
    for number, (obj, fill) in enumerate(placed, 1):
        _draw_object(obj, fill, canvas, number, owner_canvas)
    objects = [obj for obj, _ in placed]
    return Scene(_add_noise(rng, noise_rng, image), tuple(objects), _patch_owner(owners, objects))


def _tint(rng: random.Random, color: RGB, amount: int) -> RGB:
    """``color`` with each channel moved by up to ``amount``."""
    r, g, b = (max(0, min(255, channel + rng.randint(-amount, amount))) for channel in color)
    return r, g, b


def _draw_clutter(rng: random.Random, canvas: ImageDraw.ImageDraw) -> None:
    """A line or a blob of low saturation, which no question asks about."""
    gray = rng.randint(40, 210)
    fill = _tint(rng, (gray, gray, gray), 15)
    x, y = rng.randint(0, SIZE), rng.randint(0, SIZE)
    width, height = rng.randint(-60, 60), rng.randint(-60, 60)
    if rng.random() < 0.6:
        canvas.line([x, y, x + width, y + height], fill=fill, width=rng.randint(1, 3))
    else:
        canvas.ellipse([x, y, x + abs(width) // 2 + 3, y + abs(height) // 2 + 3], fill=fill)


def _place_object(
    rng: random.Random, world: World, placed: list[Object], palette: list[str], shapes: list[str]
) -> Placed | None:
    """A new object away from those already placed, and its colour with a tint; None if 30 tries found no room."""
    u = rng.random()
    kind = "digit" if u < 0.25 else "letter" if u < 0.40 else rng.choice(shapes)
    color = None
    if placed and world.alike and rng.random() < world.alike:
        other = rng.choice(placed)
        if rng.random() < 0.5:
            kind, color = other.kind, rng.choice([name for name in palette if name != other.color])
        elif kind != other.kind:
            color = other.color
    if kind in ("digit", "letter"):
        radius = rng.uniform(*world.character_radius)
    else:
        radius = rng.uniform(*(world.small_radius if rng.random() < 0.7 else world.large_radius))
    margin = margin_of(radius)
    for _ in range(30):
        # 2 to 6 of 8 pixels into a patch: which patch holds the centre is never a matter of a pixel
        x = PATCH * rng.randint(margin, GRID - 1 - margin) + rng.uniform(2, 6)
        y = PATCH * rng.randint(margin, GRID - 1 - margin) + rng.uniform(2, 6)
        if is_free(x, y, radius, placed):
            break
    else:
        return None
    color = color or rng.choice(palette)
    fill = _tint(rng, COLORS[color], 18)
    value = {"digit": DIGITS, "letter": LETTERS}.get(kind)
    patch = int(y // PATCH) * GRID + int(x // PATCH)
    return Object(kind, color, rng.choice(value) if value else None, x, y, radius, patch), fill


def margin_of(radius: float) -> int:
    """Patches between the centre of an object and the border of the picture."""
    return 2 if radius > PATCH else 1


def is_free(x: float, y: float, radius: float, objects: Sequence[Object]) -> bool:
    """Whether an object would keep its distance from others."""
    return all((x - o.x) ** 2 + (y - o.y) ** 2 > (radius + o.radius + 4) ** 2 * 1.15 for o in objects)


def _draw_object(
    obj: Object, fill: RGB, canvas: ImageDraw.ImageDraw, number: int, owner_canvas: ImageDraw.ImageDraw
) -> None:
    """Paint ``obj`` in ``fill`` and its region in ``number``; the region of a character is its bounding box."""
    x, y, r = obj.x, obj.y, obj.radius
    if obj.value:
        font = _font(int(r * 2.1))
        left, top, right, bottom = font.getbbox(obj.value)
        x0, y0 = x - (left + right) / 2, y - (top + bottom) / 2
        canvas.text((x0, y0), obj.value, font=font, fill=fill)
        owner_canvas.rectangle([x0 + left, y0 + top, x0 + right, y0 + bottom], fill=number)
    elif obj.kind == "circle":
        canvas.ellipse([x - r, y - r, x + r, y + r], fill=fill)
        owner_canvas.ellipse([x - r, y - r, x + r, y + r], fill=number)
    else:
        corners = [(x + r * dx, y + r * dy) for dx, dy in _OUTLINES[obj.kind]]
        canvas.polygon(corners, fill=fill)
        owner_canvas.polygon(corners, fill=number)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # Pillow's basic layout, because not every build of Pillow has the other one.
    return ImageFont.truetype(str(FONT), size, layout_engine=ImageFont.Layout.BASIC)


def _star() -> list[Point]:
    radii = (1.1, 0.48)  # tips and inner corners
    return [(radii[i % 2] * math.sin(i * math.pi / 5), -radii[i % 2] * math.cos(i * math.pi / 5)) for i in range(10)]


_ARM = 0.38  # half the width of the arms of a cross
_OUTLINES: dict[str, list[Point]] = {
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "diamond": [(0, -1.1), (0.85, 0), (0, 1.1), (-0.85, 0)],
    "triangle": [(0, -1), (1, 0.85), (-1, 0.85)],
    "cross": [
        *((-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)),
        *((_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)),
    ],
    "star": _star(),
}
"""Corners of the shapes for radius 1 around the origin."""


def _add_noise(rng: random.Random, noise_rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """Gaussian noise of standard deviation 4, 6 or 8 and a horizontal ramp of brightness."""
    noise = noise_rng.normal(0, 8, (SIZE, SIZE, 3)).astype(np.int16)
    eighths = rng.choice([4, 6, 8])
    ramp = np.linspace(-rng.randint(0, 20), rng.randint(0, 20), SIZE)[None, :, None]
    pixels = np.asarray(image).astype(np.int16) + noise * eighths // 8 + ramp
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _patch_owner(owners: Image.Image, objects: list[Object]) -> Int[np.ndarray, " patches"]:
    """The object that covers most of each patch, from the picture of object numbers."""
    patches = np.asarray(owners).reshape(GRID, PATCH, GRID, PATCH).swapaxes(1, 2).reshape(GRID * GRID, PATCH * PATCH)
    covered = np.stack([(patches == number).sum(1) for number in range(1, len(objects) + 1)], 1)
    owner = np.where(covered.max(1) >= MIN_OWNED_PIXELS, covered.argmax(1) + 1, 0)
    for number, obj in enumerate(objects, 1):
        owner[obj.patch] = number
    return owner
