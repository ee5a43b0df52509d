"""Windows of a grid."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def windows(coordinates: Int[Tensor, "batch tokens 3"], grid: tuple[int, int, int], side: int) -> tuple[Tensor, int]:
    """Number of the ``side`` x ``side`` window that each token lies in [batch, tokens], and how many windows there are.

    Windows are numbered in raster order, frame by frame. Rows and columns that are left over at the end join the last
    window.
    """
    frames, rows, columns = grid
    down, across = max(1, rows // side), max(1, columns // side)
    frame, row, column = coordinates.long().unbind(-1)
    window = (frame * down + (row // side).clamp(max=down - 1)) * across + (column // side).clamp(max=across - 1)
    return window, frames * down * across


def crosses(
    chosen: Bool[Tensor, "batch tokens"], coordinates: Int[Tensor, "batch tokens 3"], grid: tuple[int, int, int]
) -> Bool[Tensor, "batch tokens"]:
    """Tokens whose neighbour above, below, left or right on the grid, in the same frame, is ``chosen``."""
    frames, rows, columns = grid
    height, width = rows + 2, columns + 2  # a margin, so that neighbours never leave the frame
    frame, row, column = coordinates.long().unbind(-1)
    place = (frame * height + row + 1) * width + column + 1
    board = torch.zeros(len(chosen), frames * height * width, dtype=torch.bool, device=chosen.device)
    board = board.scatter(1, place, chosen)
    steps = (1, -1, width, -width)
    return torch.stack([board.gather(1, place + step) for step in steps]).any(0)
