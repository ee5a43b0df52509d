"""Scenes nearer to photographs: the pictures of the natural world, for the model that goes with it.

A background with the spectrum of natural images (as much contrast in every octave), colour, gradients and clutter;
3 to 6 shaded objects that may cover one another in part: most of them of 20 to 150 patches, beside one or two small
ones, and strings of two to four characters. Pixels come from integers and the fixed-point resampling of Pillow, so that
they are the same everywhere. Nothing here knows of questions.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from PIL import Image, ImageDraw

from visiontrim.zoo.scenes import (
    _OUTLINES,
    COLORS,
    DIGITS,
    GRID,
    LETTERS,
    MIN_OWNED_PIXELS,
    PATCH,
    RGB,
    SHAPES,
    SIZE,
    Object,
    Range,
    Scene,
    World,
    _draw_clutter,
    _font,
    _tint,
)

STRING = "string"
"""A kind of its own: two to four characters beside each other in one colour; its value is "7A3"."""

NATURAL = World("natural", (3, 6), (4, 14), (7, 10), (17, 28), (28, 44), 0.3)
"""``character_radius`` is that of small objects, of every kind; ``small_radius`` and ``large_radius`` of the others."""

LARGE_CHARACTER: Range = (9, 13)
"""Of digits and letters that are not small."""
STRING_RADIUS: Range = (7.5, 9.5)
"""Of each character of a string."""
STEP = 0.95
"""From one character of a string to the next, in font sizes."""
STRINGS = 0.55
"""Share of the scenes with a string."""
OVERLAP = 0.7
"""Centres keep this share of the sum of two radii between them: less than 1, so that objects may cover each other."""
OCTAVES = (3, 6, 12, 24, 48, 96)
"""Cells a side of the noise that a background is the sum of."""
TEXTURES = 24
"""Different ones; a background is a piece of three."""


@dataclass(frozen=True, eq=False, slots=True)
class NaturalScene(Scene):
    """A scene in which a patch may show one character of a string."""

    patch_character: tuple[str, ...] = ()
    """For each patch the character that it shows, "" for none."""
    patch_middle: Float[np.ndarray, "patches 2"] | None = None
    """For each patch x and y in pixels: the centre of its object, or of its character, or of the patch itself."""


@dataclass(frozen=True, slots=True)
class Glyph:
    """A character of a string, in pixels."""

    character: str
    x: float
    y: float
    radius: float


def draw_natural(seed: int) -> NaturalScene:
    """The natural scene of this seed, always the same one."""
    rng, noise = random.Random(f"{NATURAL.name} {seed}"), np.random.default_rng(seed)
    pixels = _background(rng)
    placed = _place(seed)
    owners = np.zeros((SIZE, SIZE), np.int16)
    letters = np.zeros((SIZE, SIZE), np.int16)
    glyphs: list[Glyph] = []
    for number, (obj, fill) in enumerate(placed, 1):
        shade = _shade(rng)
        own = glyphs_of(obj)
        for one in own or [None]:
            ink, region = _masks(obj, one)
            pixels[ink] = np.asarray(fill, np.float32) * shade[ink][:, None]
            owners[region] = number
            letters[region] = 0
            if one is not None:
                glyphs.append(one)
                letters[region] = len(glyphs)
    pixels += noise.standard_normal(pixels.shape, dtype=np.float32) * np.float32(rng.choice([3, 5, 7]))
    image = Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
    objects = tuple(obj for obj, _ in placed)
    owner = _owner(owners, objects)
    character, middle = _facts(owner, letters, objects, glyphs)
    return NaturalScene(image, objects, owner, character, middle)


def natural_objects(seed: int) -> tuple[Object, ...]:
    """The objects of this scene, without its picture."""
    return tuple(obj for obj, _ in _place(seed))


def glyphs_of(obj: Object) -> list[Glyph]:
    """The characters of a string, from left to right; none of any other object."""
    if obj.kind != STRING:
        return []
    size = _height(obj)
    step = STEP * size
    first = obj.x - step * (len(obj.value or "") - 1) / 2
    return [Glyph(c, first + step * n, obj.y, size / 2.1) for n, c in enumerate(obj.value or "")]


def _height(obj: Object) -> float:
    """Font size of a string, of whose box ``radius`` is half the width."""
    return obj.radius * 2 / (STEP * len(obj.value or "") + 0.1)


@functools.cache
def _texture(number: int, octaves: int) -> Float[np.ndarray, "384 384"]:
    """Noise with almost as much contrast in every octave; standard deviation about 1."""
    noise = np.random.default_rng((number, octaves))
    total = np.zeros((2 * SIZE, 2 * SIZE), np.float32)
    for cells in OCTAVES[-octaves:]:
        small = Image.fromarray(noise.integers(0, 256, (2 * cells, 2 * cells), dtype=np.uint8))
        whole = np.asarray(small.resize((2 * SIZE, 2 * SIZE), Image.Resampling.BICUBIC), np.float32)
        total += (whole - 127.5) * 0.85 ** OCTAVES.index(cells)
    return total / (45 * sum(0.85 ** (2 * OCTAVES.index(cells)) for cells in OCTAVES[-octaves:]) ** 0.5)


def _fractal(rng: random.Random, octaves: int = len(OCTAVES)) -> Float[np.ndarray, "192 192"]:
    """A piece of one of a few textures, mirrored and turned."""
    x, y = rng.randrange(SIZE), rng.randrange(SIZE)
    piece = _texture(rng.randrange(TEXTURES), octaves)[y : y + SIZE, x : x + SIZE]
    piece = piece[:: rng.choice((1, -1)), :: rng.choice((1, -1))]
    return piece.T if rng.random() < 0.5 else piece


def _background(rng: random.Random) -> Float[np.ndarray, "192 192 3"]:
    """Colour, a gradient, clutter, and texture."""
    gray = rng.randint(60, 190)
    image = Image.new("RGB", (SIZE, SIZE), _tint(rng, (gray, gray, gray), 30))
    canvas = ImageDraw.Draw(image)
    for _ in range(rng.randint(*NATURAL.clutter)):
        _draw_clutter(rng, canvas)
    pixels = np.asarray(image).astype(np.float32)
    light = _fractal(rng) * np.float32(rng.randint(6, 20))
    light += _SLOPE[None] * np.float32(rng.randint(-35, 35)) + _SLOPE[:, None] * np.float32(rng.randint(-35, 35))
    warm, green = (_fractal(rng) * np.float32(rng.randint(2, most)) for most in (10, 6))
    pixels[..., 0] += light + warm
    pixels[..., 1] += light + green
    pixels[..., 2] += light - warm
    return pixels


def _shade(rng: random.Random) -> Float[np.ndarray, "192 192"]:
    """What the colour of an object is multiplied with: light from a side and a faint texture."""
    across, down = rng.uniform(-0.25, 0.25), rng.uniform(-0.25, 0.25)
    texture = _fractal(rng, 3) * np.float32(rng.uniform(0.02, 0.07))
    return 1 + _SLOPE[None] * np.float32(across) + _SLOPE[:, None] * np.float32(down) + texture


_SLOPE = np.linspace(-1, 1, SIZE, dtype=np.float32)
Placed = tuple[Object, RGB]


def _place(seed: int) -> list[Placed]:
    """Objects, large ones first: what is drawn later may cover a part of what was drawn before."""
    rng = random.Random(f"{NATURAL.name} {seed} objects")
    palette = rng.sample(list(COLORS), rng.randint(4, 7))
    shapes = rng.sample(SHAPES, rng.randint(3, 6))
    total = rng.randint(*NATURAL.objects)
    small = rng.choice((1, 1, 2))
    large = rng.choice((0, 1, 1))
    sizes = [NATURAL.large_radius] * large + [NATURAL.small_radius] * (total - small - large)
    kinds = ["" for _ in sizes] + ["" for _ in range(small)]
    if rng.random() < STRINGS:
        kinds[min(large, len(kinds) - 1)] = STRING
    placed: list[Placed] = []
    for wanted, size in zip(kinds, sizes + [NATURAL.character_radius] * small, strict=True):
        new = _one(rng, wanted, size, [obj for obj, _ in placed], palette, shapes)
        if new is not None:
            placed.append((new, _tint(rng, COLORS[new.color], 18)))
    return placed


def _one(
    rng: random.Random, kind: str, size: Range, placed: list[Object], palette: list[str], shapes: list[str]
) -> Object | None:
    """A new object; None if 60 tries found no room."""
    u = rng.random()
    kind = kind or ("digit" if u < 0.18 else "letter" if u < 0.3 else rng.choice(shapes))
    color = None
    others = [obj for obj in placed if obj.kind != STRING]
    if others and kind != STRING and rng.random() < NATURAL.alike:
        other = rng.choice(others)
        if rng.random() < 0.5:
            kind, color = other.kind, rng.choice([name for name in palette if name != other.color])
        elif kind != other.kind:
            color = other.color
    color = color or rng.choice(palette)
    value = {"digit": DIGITS, "letter": LETTERS}.get(kind)
    text = rng.choice(value) if value else None
    radius = rng.uniform(*(LARGE_CHARACTER if text and size != NATURAL.character_radius else size))
    height = radius
    if kind == STRING:
        text = "".join(rng.choice(DIGITS + LETTERS) for _ in range(rng.choice((2, 2, 3, 3, 4))))
        height = rng.uniform(*STRING_RADIUS)
        radius = height * 2.1 * (STEP * len(text) + 0.1) / 2
    for _ in range(60):
        x = rng.uniform(radius * 1.05 + 2, SIZE - radius * 1.05 - 2)
        y = rng.uniform(height * 1.1 + 2, SIZE - height * 1.1 - 2)
        patch = int(y // PATCH) * GRID + int(x // PATCH)
        new = Object(kind, color, text, x, y, radius, patch)
        if all(_apart(new, other) for other in placed):
            return new
    return None


def _apart(new: Object, other: Object) -> bool:
    """Whether most of both can be seen: strings and small objects are never covered."""
    if STRING in (new.kind, other.kind):
        tall = [o.radius if o.kind != STRING else _height(o) / 2 for o in (new, other)]
        return abs(new.x - other.x) > new.radius + other.radius + 2 or abs(new.y - other.y) > sum(tall) + 3
    far = ((new.x - other.x) ** 2 + (new.y - other.y) ** 2) ** 0.5
    both = new.radius + other.radius
    if min(new.radius, other.radius) < 14:
        return far > both * 1.1 + 2
    return far > max(OVERLAP * both, 1.1 * max(new.radius, other.radius) + 4)


def _masks(obj: Object, glyph: Glyph | None) -> tuple[np.ndarray, np.ndarray]:
    """Pixels that are painted, and those that count as the object's: of a character its bounding box."""
    ink, region = Image.new("1", (SIZE, SIZE)), Image.new("1", (SIZE, SIZE))
    canvas, box = ImageDraw.Draw(ink), ImageDraw.Draw(region)
    one = glyph or (Glyph(obj.value, obj.x, obj.y, obj.radius) if obj.value else None)
    if one is not None:
        font = _font(int(one.radius * 2.1))
        left, top, right, bottom = font.getbbox(one.character)
        x0, y0 = one.x - (left + right) / 2, one.y - (top + bottom) / 2
        canvas.text((x0, y0), one.character, font=font, fill=1)
        box.rectangle([x0 + left, y0 + top, x0 + right, y0 + bottom], fill=1)
    elif obj.kind == "circle":
        r = obj.radius
        canvas.ellipse([obj.x - r, obj.y - r, obj.x + r, obj.y + r], fill=1)
        region = ink
    else:
        canvas.polygon([(obj.x + obj.radius * dx, obj.y + obj.radius * dy) for dx, dy in _OUTLINES[obj.kind]], fill=1)
        region = ink
    return np.asarray(ink), np.asarray(region)


def _owner(owners: np.ndarray, objects: Sequence[Object]) -> Int[np.ndarray, " patches"]:
    """The object that covers most of each patch, and enough of it; that of the centre is always the object's."""
    patches = owners.reshape(GRID, PATCH, GRID, PATCH).swapaxes(1, 2).reshape(GRID * GRID, PATCH * PATCH)
    covered = np.stack([(patches == number).sum(1) for number in range(1, len(objects) + 1)], 1)
    owner = np.where(covered.max(1) >= MIN_OWNED_PIXELS, covered.argmax(1) + 1, 0)
    for number, obj in enumerate(objects, 1):
        owner[obj.patch] = number
    return owner


def _facts(
    owner: np.ndarray, letters: np.ndarray, objects: Sequence[Object], glyphs: Sequence[Glyph]
) -> tuple[tuple[str, ...], Float[np.ndarray, "patches 2"]]:
    """The character of each patch, and the middle of what it shows."""
    column, row = np.meshgrid(np.arange(GRID), np.arange(GRID))
    middle = PATCH * (np.stack([column, row], -1).reshape(-1, 2) + 0.5)
    inside = letters.reshape(GRID, PATCH, GRID, PATCH).swapaxes(1, 2).reshape(GRID * GRID, PATCH * PATCH)
    character = []
    for patch, number in enumerate(owner):
        obj = objects[number - 1] if number else None
        found = ""
        if obj is not None:
            found, middle[patch] = obj.value or "", (obj.x, obj.y)
            if obj.kind == STRING:
                count = np.bincount(inside[patch], minlength=1 + len(glyphs))[1:]
                nearest = int(count.argmax()) if count.any() else None
                own = [g for g in glyphs if g.y == obj.y]
                x = PATCH * (patch % GRID + 0.5)
                glyph = glyphs[nearest] if nearest is not None else min(own, key=lambda g: abs(g.x - x))
                found, middle[patch] = glyph.character, (glyph.x, glyph.y)
        character.append(found)
    return tuple(character), middle
