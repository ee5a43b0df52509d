"""Recycling of pruned tokens (SparseVLM): the best of them are clustered by density peaks and averaged."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from visiontrim.ops.select import gather


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
    Holds tokens^2 numbers.
    Raises :class:`ValueError` for more centres or neighbours than tokens.
    """
    batch, tokens, dim = features.shape
    if not 1 <= count <= tokens or not 1 <= neighbours <= tokens:
        raise ValueError(f"{count} centres and {neighbours} neighbours among {tokens} tokens are impossible")
    values = features.float()
    places = values.detach()
    # direct differences, not the expanded square: near tokens must not be lost to rounding
    distance = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist") * dim**-0.5
    nearest = distance.topk(neighbours, largest=False).values
    density = (-nearest.square().mean(-1)).exp()
    rank = density.argsort(dim=1, descending=True, stable=True).argsort(1)
    denser = rank[:, None] < rank[..., None]
    delta = distance.masked_fill(~denser, float("inf")).amin(-1)
    delta = torch.where(rank == 0, distance.flatten(1).amax(-1, keepdim=True), delta)
    ranked = (density * delta).sort(dim=1, descending=True, stable=True).indices
    centres = ranked[:, :count].sort(1).values

    to_centres = gather(distance, centres).mT
    first = (to_centres == to_centres.amin(-1, keepdim=True)).to(torch.uint8).argmax(-1)
    ordinals = torch.arange(count, device=features.device).expand(batch, count)
    assignment = first.scatter(1, centres, ordinals)
    member = torch.zeros_like(to_centres).scatter_(-1, assignment[..., None], 1.0)
    means = member.mT @ values / member.sum(1)[..., None]
    return Clusters(centres, assignment, means.to(features.dtype))
