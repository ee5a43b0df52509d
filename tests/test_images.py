"""Pictures from every source and mode come out upright and RGB; broken ones are refused in one sentence."""

from __future__ import annotations

import http.server
import io
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from visiontrim import images
from visiontrim.core.errors import TrimError
from visiontrim.images import as_seen, downsample, load_image
from visiontrim.zoo import load_qwen

RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)


@pytest.fixture
def save(tmp_path):
    """Save a picture under a name and give back the path."""

    def write(image: Image.Image, name: str = "picture.png", **options) -> str:
        path = tmp_path / name
        image.save(path, **options)
        return str(path)

    return write


def refusal(source) -> str:
    with pytest.raises(TrimError) as caught:
        load_image(source)
    message = str(caught.value)
    assert "\n" not in message
    assert ": " in message, "a way out follows the colon"
    return message


# --- modes -----------------------------------------------------------------------------------------------------------


def test_rgb_is_untouched(save):
    values = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = load_image(save(Image.fromarray(values)))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), values)


def test_rgba_lies_on_white(save):
    image = Image.new("RGBA", (3, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 51))
    loaded = load_image(save(image))
    assert [loaded.getpixel((x, 0)) for x in range(3)] == [RED, WHITE, (204, 204, 204)]


def test_grey_alpha_lies_on_white(save):
    image = Image.new("LA", (2, 1), (100, 255))
    image.putpixel((1, 0), (0, 0))
    loaded = load_image(save(image))
    assert [loaded.getpixel((x, 0)) for x in range(2)] == [(100, 100, 100), WHITE]


def test_palette_with_transparent_colour_lies_on_white(save):
    image = Image.new("P", (2, 1), 0)
    image.putpalette([*BLACK, *RED])
    image.putpixel((1, 0), 1)
    loaded = load_image(save(image, transparency=0))
    assert [loaded.getpixel((x, 0)) for x in range(2)] == [WHITE, RED]


def test_palette(save):
    image = Image.new("P", (2, 1), 0)
    image.putpalette([*BLACK, *RED])
    image.putpixel((1, 0), 1)
    loaded = load_image(save(image))
    assert [loaded.getpixel((x, 0)) for x in range(2)] == [BLACK, RED]


def test_transparent_colour_of_rgb_lies_on_white(save):
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), (1, 2, 3))
    loaded = load_image(save(image, transparency=(1, 2, 3)))
    assert [loaded.getpixel((x, 0)) for x in range(2)] == [RED, WHITE]


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey_and_one_bit(save, mode):
    image = Image.new(mode, (2, 1), 0)
    image.putpixel((1, 0), 255)
    loaded = load_image(save(image))
    assert [loaded.getpixel((x, 0)) for x in range(2)] == [BLACK, WHITE]


def test_cmyk(save):
    loaded = load_image(save(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "picture.tiff"))
    assert loaded.getpixel((4, 4)) == RED


def test_cmyk_jpeg_is_not_inverted(save):
    loaded = load_image(save(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "picture.jpg", quality=95))
    assert np.abs(np.array(loaded.getpixel((8, 8))) - RED).max() < 8


@pytest.mark.parametrize(("name", "order"), [("p.png", "<u2"), ("p.tiff", "<u2"), ("p.tiff", ">u2")])
def test_16_bit_is_scaled_not_clipped(save, name, order):
    values = np.array([[0, 257, 32896, 65535]], dtype=order)
    loaded = load_image(save(Image.fromarray(values), name))
    assert np.asarray(loaded)[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 128, 255], [0, 128, 255]),
        ([0, 32896, 65535], [0, 128, 255]),
        ([-100, 0, 100], [0, 128, 255]),
        ([0, 500_000, 1_000_000], [0, 128, 255]),
        ([7, 7, 7], [7, 7, 7]),
    ],
)
def test_32_bit_range(save, values, expected):
    loaded = load_image(save(Image.fromarray(np.array([values], dtype=np.int32)), "p.tiff"))
    assert np.asarray(loaded)[0, :, 1].tolist() == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 12.0, 200.0], [0, 12, 200]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([0.0, float("nan"), 1.0], [0, 0, 255]),
        ([0.0, float("inf"), 1.0], [0, 0, 255]),
    ],
)
def test_float_range(save, values, expected):
    loaded = load_image(save(Image.fromarray(np.array([values], dtype=np.float32)), "p.tiff"))
    assert np.asarray(loaded)[0, :, 2].tolist() == expected


# --- orientation, frames ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(save, orientation):
    upright = Image.new("RGB", (64, 32), WHITE)
    upright.paste(RED, (0, 0, 16, 16))  # red in the upper left corner
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    loaded = load_image(save(stored, exif=exif))
    assert np.array_equal(np.asarray(loaded), np.asarray(upright))


@pytest.mark.parametrize("name", ["a.gif", "a.png"])
def test_first_frame_of_an_animation(save, name):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLACK, WHITE)]
    loaded = load_image(save(frames[0], name, save_all=True, append_images=frames[1:]))
    assert loaded.size == (4, 4)
    assert loaded.getpixel((2, 2)) == RED


# --- broken files ----------------------------------------------------------------------------------------------------


def test_missing(tmp_path):
    assert "no.png does not exist" in refusal(tmp_path / "no.png")


def test_folder(tmp_path):
    assert "is a folder" in refusal(tmp_path)


def test_empty(tmp_path):
    (tmp_path / "empty.png").touch()
    assert "0 bytes" in refusal(tmp_path / "empty.png")


def test_nul_in_path():
    assert "cannot be opened" in refusal("a\0b.png")


def test_too_long_path():
    assert "cannot be opened" in refusal("x" * 5000)


def test_not_a_picture(tmp_path):
    (tmp_path / "notes.txt").write_text("no pixels here")
    assert "no picture" in refusal(tmp_path / "notes.txt")


@pytest.mark.parametrize("name", ["p.png", "p.jpg", "p.gif", "p.bmp", "p.webp", "p.tiff"])
def test_truncated(save, name):
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path = save(noise, name)
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: len(content) // 2])
    assert any(word in refusal(path) for word in ("broken", "no picture"))


def test_zero_sized(tmp_path):
    (tmp_path / "zero.gif").write_bytes(b"GIF89a" + bytes(7) + b"," + bytes(9) + b"\x02\x00;")
    assert "has no pixels" in refusal(tmp_path / "zero.gif")


@pytest.mark.parametrize("limit", [150, 50])  # Pillow warns above its limit and raises above twice that
def test_decompression_bomb(save, monkeypatch, limit):
    path = save(Image.new("L", (20, 10)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert "is too large: its size (200 pixels) exceeds limit of" in refusal(path)


# --- standard input and addresses ------------------------------------------------------------------------------------


def png(colour=RED) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), colour).save(buffer, "PNG")
    return buffer.getvalue()


def pipe(monkeypatch, content: bytes, tty: bool = False) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content), isatty=lambda: tty))


def test_standard_input(monkeypatch):
    pipe(monkeypatch, png())
    assert load_image("-").getpixel((0, 0)) == RED


def test_standard_input_empty_or_large_or_terminal(monkeypatch):
    pipe(monkeypatch, b"")
    assert "standard input is empty" in refusal("-")
    pipe(monkeypatch, b"", tty=True)
    assert "terminal" in refusal("-")
    monkeypatch.setattr(images, "MAX_BYTES", 2**20)
    pipe(monkeypatch, bytes(2**20 + 1))
    assert "more than 1 MiB" in refusal("-")


@pytest.fixture(scope="module")
def server():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/moved.png":
                self.send_response(302)
                self.send_header("Location", "/red.png")
                self.end_headers()
                return
            content = {"/red.png": png(), "/page.html": b"<html></html>"}.get(self.path)
            self.send_response(200 if content else 404)
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize("page", ["red.png", "moved.png"])
def test_url(server, page):
    assert load_image(f"{server}/{page}").getpixel((1, 1)) == RED


def test_url_refusals(server, monkeypatch):
    assert "answers 404" in refusal(f"{server}/no.png")
    assert "no picture" in refusal(f"{server}/page.html")
    assert "cannot be fetched" in refusal("http://127.0.0.1:1/x.png")
    assert "cannot be fetched" in refusal("http://[broken/x.png")
    monkeypatch.setattr(images, "MAX_BYTES", 10)
    assert "red.png holds more than" in refusal(f"{server}/red.png")


# --- what the model sees ---------------------------------------------------------------------------------------------


def gradient(width: int, height: int) -> Image.Image:
    x = np.linspace(0, 255, width)[None, :].repeat(height, 0)
    y = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (256, 256), (641, 97)])
@pytest.mark.parametrize(("short", "crop"), [(224, 224), (256, 224), (64, 32)])
def test_as_seen_is_what_the_processor_crops(size, short, crop):
    image = gradient(*size)
    processor = CLIPImageProcessor(
        size={"shortest_edge": short},
        crop_size={"height": crop, "width": crop},
        do_normalize=False,
        do_rescale=False,
    )
    seen = np.asarray(as_seen(image, processor).resize((crop, crop), Image.Resampling.BICUBIC)).astype(float)
    pixels = np.asarray(processor(image, return_tensors="np")["pixel_values"][0]).transpose(1, 2, 0).astype(float)
    assert np.abs(seen - pixels).mean() < 2.0
    assert min(as_seen(image, processor).size) == round(min(size) * crop / short)


def test_as_seen_with_plain_dictionaries_and_fixed_shapes():
    image = gradient(100, 50)
    processor = SimpleNamespace(
        do_center_crop=True, size={"height": 25, "width": 25}, crop_size={"height": 20, "width": 20}
    )
    assert as_seen(image, processor).size == (80, 40)
    processor.do_resize = False
    assert as_seen(image, processor).size == (20, 20)


def test_as_seen_beyond_the_border_is_black():
    processor = SimpleNamespace(
        do_center_crop=True, size={"shortest_edge": 50}, crop_size={"height": 100, "width": 100}
    )
    seen = as_seen(Image.new("RGB", (50, 50), RED), processor)
    assert seen.size == (100, 100)
    assert (seen.getpixel((0, 0)), seen.getpixel((50, 50))) == (BLACK, RED)


def test_as_seen_pads_to_a_square_when_the_processor_does():
    llava = SimpleNamespace(
        do_center_crop=True,
        do_pad=True,
        pad_to_square=lambda images: images,
        image_mean=(0.5, 0.25, 0.0),
        size={"shortest_edge": 30},
        crop_size={"height": 30, "width": 30},
    )
    seen = as_seen(Image.new("RGB", (60, 20), RED), llava)
    assert seen.size == (60, 60)
    assert (seen.getpixel((30, 5)), seen.getpixel((30, 30))) == ((127, 63, 0), RED)


def test_as_seen_keeps_the_whole_picture():
    image = gradient(100, 50)
    crop = {"height": 10, "width": 10}
    assert as_seen(image, None) is image
    assert as_seen(image, SimpleNamespace(do_center_crop=False, crop_size=crop)) is image
    assert as_seen(image, SimpleNamespace(do_center_crop=True, image_grid_pinpoints=[[1, 1]], crop_size=crop)) is image


@pytest.mark.parametrize(
    ("size", "keep", "grid"),
    [
        ((192, 192), 100, (10, 10)),
        ((192, 192), 0.5, (11, 11)),  # 121 of at most 128
        ((216, 144), 90, (8, 11)),  # two thirds as high as wide asks for 7.7 rows
        ((144, 216), 90, (11, 8)),
        ((192, 192), 256, (16, 16)),
    ],
)
def test_downsampling_gives_as_many_whole_cells_as_go(size, keep, grid):
    processor = load_qwen().processor.image_processor
    small = downsample(Image.radial_gradient("L").convert("RGB").resize(size), keep, processor)
    assert small.size == (12 * grid[1], 12 * grid[0])
    seen = processor(images=small, return_tensors="pt")
    assert seen["image_grid_thw"].tolist() == [[1, 2 * grid[0], 2 * grid[1]]]
    if keep == 256:  # all of them
        whole = processor(images=Image.radial_gradient("L").convert("RGB").resize(size), return_tensors="pt")
        assert torch.equal(seen["pixel_values"], whole["pixel_values"])


def test_downsampling_stays_in_bounds():
    """Every number of tokens: never more than asked for, less than a line of cells fewer, and much the same shape."""
    cells = {"patch_size": 6, "merge_size": 2, "resample": Image.Resampling.BICUBIC}
    processor = SimpleNamespace(**cells, get_number_of_image_patches=lambda h, w, _: (h // 12) * (w // 12) * 4)
    for size in ((120, 120), (240, 48), (36, 240)):
        own = size[0] * size[1] // 144
        for keep in range(1, own + 1):
            small = downsample(Image.new("RGB", size), keep, processor)
            columns, rows = small.width // 12, small.height // 12
            assert 0 <= keep - rows * columns < (rows if size[0] >= size[1] else columns)
            assert keep * min(size) < 5 * max(size) or 0.6 < (columns * size[1]) / (rows * size[0]) < 1.6


def test_what_cannot_be_downsampled_is_refused():
    picture = Image.new("RGB", (192, 192))
    processor = load_qwen().processor.image_processor
    with pytest.raises(TrimError, match=r"84 x 84 pixels would be 49 .* makes 64 of it: set size\['shortest_edge'\]"):
        downsample(picture, 50, processor)
    assert downsample(picture, 300, processor) is picture, "a number is one at most"
    with pytest.raises(TrimError, match=r"CLIPImageProcessor.*use the method avgpool"):
        downsample(picture, 64, CLIPImageProcessor())
