"""The rule of PixelPrune against a double loop, and pictures given back from what it keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from predictive import encode, predicted
from visiontrim.ops.predictive import prediction_errors, spread_to

# ------------------------------------------------------------------------------------------------ the rule


def decode(picture: Tensor, kept: Tensor, tau: float, metric: str) -> Tensor:
    """The picture, of which only the kept units are looked at."""
    seen = torch.where(kept[..., None], picture.double(), torch.nan).tolist()
    for row in range(len(seen)):
        for column in range(len(seen[0])):
            if not kept[row, column]:
                seen[row][column] = predicted(seen, row, column, tau, metric)
    return torch.tensor(seen)


def few_colours(seed: int, blur: float = 0.0) -> Tensor:
    """Two pictures of up to 12 x 12 units of three values: patches of two or three colours, blurred by noise."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randint(1, 13, (2,), generator=generator).tolist()
    palette = torch.rand(2 + seed % 2, 3, generator=generator)
    coarse = torch.randint(0, len(palette), (2, -(-rows // 2), -(-columns // 2)), generator=generator)
    colour = coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :rows, :columns]
    flipped = torch.rand(colour.shape, generator=generator) < 0.15
    colour = torch.where(flipped, (colour + 1) % len(palette), colour)
    return palette[colour] + blur * torch.rand(*colour.shape, 3, generator=generator)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("metric", ["max", "mae", "rmse"])
@pytest.mark.parametrize(("tau", "anchored"), [(0.0, True), (0.0, False), (0.06, True), (0.06, False)])
def test_kept_units_are_those_of_the_double_loop(seed, metric, tau, anchored):
    pictures = few_colours(seed, blur=2 * tau)
    kept = prediction_errors(pictures, tau, metric, anchored=anchored) > tau
    assert kept.tolist() == [encode(picture, tau, metric, anchored) for picture in pictures]


@pytest.mark.parametrize("seed", range(12))
def test_kept_units_give_the_picture_back(seed):
    for tau in (0.0, 0.06):
        pictures = few_colours(seed, blur=2 * tau)
        for picture, kept in zip(pictures, prediction_errors(pictures, tau) > tau, strict=True):
            assert (decode(picture, kept, tau, "max") - picture).abs().max() <= tau


def test_sliding_errors_add_up():
    """A slope of 0.04 a unit: compared with what a decoder knows, every other unit stays, with itself none but one."""
    slope = 0.04 * torch.arange(9.0).view(1, 1, 9, 1)
    kept = [prediction_errors(slope, 0.05, anchored=anchored)[0, 0] > 0.05 for anchored in (True, False)]
    assert kept[0].tolist() == [place % 2 == 0 for place in range(9)]
    assert kept[1].tolist() == [place == 0 for place in range(9)]


@pytest.mark.parametrize("side", [2, 5, 9])
def test_a_rectangle_on_a_flat_page_keeps_three_of_its_corners(side):
    """Its first unit, what is right of its first row, what is below its first column; and the first of the page."""
    page = torch.zeros(1, 12, 14, 1)
    page[:, 2 : 2 + side, 3 : 3 + side] = 1.0
    kept = prediction_errors(page, 0.0)[0] > 0
    assert kept.nonzero().tolist() == [[0, 0], [2, 3], [2, 3 + side], [2 + side, 3]]


def test_places_are_added_where_there_are_none():
    """On 3 x 3 from the first corner: the opposite one, the other two, then the middle."""
    kept = torch.zeros(3, 3, 3, dtype=torch.bool)
    kept[0, 0, 0] = True
    kept[1] = True
    more = spread_to(kept, 5)
    assert more[0].nonzero().tolist() == [[0, 0], [0, 2], [1, 1], [2, 0], [2, 2]]
    assert torch.equal(more[1], kept[1])  # has enough
    assert torch.equal(more[2], more[0])  # has not even one
    assert spread_to(kept, 16).all()
    few = torch.rand(4, 6, 9, generator=torch.Generator().manual_seed(0)) < 0.15
    more = spread_to(few, 12)
    assert more.flatten(1).sum(1).tolist() == few.flatten(1).sum(1).clamp_min(12).tolist()
    assert (more | ~few).all()
