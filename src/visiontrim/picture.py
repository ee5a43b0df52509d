"""What became of the vision tokens, drawn on the picture: kept ones clear, clusters tinted, dropped ones dimmed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from visiontrim.core.errors import TrimError
from visiontrim.core.trace import ImageTrace

LONG_SIDE = 768
"""Pixels of the longer side of a drawn picture, about."""
FRAME_SIDE = 384
"""The same for each frame of a video."""
FRAMES_PER_ROW = 4
GAP = 12
"""Pixels between pictures that stand side by side."""
BACKGROUND = (22, 24, 29)
INK = (201, 206, 214)

_LAB_TO_LMS = np.array(
    [
        [1.0, 0.3963377774, 0.2158037573],
        [1.0, -0.1055613458, -0.0638541728],
        [1.0, -0.0894841775, -1.2914855480],
    ]
)
_LMS_TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)

Frames = Image.Image | Sequence[Image.Image]


def token_map(image: Frames, trace: ImageTrace, *, scale: int | None = None, legend: bool = True) -> Image.Image:
    """Draw what became of the vision tokens of ``image`` in the last stage of ``trace`` that left any.

    ``image`` is the region that the model saw, or the frames of a video (as many as the grid has, or a multiple of
    that). Dominant tokens stay clear. Every cluster of merged tokens has a colour of its own: strong, with the centre
    outlined, for a complement token; light where a dominant token took others in. Dropped tokens are dark and grey.
    ``scale`` is the width of a token's patch in pixels (by default the longer side gets about 768), ``legend`` adds a
    line of counts below. Raises :class:`TrimError` if the trace contradicts its grid or the number of frames.
    """
    fates = _Fates.read(trace)
    frames, rows, columns = trace.grid
    pictures = _frames(image, frames)
    wide, high = _patch(pictures[0], rows, columns, scale, LONG_SIDE if frames == 1 else FRAME_SIDE)
    size = (columns * wide, rows * high)
    drawn = [
        _draw(picture.convert("RGB").resize(size, Image.Resampling.LANCZOS), fates, frame, wide, high)
        for frame, picture in enumerate(pictures)
    ]
    sheet = drawn[0] if frames == 1 else _tile(drawn, FRAMES_PER_ROW)
    return _captioned(sheet, fates.legend) if legend else sheet


def side_by_side(images: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """Put pictures in a row, at the height of the highest, each with its caption below.

    Raises :class:`TrimError` without pictures, or for another number of captions than of pictures.
    """
    if not images or len(images) != len(captions):
        raise TrimError(f"{len(images)} pictures and {len(captions)} captions: give one caption for each picture")
    high = max(image.height for image in images)
    scaled = [
        image.convert("RGB").resize((round(image.width * high / image.height), high), Image.Resampling.LANCZOS)
        for image in images
    ]
    return _tile([_captioned(image, text) for image, text in zip(scaled, captions, strict=True)], len(scaled))


@dataclass(frozen=True)
class _Fates:
    """What the last stage did to every token, as arrays on the grid."""

    survivor: np.ndarray
    """int [frames, rows, columns]: the survivor that carries the token, -1 where it is gone."""
    centre: np.ndarray
    """bool [frames, rows, columns]: the token that a survivor stands for."""
    complement: np.ndarray
    """bool [kept]."""

    @classmethod
    def read(cls, trace: ImageTrace) -> _Fates:
        if not trace.stages:  # nothing was removed
            every = np.arange(trace.total).reshape(trace.grid)
            return cls(every, np.ones(trace.grid, dtype=bool), np.zeros(trace.total, dtype=bool))
        stage = next((stage for stage in reversed(trace.stages) if len(stage.index)), trace.stages[-1])
        index, survivor = stage.index.cpu().numpy(), stage.assignment.cpu().numpy()
        complement = stage.complement.cpu().numpy()
        if len(survivor) != trace.total:
            raise TrimError(
                f"the trace at {stage.site} speaks of {len(survivor)} tokens and {len(index)} survivors, but its grid "
                f"{trace.grid} holds {trace.total}: draw a trace together with its own grid"
            )
        for name, values, least, most in (("index", index, 0, trace.total), ("assignment", survivor, -1, len(index))):
            if len(values) and (values.min() < least or values.max() >= most):
                raise TrimError(
                    f"the {name} of the trace at {stage.site} reaches from {values.min()} to {values.max()}, but must "
                    f"lie in [{least}, {most}): draw a trace together with its own grid {trace.grid}"
                )
        centre = np.zeros(trace.total, dtype=bool)
        centre[index] = True
        return cls(survivor.reshape(trace.grid), centre.reshape(trace.grid), complement)

    @cached_property
    def colour(self) -> np.ndarray:
        """float32 [kept, 3]: one colour for each cluster; neighbours in raster order get distant hues."""
        carried = np.bincount(self.survivor[self.survivor >= 0], minlength=len(self.complement))
        cluster = self.complement | (carried > 1)
        colour = np.zeros((len(cluster), 3), dtype=np.float32)
        colour[cluster] = _palette(int(cluster.sum()))
        return colour

    @cached_property
    def legend(self) -> str:
        kept, total = len(self.complement), self.survivor.size
        complement, dropped = int(self.complement.sum()), int((self.survivor < 0).sum())
        merged = total - dropped - kept
        parts = [f"{kept - complement} dominant"] if complement else []
        parts += [f"{complement} complement (outlined)"] if complement else []
        parts += [f"{merged} merged"] if merged else []
        parts += [f"{dropped} dropped"] if dropped else []
        return f"{kept} of {total} vision tokens" + (": " if parts else "") + ", ".join(parts)


def _frames(image: Frames, frames: int) -> list[Image.Image]:
    given = [image] if isinstance(image, Image.Image) else list(image)
    if not given or len(given) % frames:
        raise TrimError(
            f"the trace has {frames} frames but {len(given)} pictures were given: give one for each frame, "
            "or a whole multiple of that"
        )
    return given[:: len(given) // frames]


def _patch(image: Image.Image, rows: int, columns: int, scale: int | None, long_side: int) -> tuple[int, int]:
    """Width and height in pixels of a token's patch: whole numbers, in about the picture's proportions."""
    tall = (image.height / rows) / (image.width / columns)
    if scale is None:
        scale = max(2, round(long_side / max(columns, rows * tall)))
    if scale < 1:
        raise TrimError(f"scale={scale} pixels for each token: give 1 or more")
    return scale, max(1, round(scale * tall))


def _draw(image: Image.Image, fates: _Fates, frame: int, wide: int, high: int) -> Image.Image:
    survivor, centre = fates.survivor[frame], fates.centre[frame]
    gone = survivor < 0
    complement = np.append(fates.complement, False)[survivor]  # -1, a dropped token, looks up the last entry
    clear = ~gone & ~complement & centre
    heart = complement & centre
    colour = np.vstack([fates.colour, np.zeros((1, 3), np.float32)])[survivor]

    # Per token: how much stays of the picture's own colours, how bright they are, how much of the cluster's colour.
    kinds = [clear, gone, heart, complement]
    saturation = np.select(kinds, [1.0, 0.2, 0.9, 0.35], 0.7)
    brightness = np.select(kinds, [1.0, 0.28, 0.95, 0.40], 0.7)
    tint = np.select(kinds, [0.0, 0.0, 0.25, 0.32], 0.15)

    def spread(values: np.ndarray) -> np.ndarray:
        return np.repeat(np.repeat(values, high, 0), wide, 1)

    pixels = np.asarray(image, dtype=np.float32)
    grey = pixels @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    own, light, share = (spread(amount)[..., None] for amount in (saturation, brightness, tint))
    mixed = light * (grey[..., None] + own * (pixels - grey[..., None]))
    mixed += share * (spread(colour) - mixed)

    line = max(1, wide // 16)
    tinted = spread(~clear & ~gone)
    border = tinted & _edges(spread(survivor), line)
    mixed[border] += 0.6 * (spread(colour)[border] - mixed[border])
    ring = spread(heart) & _edges(spread(np.where(heart, survivor, -1)), 2 * line)
    mixed[ring] = 0.25 * spread(colour)[ring] + 0.75 * 255
    return Image.fromarray(np.rint(mixed.clip(0, 255)).astype(np.uint8))


def _edges(labels: np.ndarray, width: int) -> np.ndarray:
    """bool [height, width]: pixels at most ``width`` away from another label, straight up, down, left or right."""
    height, breadth = labels.shape
    padded = np.pad(labels, width, mode="edge")
    edge = np.zeros(labels.shape, dtype=bool)
    for down, right in ((0, width), (2 * width, width), (width, 0), (width, 2 * width)):
        edge |= padded[down : down + height, right : right + breadth] != labels
    return edge


def _palette(count: int) -> np.ndarray:
    """float32 [count, 3] in 0..255: equally light colours, a golden angle apart in OKLab (Ottosson 2020)."""
    hue = np.arange(count) * math.pi * (3 - math.sqrt(5))
    lab = np.stack([np.full(count, 0.76), 0.15 * np.cos(hue), 0.15 * np.sin(hue)])
    linear = (_LMS_TO_RGB @ (_LAB_TO_LMS @ lab) ** 3).clip(0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (255 * srgb.T).astype(np.float32)


def _tile(images: Sequence[Image.Image], per_row: int) -> Image.Image:
    """Pictures in rows, top edges aligned."""
    rows = [images[start : start + per_row] for start in range(0, len(images), per_row)]
    width = max(sum(image.width + GAP for image in row) for row in rows) - GAP
    height = sum(max(image.height for image in row) + GAP for row in rows) - GAP
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    top = 0
    for row in rows:
        left = 0
        for image in row:
            sheet.paste(image, (left, top))
            left += image.width + GAP
        top += max(image.height for image in row) + GAP
    return sheet


def captioned(image: Image.Image, text: str) -> Image.Image:
    """The picture with ``text`` below, in as many lines of equal height as it takes."""
    font, room = ImageFont.load_default(100), 100 * (image.width / 13 - 2)  # letters of 13 pixels, an em of margin
    lines, words = [""], text.split()
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        lines[-1:] = [longer] if not lines[-1] or font.getlength(longer) <= room else [lines[-1], word]
    width = max(lines, key=font.getlength)
    for line in lines:
        image = _captioned(image, line, width)
    return image


def _captioned(image: Image.Image, text: str, longest: str | None = None) -> Image.Image:
    """The picture with a line of text on a strip below; a picture too narrow for the text gets a margin.

    Its size is that at which the ``longest`` line fits.
    """
    ems = ImageFont.load_default(100).getlength(longest or text) / 100 + 2  # an em of margin left and right
    size = min(17, max(11, int(image.width / ems)))
    width = max(image.width, math.ceil(ems * size))
    large = 4  # drawn large and shrunk, because the built-in font has uneven gaps at this size
    font = ImageFont.load_default(large * size)
    strip = Image.new("RGB", (large * width, large * 2 * size), BACKGROUND)
    ImageDraw.Draw(strip).text((large * size, large * size), text, fill=INK, font=font, anchor="lm")
    sheet = Image.new("RGB", (width, image.height + 2 * size), BACKGROUND)
    sheet.paste(image, ((width - image.width) // 2, 0))
    sheet.paste(strip.resize((width, 2 * size), Image.Resampling.LANCZOS), (0, image.height))
    return sheet
