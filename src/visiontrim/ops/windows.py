"""Windows of a grid."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
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


def penalise_peaks(
    score: Float[Tensor, "batch tokens"], window: Int[Tensor, "batch tokens"], count: int
) -> Float[Tensor, "batch tokens"]:
    """``score`` with the largest of each of ``count`` windows made larger: doubled if positive, halved if negative.

    Of equal scores the first is the largest (FiCoCo's local penalty, arXiv 2411.17686).
    """
    largest = score.new_full((len(score), count), -torch.inf).scatter_reduce(1, window, score, "amax")
    tokens = score.shape[1]
    place = torch.arange(tokens, device=score.device).expand_as(window)
    candidate = torch.where(score == largest.gather(1, window), place, tokens)
    first = window.new_full((len(score), count), tokens).scatter_reduce(1, window, candidate, "amin")
    peak = place == first.gather(1, window)
    return torch.where(peak, torch.where(score > 0, score * 2, score / 2), score)
