"""Recycling of pruned tokens (SparseVLM): the best of them are clustered by density peaks and averaged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from visiontrim.ops.select import gather

HELD = 1 << 24
"""Distances that :func:`density_peaks` keeps for its second look at them (64 MB); more are computed twice, in parts."""


class Clusters(NamedTuple):
    """What :func:`density_peaks` returns."""

    centres: Int[Tensor, "batch centres"]
    """Ascending."""
    assignment: Int[Tensor, "batch tokens"]
    """For every token the position in ``centres`` of the one nearest to it; a centre's is its own."""
    features: Float[Tensor, "batch centres dim"]
    """Mean of every cluster, centre included."""


def density_peaks(features: Float[Tensor, "batch tokens dim"], count: int, neighbours: int) -> Clusters:
    """DPC-KNN clusters of ``features``.

    Distances are Euclidean, divided by sqrt(dim). The density of a token is exp(-mean squared distance to its
    ``neighbours`` nearest tokens), itself counted; delta is its distance to the nearest denser token, or for the
    densest the largest distance of all. The ``count`` tokens with the highest density x delta are centres, every other
    token goes to the nearest centre. float32; of equal densities the lower index counts as denser, of equal scores and
    distances the lower index is taken. Means come back in the dtype of ``features``; they alone have its gradients.

    Work grows with the square of the tokens, as every density hangs on all distances; ``HELD`` of them are held.
    Raises :class:`ValueError` for more centres or neighbours than tokens.
    """
    batch, tokens = features.shape[:2]
    if not 1 <= count <= tokens or not 1 <= neighbours <= tokens:
        raise ValueError(f"{count} centres and {neighbours} neighbours among {tokens} tokens are impossible")
    values = features.float()
    places = values.detach()
    small = batch * tokens * tokens <= HELD
    held = list(_distances(places)) if small else []
    nearest, farthest = [], []
    for distance in held or _distances(places):
        nearest.append(distance.topk(neighbours, largest=False).values)
        farthest.append(distance.flatten(1).amax(1))
    density = (-torch.cat(nearest, 1).square().mean(-1)).exp()
    rank = density.argsort(dim=1, descending=True, stable=True).argsort(1)
    delta, start = [], 0
    for distance in held or _distances(places):
        rows = rank[:, start : start + distance.shape[1], None]
        delta.append(distance.masked_fill(rank[:, None] >= rows, float("inf")).amin(-1))
        start += distance.shape[1]
    delta = torch.where(rank == 0, torch.stack(farthest, 1).amax(1, keepdim=True), torch.cat(delta, 1))
    ranked = (density * delta).sort(dim=1, descending=True, stable=True).indices
    centres = ranked[:, :count].sort(1).values

    chosen, first = gather(places, centres), []
    for to_centres in _distances(places, chosen):
        first.append((to_centres == to_centres.amin(-1, keepdim=True)).to(torch.uint8).argmax(-1))
    ordinals = torch.arange(count, device=features.device).expand(batch, count)
    assignment = torch.cat(first, 1).scatter(1, centres, ordinals)
    member = torch.zeros(batch, count, tokens, device=features.device).scatter_(1, assignment[:, None], 1.0)
    means = member @ values / member.sum(2)[..., None]
    return Clusters(centres, assignment, means.to(features.dtype))


def _distances(
    rows: Float[Tensor, "batch tokens dim"], columns: Float[Tensor, "batch others dim"] | None = None
) -> Iterator[Float[Tensor, "batch some others"]]:
    """Distances of ``rows`` to ``columns`` (None: to each other), divided by sqrt(dim), float32, some rows at a time.

    By products in float64, tens of times faster than differences and as exact: what is left of the squares of float32
    numbers after they cancel is good to 1e-13 of them. Less than that is nothing, so that equal tokens are at 0.
    """
    columns = rows if columns is None else columns
    batch, dim = len(rows), rows.shape[2]
    some = max(1, HELD // (batch * columns.shape[1]))
    if rows.device.type == "mps":  # which has no float64
        for part in rows.split(some, 1):
            yield torch.cdist(part, columns, compute_mode="donot_use_mm_for_euclid_dist") * dim**-0.5
        return
    others = columns.double()
    size = others.square().sum(-1)[:, None]
    for part in rows.split(some, 1):
        exact = part.double()
        both = exact.square().sum(-1, keepdim=True) + size
        square = torch.baddbmm(both, exact, others.mT, alpha=-2)
        yield square.masked_fill_(square <= 1e-13 * both, 0.0).div_(dim).sqrt_().float()
