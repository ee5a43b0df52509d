"""Which tokens: exact counts, ascending indices, ties to the lower index."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor


def top_k(scores: Float[Tensor, "batch tokens"], count: int) -> Int[Tensor, "batch {count}"]:
    """Indices of the ``count`` highest scores, ascending; of equal scores the lower index is taken.

    Raises :class:`ValueError` if there are not that many tokens.
    """
    tokens = scores.shape[1]
    if not 0 <= count <= tokens:
        raise ValueError(f"{count} of {tokens} tokens cannot be selected")
    # torch.topk breaks ties as it likes, and differently on every device
    ranked = scores.sort(dim=1, descending=True, stable=True).indices
    return ranked[:, :count].sort(dim=1).values


def leftovers(index: Int[Tensor, "batch kept"], tokens: int) -> Int[Tensor, "batch left"]:
    """The indices below ``tokens`` that are not in ``index`` (distinct in each row), ascending."""
    taken = torch.zeros(len(index), tokens, dtype=torch.uint8, device=index.device).scatter(1, index, 1)
    return taken.sort(dim=1, stable=True).indices[:, : tokens - index.shape[1]]


def gather(values: Shaped[Tensor, "batch tokens *rest"], index: Int[Tensor, "batch kept"]) -> Tensor:
    """``values[b, index[b, j]]``: [batch, kept, *rest]."""
    batch, tokens = values.shape[:2]
    # rows of memory in one go: several times faster than torch.gather with an expanded index
    rows = index + tokens * torch.arange(batch, device=index.device)[:, None] if batch > 1 else index
    return values.flatten(0, 1).index_select(0, rows.flatten()).view(*index.shape, *values.shape[2:])


def even_stride(tokens: int, count: int) -> Int[Tensor, " {count}"]:
    """``count`` indices below ``tokens``, ascending: the centres of as many equal intervals. On the CPU."""
    if not 0 <= count <= tokens:
        raise ValueError(f"{count} of {tokens} tokens cannot be selected")
    return ((2 * torch.arange(count) + 1) * tokens).div(2 * max(count, 1), rounding_mode="floor")


def uniform_stride(grid: tuple[int, int, int], count: int) -> Int[Tensor, " {count}"]:
    """Exactly ``count`` raster indices spread evenly over the frames, rows and columns of ``grid``. On the CPU.

    The count is shared out over the frames, and within a frame over about sqrt(count rows / columns) rows (the lattice
    with the same stride both ways), so that shares differ by one at most and the larger ones are spread evenly.
    Frames, rows and the columns of a row are the centres of equal intervals, so a square number on a square grid gives
    the plain lattice. Raises :class:`ValueError` if the grid has fewer than ``count`` places.
    """
    frames, rows, columns = grid
    if not 0 <= count <= frames * rows * columns:
        raise ValueError(f"{count} of {frames * rows * columns} tokens cannot be selected")
    used = even_stride(frames, min(frames, count))
    lattices = [
        _frame_lattice(rows, columns, share) + frame * rows * columns
        for frame, share in zip(used.tolist(), even_shares(count, len(used)), strict=True)
    ]
    return torch.cat(lattices) if lattices else used


def _frame_lattice(rows: int, columns: int, count: int) -> Int[Tensor, " {count}"]:
    shares = lattice_rows(rows, columns, count)
    used = even_stride(rows, len(shares))
    return torch.cat(
        [even_stride(columns, share) + row * columns for row, share in zip(used.tolist(), shares, strict=True)]
    )


def lattice_rows(rows: int, columns: int, count: int) -> list[int]:
    """How many of ``count`` places each row of the lattice of :func:`uniform_stride` has, top to bottom."""
    fewest = -(-count // columns)  # a row holds at most ``columns``
    return even_shares(count, min(rows, count, max(fewest, round((count * rows / columns) ** 0.5))))


def even_shares(total: int, parts: int) -> list[int]:
    """``total`` as a sum of ``parts`` whole numbers that differ by one at most, the larger ones spread evenly."""
    return [(part + 1) * total // parts - part * total // parts for part in range(parts)]
