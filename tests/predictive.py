"""PixelPrune's rule as a double loop in float64, one unit after the other."""

from __future__ import annotations

from torch import Tensor


def distance(a: list[float], b: list[float], metric: str) -> float:
    apart = [abs(x - y) for x, y in zip(a, b, strict=True)]
    if metric == "max":
        return max(apart)
    mean = sum(x if metric == "mae" else x * x for x in apart) / len(apart)
    return mean if metric == "mae" else mean**0.5


def predicted(known: list[list[list[float]]], row: int, column: int, tau: float, metric: str) -> list[float]:
    """What the units known so far say of the one at (row, column)."""
    if row == 0:
        return known[0][column - 1]
    if column == 0:
        return known[row - 1][0]
    left, above, corner = known[row][column - 1], known[row - 1][column], known[row - 1][column - 1]
    like_left = distance(corner, left, metric) <= tau
    like_above = distance(corner, above, metric) <= tau
    return above if like_left and not like_above else left


def encode(picture: Tensor, tau: float = 0.0, metric: str = "max", anchored: bool = True) -> list[list[bool]]:
    """Which units of [rows, columns, values] are kept, one unit after the other."""
    units = picture.double().tolist()
    known = [[list(unit) for unit in row] for row in units]
    kept = [[True] * len(row) for row in units]
    for row in range(len(units)):
        for column in range(len(units[0])):
            if row or column:
                guess = predicted(known, row, column, tau, metric)
                kept[row][column] = distance(units[row][column], guess, metric) > tau
                if anchored and not kept[row][column]:
                    known[row][column] = guess
    return kept
