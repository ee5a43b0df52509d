"""Pooling of a grid to any number of cells."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from visiontrim.ops.select import even_shares, gather, lattice_rows


def pool_cells(grid: tuple[int, int, int], count: int) -> tuple[Int[Tensor, " total"], Int[Tensor, " {count}"]]:
    """``grid`` cut into exactly ``count`` cells: the cell of each token, and the token in the middle of each cell.

    Tokens and cells are in raster order, on the CPU. Frames are cut into equal parts, parts into bands of rows, bands
    into cells along the columns, as nearly square as the count allows; sizes along an axis differ by one at most. 144
    cells of 24 x 24 are squares of 2 x 2. Raises :class:`ValueError` if the grid has fewer than ``count`` places.
    """
    frames, rows, columns = grid
    if not 1 <= count <= frames * rows * columns:
        raise ValueError(f"{frames * rows * columns} tokens cannot be pooled to {count}")
    cells, middles = torch.empty(grid, dtype=torch.long), []
    for frame, depth, in_part in _cuts(frames, even_shares(count, min(frames, count))):
        for row, height, in_band in _cuts(rows, lattice_rows(rows, columns, in_part)):
            for column, width, _ in _cuts(columns, [1] * in_band):
                cells[frame : frame + depth, row : row + height, column : column + width] = len(middles)
                middle = frame + (depth - 1) // 2, row + (height - 1) // 2, column + (width - 1) // 2
                middles.append((middle[0] * rows + middle[1]) * columns + middle[2])
    return cells.flatten(), torch.tensor(middles)


def _cuts(length: int, shares: list[int]) -> Iterator[tuple[int, int, int]]:
    """Start and size of as many equal parts of an axis as there are ``shares``, each with its share."""
    start = 0
    for size, share in zip(even_shares(length, len(shares)), shares, strict=True):
        yield start, size, share
        start += size


def pool_by_weight(
    values: Float[Tensor, "batch tokens dim"],
    logits: Float[Tensor, "batch tokens"],
    cells: Int[Tensor, " tokens"],
    count: int,
) -> Float[Tensor, "batch {count} dim"]:
    """Mean of each cell's tokens, weighted by the softmax of ``logits`` over the cell, in the dtype of ``values``.

    ``cells`` numbers each token's cell, as :func:`pool_cells` does; none is empty. Equal logits give plain means.
    float32 inside; holds count x largest cell tokens, no map.
    """
    sizes = torch.bincount(cells, minlength=count)
    order = cells.sort(stable=True).indices
    place = torch.arange(int(sizes.max()), device=cells.device)
    absent = place >= sizes[:, None]
    members = order[((sizes.cumsum(0) - sizes)[:, None] + place).clamp(max=len(cells) - 1)]
    weights = logits.float()[:, members].masked_fill(absent, -torch.inf).softmax(-1)
    inside = gather(values.float(), members.flatten().expand(len(values), -1)).view(*weights.shape, -1)
    return (weights[..., None] * inside).sum(2).to(values.dtype)
