"""Predictive coding of a grid of values: how far each place is from what its neighbours say of it."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

Metric = Literal["max", "mae", "rmse"]
"""Distance of two places: the largest, the mean, or the root mean square of the differences of their values."""


def prediction_errors(
    values: Float[Tensor, "pictures rows columns values"],
    tau: float,
    metric: Metric = "max",
    *,
    anchored: bool = True,
) -> Float[Tensor, "pictures rows columns"]:
    """Distance of every place to its prediction; places above ``tau`` are kept. Infinite at the first place.

    The prediction (PixelPrune, arXiv 2604.00886; like LOCO-I) is the place to the left, or the one above where that
    left of it is like the one diagonally above, which in turn is unlike the one above: an edge comes down there. Alike
    are places no farther apart than ``tau``. The first row is predicted from the left, the first column from above.

    ``anchored``: by what a decoder knows, in which a place that is not kept has its prediction's values, so that under
    "max" no value of the decoded picture is off by more than ``tau``. Goes through the anti-diagonals one by one.
    Without it, or with a ``tau`` of 0, where that makes no difference to what is kept, by the values themselves.
    """
    if anchored and tau > 0:
        return _anchored(values, tau, metric)
    across = F.pad(_distance(values[:, :, 1:], values[:, :, :-1], metric), (1, 0))  # to the place on the left
    down = F.pad(_distance(values[:, 1:], values[:, :-1], metric), (0, 0, 1, 0))  # to the place above
    error = across.clone()
    error[:, 1:, 0] = down[:, 1:, 0]
    edge = (down[:, 1:, :-1] <= tau) & (across[:, :-1, 1:] > tau)
    error[:, 1:, 1:] = torch.where(edge, down[:, 1:, 1:], across[:, 1:, 1:])
    error[:, 0, 0] = torch.inf
    return error


def _anchored(values: Tensor, tau: float, metric: Metric) -> Tensor:
    _, height, width, _ = values.shape
    decoded, error = values.clone(), values.new_full(values.shape[:3], torch.inf)
    for diagonal in range(1, height + width - 1):  # all that it is predicted from stands on the two before
        row = torch.arange(max(0, diagonal - width + 1), min(height, diagonal + 1), device=values.device)
        column = diagonal - row
        # beyond the border is the other side, which is not looked at
        left, above, corner = decoded[:, row, column - 1], decoded[:, row - 1, column], decoded[:, row - 1, column - 1]
        edge = (_distance(corner, left, metric) <= tau) & (_distance(corner, above, metric) > tau)
        from_above = (edge | (column == 0)) & (row > 0)
        predicted = torch.where(from_above[..., None], above, left)
        now = values[:, row, column]
        error[:, row, column] = away = _distance(now, predicted, metric)
        decoded[:, row, column] = torch.where((away > tau)[..., None], now, predicted)
    return error


def _distance(a: Float[Tensor, "*shape values"], b: Float[Tensor, "*shape values"], metric: Metric) -> Tensor:
    difference = a - b
    match metric:
        case "max":
            return difference.abs().amax(-1)
        case "mae":
            return difference.abs().mean(-1)
        case "rmse":
            return difference.square().mean(-1).sqrt()


def spread_to(kept: Bool[Tensor, "pictures rows columns"], count: int) -> Bool[Tensor, "pictures rows columns"]:
    """``kept`` and, where a picture has fewer than ``count``, the places farthest from them, one after the other.

    Euclidean distances on the grid; of equal ones the first in raster order; a picture without any begins with its
    first place. Never more than there are places.
    """
    pictures, rows, columns = kept.shape
    device, count = kept.device, min(count, rows * columns)
    places = torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(columns, device=device)).float()
    chosen = kept.flatten(1)
    some = chosen.byte().sort(dim=1, descending=True, stable=True).indices[:, :count]
    away = (places[:, None] - places[some][:, None]).square().sum(-1)
    nearest = away.masked_fill(~chosen.gather(1, some)[:, None], torch.inf).amin(-1)
    for _ in range(count):
        pick = nearest.argmax(1, keepdim=True)
        short = chosen.sum(1, keepdim=True) < count
        chosen = chosen.scatter(1, pick, chosen.gather(1, pick) | short)
        nearest = torch.minimum(nearest, (places - places[pick]).square().sum(-1))
    return chosen.view(pictures, rows, columns)
