"""Average pooling of a grid to any number of cells."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from visiontrim.ops.select import even_shares, lattice_rows


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
