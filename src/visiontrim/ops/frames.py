"""Videos: frames compared with each other, cut into segments, and tiled into one another."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from visiontrim.ops.select import uniform_stride

Segments = list[tuple[int, int]]
"""First and last frame of each segment, in order."""


def whole_frames_lattice(grid: tuple[int, int, int], frames: list[int], count: int) -> Int[Tensor, " {count}"]:
    """``count`` raster indices of ``grid``, spread evenly over the given ``frames`` (ascending). On the CPU."""
    places = grid[1] * grid[2]
    lattice = uniform_stride((len(frames), *grid[1:]), count)
    return torch.tensor(frames)[lattice // places] * places + lattice % places


def static_windows(static: Bool[Tensor, "pairs places"]) -> Segments:
    """The segmentation of pairs + 1 frames that saves the most tokens (HoliTom).

    ``static[f, p]`` says whether place p does not change from frame f to f + 1. A window of frames saves its length
    less one for each place that never changes in it. Exact, by dynamic programming over the frames on the CPU; of
    equal savings the shorter last window is taken, so that frames with nothing to save stand alone.
    """
    static = static.cpu().to(torch.uint8)
    frames = len(static) + 1
    runs = [static[first:].cummin(0).values.sum(-1).tolist() for first in range(frames - 1)]
    saved, begins = [0], [0]
    for end in range(1, frames + 1):
        best, begin = saved[end - 1], end - 1
        for first in range(end - 2, -1, -1):
            steps = end - 1 - first
            if (total := saved[first] + runs[first][steps - 1] * steps) > best:
                best, begin = total, first
        saved.append(best)
        begins.append(begin)
    segments: Segments = []
    end = frames
    while end > 0:
        segments.append((begins[end], end - 1))
        end = begins[end]
    return segments[::-1]


def cut_at_changes(similarity: Float[Tensor, " pairs"], least: int, threshold: float) -> Segments:
    """Segments of pairs + 1 frames, cut where the similarity of two frames is low (FastVID, dynamic segmentation).

    Cuts are the ``least - 1`` lowest similarities (all, if there are no more; ties to the earlier) and all below
    ``threshold``.
    """
    lowest = similarity.sort(stable=True).indices[: max(0, least - 1)].tolist()
    cuts = sorted({*lowest, *(similarity < threshold).nonzero()[:, 0].tolist()})
    return list(zip([0, *(cut + 1 for cut in cuts)], [*cuts, len(similarity)], strict=True))


def temporal_gridding(
    frames: Float[Tensor, "batch frames rows columns dim"], levels: tuple[int, ...] = (2, 4, 8)
) -> Float[Tensor, "batch frames rows columns dim"]:
    """Frames, some of which are overwritten by 2 x 2 grids of earlier ones (ST-GridPool, pyramid temporal gridding).

    For each of ``levels`` in turn, the last frame of every block of so many frames is taken; of four taken in a row,
    shrunk to half their sides by area averages, the grid in raster order takes the place of the fourth. Later levels
    see what earlier ones have written; three or fewer at the end stay. Where a side is odd, the grid loses its last
    row or column. float32; the input is left alone.
    """
    batch, length, rows, columns, dim = frames.shape
    values = frames.float().permute(0, 1, 4, 2, 3).clone()
    height, width = math.ceil(rows / 2), math.ceil(columns / 2)
    for block in levels:
        taken = length // block
        sampled = [round((place + 1) * length / taken - 1) for place in range(taken)]
        groups = taken // 4
        if not groups:
            continue
        small = F.adaptive_avg_pool2d(values[:, sampled[: 4 * groups]].flatten(0, 1), (height, width))
        tiles = small.view(batch, groups, 2, 2, dim, height, width).permute(0, 1, 4, 2, 5, 3, 6)
        grids = tiles.reshape(batch, groups, dim, 2 * height, 2 * width)
        values[:, sampled[3 : 4 * groups : 4]] = grids[..., :rows, :columns]
    return values.permute(0, 1, 3, 4, 2)
