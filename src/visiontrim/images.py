"""Pictures from anywhere (path, address, standard input), as the upright RGB that vision models expect."""

from __future__ import annotations

import http.client
import io
import sys
import urllib.error
import urllib.request
import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps

from visiontrim.core.budget import Amount, resolve
from visiontrim.core.errors import TrimError

MAX_BYTES = 64 * 2**20
"""Largest picture, in bytes, that is read from a URL or from standard input."""
TIMEOUT = 20.0
"""Seconds that a URL may stay silent."""


def load_image(source: str | Path) -> Image.Image:
    """Read a picture as upright 8-bit RGB.

    ``source`` is a path, an http(s) URL, or ``"-"`` for the bytes of standard input. The EXIF orientation is applied,
    transparency is laid on white, deep greyscale (16 bit, 32 bit, float) is scaled to 8 bit, and of an animation the
    first frame counts. Raises :class:`TrimError` for what is missing, unreadable, truncated, empty or too large.
    """
    text = str(source)
    if text == "-":
        return _decode(_stdin(), "standard input")
    if text.lower().startswith(("http://", "https://")):
        return _decode(_download(text), text)
    with _open(Path(source)) as file:
        return _decode(file, text)


def decode_image(content: bytes, name: str) -> Image.Image:
    """The picture in ``content``, as :func:`load_image` gives it; ``name`` says in errors where it comes from."""
    return _decode(_limited(content, name), name)


def as_seen(image: Image.Image, image_processor: Any) -> Image.Image:
    """The region of ``image`` that a CLIP-like ``image_processor`` hands to the model, in original pixels.

    With ``do_center_crop`` that is the centre: the short side is resized to ``size["shortest_edge"]`` and
    ``crop_size`` of it is cut out (a crop beyond the border is black, as the model sees it). LLaVA's optional padding
    to a square comes before that. Processors that cut an image into tiles, or that do not crop, see all of it, and so
    does ``None``.
    """
    if not getattr(image_processor, "do_center_crop", False) or getattr(image_processor, "image_grid_pinpoints", None):
        return image
    if getattr(image_processor, "do_pad", False) and callable(getattr(image_processor, "pad_to_square", None)):
        side = max(image.size)
        colour = tuple(int(255 * mean) for mean in image_processor.image_mean)
        image = ImageOps.pad(image, (side, side), color=colour)
    crop = _lengths(image_processor.crop_size)
    size = _lengths(image_processor.size) if getattr(image_processor, "do_resize", True) else {}
    if "shortest_edge" in size:
        scale_x = scale_y = min(image.size) / size["shortest_edge"]
    else:  # resized to a fixed shape, or not at all
        scale_x = image.width / size.get("width", image.width)
        scale_y = image.height / size.get("height", image.height)
    width, height = round(crop["width"] * scale_x), round(crop["height"] * scale_y)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def deviations(image_processor: Any) -> tuple[float, ...] | None:
    """By what an ``image_processor`` divides each channel of colours in [0, 1]; None: it is none of transformers'."""
    if not getattr(image_processor, "do_normalize", True):
        return (1.0, 1.0, 1.0)
    given = getattr(image_processor, "image_std", None)
    return None if given is None else tuple(given)


def downsample(image: Image.Image, keep: Amount, image_processor: Any) -> Image.Image:
    """The control for what removes tokens before the encoder: ``image``, smaller, so that at most ``keep`` come of it.

    For an ``image_processor`` that keeps the size of pictures, rounded to cells of a vision token each (Qwen-VL,
    GLM-4V). ``keep`` is a number of tokens or a fraction of the picture's own. It is resized once, by the processor's
    filter: its shorter side to the number of cells nearest to what its shape asks for, the longer one to as many as
    then go into ``keep``. Raises :class:`TrimError` for a processor without such cells, and where the processor
    would enlarge the picture again.
    """
    if not hasattr(image_processor, "merge_size") or not hasattr(image_processor, "get_number_of_image_patches"):
        raise TrimError(
            f"{type(image_processor).__name__} does not give a token for each cell of a picture, so a smaller picture "
            "need not be fewer tokens: use the method avgpool"
        )
    cell = image_processor.patch_size * image_processor.merge_size

    def tokens(width: int, height: int) -> int:
        return image_processor.get_number_of_image_patches(height, width, {}) // image_processor.merge_size**2

    own = tokens(*image.size)
    keep = resolve(keep, own)
    if keep == own:
        return image
    short = max(1, round((keep * min(image.size) / max(image.size)) ** 0.5))
    columns, rows = (keep // short, short) if image.width >= image.height else (short, keep // short)
    small = columns * cell, rows * cell
    if (count := tokens(*small)) != rows * columns:
        raise TrimError(
            f"a picture of {small[0]} x {small[1]} pixels would be {rows * columns} vision tokens, but its processor "
            f"makes {count} of it: set size['shortest_edge'] of the processor to {small[0] * small[1]} or less"
        )
    return image.resize(small, image_processor.resample)


def check_output(path: Path) -> None:
    """Raise :class:`TrimError` where :func:`save_image` would, as far as that can be told beforehand."""
    known = Image.registered_extensions()
    if known.get(path.suffix.lower()) not in Image.SAVE:
        raise TrimError(f"{path} does not end like a picture: call it {path.stem}.png")
    if not path.parent.is_dir():
        raise TrimError(f"{path.parent} is no folder: create it first, or write somewhere else")


def save_image(image: Image.Image, path: Path) -> None:
    """Write a picture in the format that its name ends in. Raises :class:`TrimError` if that fails."""
    check_output(path)
    try:
        image.save(path)
    except OSError as error:
        raise TrimError(f"{path} cannot be written ({error.strerror or error}): write somewhere else") from error


def _lengths(size: Any) -> dict[str, int]:
    """Named lengths of a ``dict`` or of a ``SizeDict``, which iterates over pairs and holds None where unset."""
    return {name: length for name, length in dict(size).items() if length is not None}


def _open(path: Path) -> IO[bytes]:
    try:
        if path.is_dir():
            raise TrimError(f"{path} is a folder: give the path of one picture")
        return path.open("rb")
    except TrimError:
        raise
    except FileNotFoundError as error:
        raise TrimError(f"{path} does not exist: give the path of a picture, a URL, or - for standard input") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise TrimError(f"{path} cannot be opened ({reason}): give a file that you may read") from error


def _stdin() -> IO[bytes]:
    if sys.stdin.isatty():
        raise TrimError("standard input is a terminal: pipe a picture into it, as in `cat photo.png | visiontrim ...`")
    return _limited(sys.stdin.buffer.read(MAX_BYTES + 1), "standard input")


def _download(url: str) -> IO[bytes]:
    try:
        # Some servers refuse the default agent of urllib.
        request = urllib.request.Request(url, headers={"User-Agent": "visiontrim", "Accept": "image/*"})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            content = response.read(MAX_BYTES + 1)
    except urllib.error.HTTPError as error:
        raise TrimError(f"{url} answers {error.code} {error.reason}: check the address") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise TrimError(f"{url} cannot be fetched ({reason}): check the address and your connection") from error
    return _limited(content, url)


def _limited(content: bytes, name: str) -> IO[bytes]:
    if len(content) > MAX_BYTES:
        raise TrimError(f"{name} holds more than {MAX_BYTES // 2**20} MiB: give a smaller one, or save it to a file")
    return io.BytesIO(content)


def _decode(file: IO[bytes], name: str) -> Image.Image:
    if not file.read(1):
        raise TrimError(f"{name} is empty (0 bytes): give a picture")
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                return _to_rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        numbers = str(error).partition(",")[0].replace("Image size", "its size")
        raise TrimError(f"{name} is too large: {numbers}; make it smaller first") from error
    except Image.UnidentifiedImageError as error:  # Pillow says so of pictures without pixels as well
        raise TrimError(f"{name} is no picture that can be read, or has no pixels: give a PNG or JPEG") from error
    except Exception as error:  # decoders of broken files raise nearly everything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TrimError(f"{name} is broken ({reason}): get a new copy of the picture") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        # Pillow's own conversion clips these modes at 255.
        return Image.fromarray(_to_8_bit(np.asarray(image), image.mode)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _to_8_bit(values: np.ndarray, mode: str) -> np.ndarray:
    """Scale deep greyscale to uint8 [height, width].

    16 bits are scaled from their full range. The 32-bit modes do not say their range: it is the smallest usual one
    (1 for floats, 255, 65535) that holds the values, and from minimum to maximum where none does.
    """
    deep = np.where(np.isfinite(values), values, 0.0).astype(np.float64)
    if mode.startswith("I;16"):
        low, high = 0.0, 65535.0
    else:
        low, high = float(deep.min()), float(deep.max())
        usual = [top for top in (1.0, 255.0, 65535.0) if high <= top and (top > 1.0 or mode == "F")]
        if low >= 0.0 and usual:
            low, high = 0.0, usual[0]
    return np.rint(255.0 * ((deep - low) / max(high - low, 1e-12))).astype(np.uint8)
