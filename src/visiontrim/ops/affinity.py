"""Local token affinity (LTAM, VisionTrim eq. 4-5): how much a token resembles its neighbours on the grid.

The kernel of two tokens with features F and coordinates P is ``-(|dF| / (w1 sigma_f))^2 - w3 (|dP| / (w2 sigma_p))^2``,
and the affinity of a token is the mean kernel over its neighbourhood. Eq. 5 takes the softmax over tokens of it.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Sigma = Literal["pairs", "entries"]
"""Scale of a difference: the standard deviation of the difference norms over all neighbour pairs of the image
("pairs"), or that of the entries of all features, and of all (row, column) coordinates, of the image ("entries")."""

Border = Literal["valid", "window"]
"""Divisor of the mean: the neighbours that exist ("valid"), or all places of the window, so that a missing neighbour
counts as an equal one ("window")."""

PAIRS = 1 << 20
"""Distances between tokens that :func:`nearest_affinity` holds at a time (8 MB)."""


def local_affinity(
    features: Float[Tensor, "batch tokens dim"],
    coordinates: Int[Tensor, "batch tokens 3"],
    grid: tuple[int, int, int],
    *,
    window: int = 3,
    w1: float = 1.0,
    w2: float = 1.0,
    w3: float = 0.5,
    sigma: Sigma = "pairs",
    centre: bool = False,
    border: Border = "valid",
) -> Float[Tensor, "batch tokens"]:
    """Mean kernel (eq. 4) of each token with its neighbours in the ``window`` x ``window`` square of its own frame.

    ``coordinates`` are distinct (frame, row, column) places on ``grid`` = (frames, rows, columns), in any order. The
    tokens may be a part of the grid: neighbours are then those inside the window that are there. ``centre`` counts the
    token itself, whose kernel is 0, as one of its neighbours. With ``border="valid"`` a token without any neighbour
    gets the mean of the tokens that have one. A sigma of 0 (constant features) leaves its term out.

    float32, at most 0, before the softmax. Holds O(tokens x window^2) numbers and one copy of the features at a time.
    Raises :class:`ValueError` for an even window or one below 3.
    """
    if window < 3 or window % 2 == 0:
        raise ValueError(f"window={window} has no ring of neighbours: give an odd number of at least 3")
    ahead, behind = _window_neighbours(coordinates, grid, window)
    # every pair once: a token computes the kernel of the pairs ahead of it and looks up that of the pairs behind it
    kernel = _kernel(features, coordinates, ahead, w1, w2, w3, sigma)
    mirrored = kernel.gather(1, behind.clamp(min=0)).masked_fill(behind < 0, 0.0)
    total = kernel.sum(-1) + mirrored.sum(-1)
    present = (ahead >= 0).sum(-1) + (behind >= 0).sum(-1)
    if border == "window":
        return total / (window * window - (not centre))
    return _mean(total, present, centre)


def nearest_affinity(
    features: Float[Tensor, "batch tokens dim"],
    coordinates: Int[Tensor, "batch tokens 3"],
    *,
    neighbours: int = 8,
    w1: float = 1.0,
    w2: float = 1.0,
    w3: float = 0.5,
    sigma: Sigma = "pairs",
) -> Float[Tensor, "batch tokens"]:
    """As :func:`local_affinity`, over the ``neighbours`` tokens of the same frame that are nearest on the grid.

    For the irregular sets that earlier stages leave, where a window may be empty. Of two tokens at the same distance
    the one with the lower index counts as the nearer. Holds about ``PAIRS`` distances at a time.
    """
    index = _nearest(coordinates, min(neighbours, coordinates.shape[1] - 1))
    kernel = _kernel(features, coordinates, index, w1, w2, w3, sigma)
    return _mean(kernel.sum(-1), (index >= 0).sum(-1), centre=False)


def _window_neighbours(
    coordinates: Int[Tensor, "batch tokens 3"], grid: tuple[int, int, int], window: int
) -> tuple[Int[Tensor, "batch tokens half"], Int[Tensor, "batch tokens half"]]:
    """Indices of the neighbours after each token in raster order and of those before it; -1 where there is none.

    Column j of the second belongs to the opposite offset of column j of the first.
    """
    frames, rows, columns = grid
    radius = window // 2
    height, width = rows + 2 * radius, columns + 2 * radius  # a margin, so that offsets never leave the frame
    batch, tokens = coordinates.shape[:2]
    device = coordinates.device
    frame, row, column = coordinates.long().unbind(-1)
    place = (frame * height + row + radius) * width + column + radius
    ordinals = torch.arange(tokens, device=device).expand(batch, tokens)
    occupant = torch.full((batch, frames * height * width), -1, device=device).scatter(1, place, ordinals)
    after = torch.arange(window * window // 2 + 1, window * window, device=device)  # those before mirror them
    offsets = (after // window - radius) * width + after % window - radius

    def look(places: Tensor) -> Tensor:
        return occupant.gather(1, places.flatten(1)).view(batch, tokens, -1)

    return look(place[..., None] + offsets), look(place[..., None] - offsets)


def _nearest(coordinates: Int[Tensor, "batch tokens 3"], count: int) -> Int[Tensor, "batch tokens count"]:
    """The ``count`` nearest tokens of the same frame, -1 where there are fewer."""
    batch, tokens = coordinates.shape[:2]
    frame, row, column = coordinates.long().unbind(-1)
    ordinals = torch.arange(tokens, device=coordinates.device)
    far = torch.iinfo(torch.int64).max
    nearest = []
    for some in ordinals.split(max(1, PAIRS // (batch * tokens))):
        down, right, away = (axis[:, some, None] - axis[:, None] for axis in (row, column, frame))
        key = (down.square() + right.square()) * tokens + ordinals  # distance, then index: no two keys are equal
        key = key.masked_fill((away != 0) | (some[:, None] == ordinals), far)
        lowest = key.topk(count, largest=False)
        nearest.append(lowest.indices.masked_fill(lowest.values == far, -1))
    return torch.cat(nearest, 1)


def _kernel(
    features: Float[Tensor, "batch tokens dim"],
    coordinates: Int[Tensor, "batch tokens 3"],
    index: Int[Tensor, "batch tokens pairs"],
    w1: float,
    w2: float,
    w3: float,
    sigma: Sigma,
) -> Float[Tensor, "batch tokens pairs"]:
    """Kernel of each token with the tokens of ``index``, 0 where that is -1."""
    present = index >= 0
    index = index.clamp(min=0)
    features = features.float()
    places = coordinates[..., 1:].float()
    feature_norm, place_norm = _pair_norms(features, index), _pair_norms(places, index)
    if sigma == "pairs":
        feature_sigma, place_sigma = _deviation(feature_norm, present), _deviation(place_norm, present)
    else:
        feature_sigma, place_sigma = features.flatten(1).std(-1), places.flatten(1).std(-1)
    kernel = _squared_ratio(feature_norm, w1, feature_sigma) + w3 * _squared_ratio(place_norm, w2, place_sigma)
    return (-kernel).masked_fill(~present, 0.0)


def _pair_norms(
    values: Float[Tensor, "batch tokens dim"], index: Int[Tensor, "batch tokens pairs"]
) -> Float[Tensor, "batch tokens pairs"]:
    """|values - values[index]|. Direct differences: the expanded square loses small distances to rounding."""
    batch, tokens, dim = values.shape
    flat = values.reshape(batch * tokens, dim)
    rows = index + tokens * torch.arange(batch, device=index.device)[:, None, None]
    if dim <= 2:  # coordinates
        return torch.linalg.vector_norm(flat[rows] - values[:, :, None], dim=-1)
    norms = [
        torch.linalg.vector_norm(flat.index_select(0, rows[..., pair].flatten()).sub_(flat), dim=-1)
        for pair in range(index.shape[-1])
    ]
    return torch.stack(norms, -1).view(index.shape) if norms else values.new_zeros(index.shape)


def _deviation(
    norms: Float[Tensor, "batch tokens pairs"], present: Bool[Tensor, "batch tokens pairs"]
) -> Float[Tensor, " batch"]:
    """Standard deviation over the pairs of each image; 0 where nothing but rounding makes them differ."""
    count = present.sum((1, 2)).clamp(min=1)
    mean = (norms * present).sum((1, 2)) / count
    deviation = (((norms - mean[:, None, None]) * present).square().sum((1, 2)) / count).sqrt()
    return deviation.masked_fill(deviation <= 1e-6 * mean, 0.0)


def _squared_ratio(
    norms: Float[Tensor, "batch tokens pairs"], weight: float, sigma: Float[Tensor, " batch"]
) -> Float[Tensor, "batch tokens pairs"]:
    inverse = (1 / (weight * sigma)).masked_fill(sigma == 0, 0.0)
    return (norms * inverse[:, None, None]).square()


def _mean(
    total: Float[Tensor, "batch tokens"], present: Int[Tensor, "batch tokens"], centre: bool
) -> Float[Tensor, "batch tokens"]:
    """Mean over the neighbours that exist; a token without any gets the mean of the others."""
    alone = present == 0
    mean = total / (present + centre).clamp(min=1)  # 0 for a token that is alone
    others = mean.sum(-1, keepdim=True) / (~alone).sum(-1, keepdim=True).clamp(min=1)
    return torch.where(alone, others, mean)
