"""The token map tells dominant, complement, merged and dropped tokens apart, pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from visiontrim.core.errors import TrimError
from visiontrim.core.method import VisionOutput
from visiontrim.core.trace import ImageTrace, StageTrace
from visiontrim.picture import BACKGROUND, GAP, captioned, side_by_side, token_map

GREY = (128, 128, 128)
SCALE = 20


def trace_of(grid, index, assignment, complement=None, stages=()) -> ImageTrace:
    complement = [False] * len(index) if complement is None else complement
    whole = [torch.tensor(numbers, dtype=torch.long) for numbers in (index, assignment)]
    last = StageTrace(VisionOutput(), *whole, torch.tensor(complement, dtype=torch.bool))
    return ImageTrace(0, 0, 0, grid, 0, (*stages, last), (len(index),))


# On a grid of 3 x 4: tokens 0 and 5 dominant; clusters {3, 2, 7} of 3 and {8, 9} of 8; 1 went to the dominant 0;
# 4, 6, 10, 11 are gone.
INDEX, COMPLEMENT = [0, 3, 5, 8], [False, True, False, True]
ASSIGNMENT = [0, 0, 1, 1, -1, 2, -1, 1, 3, 3, -1, -1]


@pytest.fixture
def trace() -> ImageTrace:
    return trace_of((1, 3, 4), INDEX, ASSIGNMENT, COMPLEMENT)


@pytest.fixture
def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))


def patch(picture: Image.Image, row: int, column: int, scale: int = SCALE) -> np.ndarray:
    """Pixels [scale, scale, 3] of a token."""
    pixels = np.asarray(picture, dtype=np.int64)
    return pixels[row * scale : (row + 1) * scale, column * scale : (column + 1) * scale]


def inner(picture: Image.Image, token: int, columns: int = 4) -> np.ndarray:
    """Mean colour [3] of the middle of a token, away from its outlines."""
    row, column = divmod(token, columns)
    return patch(picture, row, column)[6:-6, 6:-6].reshape(-1, 3).mean(0)


def test_dominant_tokens_show_the_picture(noise, trace):
    drawn = token_map(noise, trace, scale=SCALE, legend=False)
    assert drawn.size == (80, 60)
    for token in (0, 5):
        assert np.array_equal(patch(drawn, *divmod(token, 4)), patch(noise, *divmod(token, 4)))
    for token in set(range(12)) - {0, 5}:
        assert not np.array_equal(patch(drawn, *divmod(token, 4)), patch(noise, *divmod(token, 4)))


def test_a_small_picture_is_enlarged_patch_by_patch(noise, trace):
    small = noise.resize((16, 12))
    enlarged = small.resize((80, 60), Image.Resampling.LANCZOS)
    drawn = token_map(small, trace, scale=SCALE, legend=False)
    assert np.array_equal(patch(drawn, 1, 1), patch(enlarged, 1, 1))


@pytest.mark.parametrize("colour", [GREY, (250, 250, 250), (220, 40, 40)])
def test_dropped_tokens_are_dark_and_grey(trace, colour):
    drawn = token_map(Image.new("RGB", (80, 60), colour), trace, scale=SCALE, legend=False)
    for token in (4, 6, 10, 11):
        seen = inner(drawn, token)
        assert seen.max() < 0.5 * max(colour)
        assert np.ptp(seen) <= 0.3 * np.ptp(colour) + 1
        others = [inner(drawn, other).mean() for other in (0, 1, 2, 3, 5, 7, 8, 9)]
        assert seen.mean() < min(others)


def test_members_of_a_cluster_share_a_tint(trace):
    drawn = token_map(Image.new("RGB", (80, 60), GREY), trace, scale=SCALE, legend=False)
    first, again, second = (inner(drawn, token) for token in (2, 7, 9))
    assert np.array_equal(first, again)
    assert np.abs(first - second).max() > 20, "clusters differ in colour"
    assert min(np.ptp(first), np.ptp(second)) > 20, "the picture is grey, the tint is not"
    for centre, member in ((3, first), (8, second)):
        assert inner(drawn, centre).mean() > member.mean() + 40, "the centre is clearer than what it took in"


def test_what_a_dominant_token_took_in_is_tinted_lightly(trace):
    drawn = token_map(Image.new("RGB", (80, 60), GREY), trace, scale=SCALE, legend=False)
    light, strong = np.ptp(inner(drawn, 1)), np.ptp(inner(drawn, 9))
    assert 5 < light < strong


def test_the_centre_of_a_cluster_is_outlined(trace):
    drawn = token_map(Image.new("RGB", (80, 60), GREY), trace, scale=SCALE, legend=False)
    for centre, member in ((3, 2), (8, 9)):
        outline, plain = patch(drawn, *divmod(centre, 4)), patch(drawn, *divmod(member, 4))
        assert (outline[:, SCALE // 2].min(1) > 190).any()
        assert (plain[:, SCALE // 2].min(1) < 190).all()


def test_the_last_stage_is_drawn(noise):
    everything = StageTrace(VisionOutput(), torch.arange(12), torch.arange(12), torch.zeros(12, dtype=torch.bool))
    last = trace_of((1, 3, 4), INDEX, ASSIGNMENT, COMPLEMENT, stages=(everything,))
    alone = trace_of((1, 3, 4), INDEX, ASSIGNMENT, COMPLEMENT)
    assert token_map(noise, last) == token_map(noise, alone)


def test_nothing_removed_is_the_picture(noise):
    untouched = ImageTrace(0, 0, 0, (1, 3, 4), 0, (), (12,))
    kept = trace_of((1, 3, 4), list(range(12)), list(range(12)))
    assert token_map(noise, untouched, scale=SCALE, legend=False) == noise
    assert token_map(noise, kept, scale=SCALE, legend=False) == noise


@pytest.mark.parametrize("size", [(80, 60), (4000, 3000), (40, 30)])
def test_default_size_and_caption(size, trace):
    bare = token_map(Image.new("RGB", size, GREY), trace, legend=False)
    assert bare.size == (768, 576)
    captioned = token_map(Image.new("RGB", size, GREY), trace)
    assert captioned.width == 768
    assert captioned.crop((0, 0, 768, 576)) == bare
    strip = np.asarray(captioned)[576:]
    assert 20 <= len(strip) <= 50
    assert (strip[0] == BACKGROUND).all()
    assert strip.max() > 180, "there is text"
    assert (strip[:, -4:] == BACKGROUND).all(), "it ends before the border"


def test_patches_follow_the_proportions_of_the_picture():
    trace = ImageTrace(0, 0, 0, (1, 4, 4), 0, (), (16,))
    assert token_map(Image.new("RGB", (100, 200)), trace, scale=10, legend=False).size == (40, 80)
    assert token_map(Image.new("RGB", (100, 1000)), trace, legend=False).size == (76, 760)


def test_a_narrow_picture_gets_a_margin_for_its_caption(trace):
    captioned = token_map(Image.new("RGB", (40, 30), GREY), trace, scale=10)
    assert captioned.width > 200
    strip = np.asarray(captioned)[30:]
    assert (strip[:, [0, -1]] == BACKGROUND).all()


@pytest.mark.parametrize("given", [3, 6])
def test_frames_of_a_video_stand_side_by_side(given):
    frames = [Image.new("RGB", (40, 20), (10 + 40 * number, 0, 0)) for number in range(given)]
    video = trace_of((3, 1, 2), [0, 2, 4], [0, -1, 1, -1, 2, -1])
    drawn = token_map(frames, video, scale=SCALE, legend=False)
    assert drawn.size == (3 * 2 * SCALE + 2 * GAP, SCALE)
    for number in range(3):
        left = number * (2 * SCALE + GAP)
        assert drawn.getpixel((left + 5, 5)) == (10 + 40 * number * (given // 3), 0, 0)
        assert drawn.getpixel((left + SCALE + 5, 5)) != drawn.getpixel((left + 5, 5))


def test_long_videos_wrap():
    frames = [Image.new("RGB", (40, 20), GREY)] * 5
    video = ImageTrace(0, 0, 0, (5, 1, 2), 0, (), (10,))
    assert token_map(frames, video, scale=SCALE, legend=False).size == (4 * 40 + 3 * GAP, 2 * 20 + GAP)


@pytest.mark.parametrize(
    ("trace", "message"),
    [
        (trace_of((1, 2, 4), INDEX, ASSIGNMENT, COMPLEMENT), "12 tokens and 4 survivors, but its grid .* holds 8"),
        (trace_of((1, 3, 4), [0, 3, 5, 12], ASSIGNMENT, COMPLEMENT), "index .* from 0 to 12"),
        (trace_of((1, 3, 4), INDEX[:3], ASSIGNMENT, COMPLEMENT[:3]), "assignment .* from -1 to 3"),
        (trace_of((2, 3, 2), INDEX, ASSIGNMENT, COMPLEMENT), "2 frames but 1 pictures"),
    ],
)
def test_contradictions_are_refused(noise, trace, message):
    with pytest.raises(TrimError, match=message):
        token_map(noise, trace)


def test_scale_is_refused_below_one(noise, trace):
    with pytest.raises(TrimError, match="scale=0"):
        token_map(noise, trace, scale=0)


def test_side_by_side(noise):
    small = noise.resize((40, 30))
    row = side_by_side([noise, small], ["plain", "kept"])
    assert row.width == 80 + GAP + 80
    assert row.crop((0, 0, 80, 60)) == noise
    assert row.height > 60
    with pytest.raises(TrimError, match="2 pictures and 1 captions"):
        side_by_side([noise, small], ["plain"])
    with pytest.raises(TrimError, match="0 pictures"):
        side_by_side([], [])


def test_a_long_caption_takes_several_lines():
    picture = Image.new("RGB", (300, 20), GREY)
    short = captioned(picture, "one line")
    long = captioned(picture, " ".join(["several"] * 30))
    assert (short.width, long.width) == (300, 300)
    lines = (long.height - 20) / (short.height - 20)
    assert lines > 3
    assert captioned(picture, "word" * 60).width > 300, "a word is not cut"
