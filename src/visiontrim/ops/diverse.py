"""Subsets whose members differ: max-min distances, determinantal point processes, repeated thinning of look-alikes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from visiontrim.ops.select import gather

SIMILARITIES = 1 << 22
"""Similarities that :func:`nearest_similarity` holds at a time (16 MB)."""


def max_min_picks(features: Float[Tensor, "batch tokens dim"], count: int) -> Int[Tensor, "batch {count}"]:
    """Greedy max-min selection under the cosine distance (DivPrune): ``count`` tokens in the order of their choice.

    The first is the token whose nearest neighbour is farthest away, each next one that which is farthest from its
    nearest chosen token. Ties go to the lower index. float32; one row of similarities a step, no map.
    """
    unit = F.normalize(features.float(), dim=-1)
    pick = nearest_similarity(unit).argmin(1)
    picks, nearest = [pick], torch.full(unit.shape[:2], -torch.inf, device=unit.device)
    for _ in range(count - 1):
        row = (unit @ gather(unit, pick[:, None]).mT)[..., 0]
        nearest = torch.maximum(nearest, row).scatter(
            1, pick[:, None], torch.inf
        )  # never again, whatever rounding says
        pick = nearest.argmin(1)
        picks.append(pick)
    return torch.stack(picks, 1)


def nearest_similarity(unit: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens"]:
    """Dot product of each token with the *other* token that is most like it; -inf for a token that is alone."""
    batch, tokens = unit.shape[:2]
    chunk = max(1, SIMILARITIES // (batch * tokens))
    best = []
    for start in range(0, tokens, chunk):
        similarity = unit[:, start : start + chunk] @ unit.mT
        similarity.diagonal(offset=start, dim1=1, dim2=2).fill_(-torch.inf)
        best.append(similarity.amax(-1))
    return torch.cat(best, 1)


def determinant_picks(vectors: Float[Tensor, "batch tokens dim"], count: int) -> Int[Tensor, "batch {count}"]:
    """Greedy maximum of det(V_S V_S^T) (Chen et al. 2018, alg. 1): ``count`` tokens in the order of their choice.

    A determinantal point process with quality q and unit features f has the vectors q f. Each step takes the token with
    the largest part outside the span of those taken, ties to the lower index; once nothing is outside, the lowest
    indices follow. float32, O(tokens x (dim + count)) work a step, no map.
    """
    vectors = vectors.float()
    batch, tokens = vectors.shape[:2]
    outside = vectors.square().sum(-1)
    least = 1e-6 * outside  # below it there is only rounding of float32
    basis = vectors.new_zeros(batch, tokens, count)
    picks = []
    for step in range(count):
        pick = outside.argmax(1, keepdim=True)
        size = outside.gather(1, pick)
        row = (vectors @ gather(vectors, pick).mT)[..., 0]
        known = (basis[..., :step] @ gather(basis, pick)[..., :step].mT)[..., 0]
        part = (row - known) / size.clamp(min=torch.finfo(size.dtype).tiny).sqrt()
        part = part.masked_fill(size <= least.gather(1, pick), 0.0)
        basis[..., step] = part
        outside = outside - part.square()
        spanned = (outside <= least) & (outside > -torch.inf)
        outside = outside.masked_fill(spanned, 0.0).scatter(1, pick, -torch.inf)
        picks.append(pick)
    return torch.cat(picks, 1)


def thin_out(
    features: Float[Tensor, "batch tokens dim"], order: Int[Tensor, "batch listed"], count: int, *, drop: int = 8
) -> Int[Tensor, "batch {count}"]:
    """Drop look-alikes from the list ``order`` of tokens until ``count`` are left (VisPruner, diverse tokens).

    A round deals the list out to two halves, a at the even and b at the odd places, drops from a the (up to ``drop``)
    tokens with the highest cosine to their nearest one in b, and goes on with the rest of a, most similar first,
    followed by b. Returns the tokens in the order of the last list. float32. Holds the cosines of all listed tokens.
    """
    if count == 0:
        return order[:, :0]
    unit = F.normalize(gather(features, order).float(), dim=-1)
    cosine = (unit @ unit.mT).flatten(1)
    length = order.shape[1]
    places = torch.arange(length, device=order.device).expand_as(order)  # in ``order``
    while places.shape[1] > count:
        a, b = places[:, ::2], places[:, 1::2]
        pairs = (a[:, :, None] * length + b[:, None]).flatten(1)
        nearest = cosine.gather(1, pairs).view(*a.shape, -1).amax(-1)
        ranked = a.gather(1, nearest.sort(dim=1, descending=True, stable=True).indices)
        gone = min(drop, places.shape[1] - count, a.shape[1])
        places = torch.cat([ranked[:, gone:], b], 1)
    return order.gather(1, places)
