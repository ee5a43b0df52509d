"""Subsets whose members differ: max-min distances, determinantal point processes, repeated thinning of look-alikes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from visiontrim.ops.select import gather

SIMILARITIES = 1 << 22
"""Similarities that are held at a time (16 MB)."""
NEAREST = 64
"""Tokens most like each that :func:`thin_out` looks at first in lists longer than ``SHORT``."""
SHORT = 1024


def max_min_picks(features: Float[Tensor, "batch tokens dim"], count: int) -> Int[Tensor, "batch {count}"]:
    """Greedy max-min selection under the cosine distance (DivPrune): ``count`` tokens in the order of their choice.

    The first is the token whose nearest neighbour is farthest away, each next one that which is farthest from its
    nearest chosen token. Ties go to the lower index. float32; one row of similarities a step, no map. The first pick
    compares all pairs (:func:`nearest_similarity`), so work grows with the square of the tokens.
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
    """Dot product of each token with the *other* token that is most like it; -inf for a token that is alone.

    Every pair is looked at, once for both of its tokens: what is nearest cannot be known otherwise. Holds
    ``SIMILARITIES`` numbers at a time.
    """
    batch, tokens = unit.shape[:2]
    best = torch.full((batch, tokens), -torch.inf, dtype=unit.dtype, device=unit.device)
    for start, similarity in later_similarities(unit):
        size = similarity.shape[1]
        similarity.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        here, after = best[:, start : start + size], best[:, start + size :]
        torch.maximum(here, similarity.amax(-1), out=here)
        if after.shape[1]:
            torch.maximum(after, similarity[:, :, size:].amax(1), out=after)
    return best


def later_similarities(
    unit: Float[Tensor, "batch tokens dim"],
) -> Iterator[tuple[int, Float[Tensor, "batch some left"]]]:
    """Dot products of a few tokens at a time with themselves and all later ones, and where these few begin."""
    batch, tokens = unit.shape[:2]
    # an eighth at most, so that half of the pairs are left out
    # an eighth, or as few as are worth a launch, so that half of the pairs are left out
    some = max(1, min(SIMILARITIES // (batch * tokens), max(256, -(-tokens // 8))))
    for start in range(0, tokens, some):
        yield start, unit[:, start : start + some] @ unit[:, start:].mT


def determinant_picks(vectors: Float[Tensor, "batch tokens dim"], count: int) -> Int[Tensor, "batch {count}"]:
    """Greedy maximum of det(V_S V_S^T) (Chen et al. 2018, alg. 1): ``count`` tokens in the order of their choice.

    A determinantal point process with quality q and unit features f has the vectors q f. Each step takes the token with
    the largest part outside the span of those taken, ties to the lower index; once nothing is outside, the lowest
    indices follow. float32, O(tokens x (dim + count)) work a step, no map. Linear in the tokens; every pick reads all
    vectors once, since what it takes from each hangs on it.
    """
    vectors = vectors.float()
    batch, tokens = vectors.shape[:2]
    outside = vectors.square().sum(-1)
    least = 1e-6 * outside  # below it there is only rounding of float32
    basis = vectors.new_zeros(batch, count, tokens)
    picks = vectors.new_zeros(batch, count, dtype=torch.long)
    for step in range(count):
        size, pick = outside.max(1, keepdim=True)
        picks[:, step : step + 1] = pick
        earlier = basis[:, :step]
        known = earlier.gather(2, pick[:, None].expand(-1, step, -1))
        row = torch.baddbmm(known.mT @ earlier, gather(vectors, pick), vectors.mT, beta=-1)[:, 0]
        # a token without a part outside takes nothing from the others
        part = row * torch.where(size > least.gather(1, pick), size.rsqrt(), 0.0)
        basis[:, step] = part
        outside = torch.addcmul(outside, part, part, value=-1)
        # those taken stay at -inf, what lies in the span at 0
        outside = outside.where((outside > least) | outside.isneginf(), 0.0).scatter_(1, pick, -torch.inf)
    return picks


def thin_out(
    features: Float[Tensor, "batch tokens dim"], order: Int[Tensor, "batch listed"], count: int, *, drop: int = 8
) -> Int[Tensor, "batch {count}"]:
    """Drop look-alikes from the list ``order`` of tokens until ``count`` are left (VisPruner, diverse tokens).

    A round deals the list out to two halves, a at the even and b at the odd places, drops from a the (up to ``drop``)
    tokens with the highest cosine to their nearest one in b, and goes on with the rest of a, most similar first,
    followed by b. Returns the tokens in the order of the last list. float32, or float64 if ``features`` are.

    As many rounds as that takes: how a list is dealt out hangs on the round before. In lists longer than ``SHORT`` the
    nearest one in b is looked for among the ``NEAREST`` tokens most like each, found anew whenever the list is half as
    long; if once it was not among them, which the host asks at the end, all is done again with all cosines. All pairs
    are compared, so work grows with the square of the tokens.
    """
    if count == 0 or count == order.shape[1]:
        return order[:, :count]
    unit = F.normalize(gather(features, order).to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
    if order.shape[1] > SHORT:
        places, missed = _thinned_by_nearest(unit, count, drop)
        if not bool(missed):
            return order.gather(1, places)
    return order.gather(1, _thinned(unit, count, drop))


def _thinned(unit: Float[Tensor, "batch listed dim"], count: int, drop: int) -> Int[Tensor, "batch {count}"]:
    """What is left, by all cosines."""
    cosine, length = (unit @ unit.mT).flatten(1), unit.shape[1]
    places = torch.arange(length, device=unit.device).expand(len(unit), -1)  # in the list
    while places.shape[1] > count:
        a, b = places[:, ::2], places[:, 1::2]
        pairs = (a[:, :, None] * length + b[:, None]).flatten(1)
        nearest = cosine.gather(1, pairs).view(*a.shape, -1).amax(-1)
        ranked = a.gather(1, nearest.sort(dim=1, descending=True, stable=True).indices)
        gone = min(drop, places.shape[1] - count, a.shape[1])
        places = torch.cat([ranked[:, gone:], b], 1)
    return places


def _thinned_by_nearest(
    unit: Float[Tensor, "batch listed dim"], count: int, drop: int
) -> tuple[Int[Tensor, "batch {count}"], Bool[Tensor, ""]]:
    """What is left, by the tokens most like each, and whether these were once not enough to go by."""
    batch, length = unit.shape[:2]
    places = torch.arange(length, device=unit.device).expand(batch, -1)  # in the list
    missed = torch.zeros((), dtype=torch.bool, device=unit.device)
    while places.shape[1] > count:
        # from here on in terms of this part of the list
        part, start = gather(unit, places), places
        value, nearest = _most_similar(part, min(NEAREST, part.shape[1] - 1))
        places, half = torch.arange(part.shape[1], device=unit.device).expand(batch, -1), part.shape[1] // 2
        while places.shape[1] > max(count, half):
            a, b = places[:, ::2], places[:, 1::2]
            inside = torch.zeros(batch, part.shape[1], dtype=torch.uint8, device=unit.device).scatter_(1, b, 1)
            candidates = gather(nearest, a)
            found = inside.gather(1, candidates.flatten(1)).view(candidates.shape)
            there, first = found.max(-1, keepdim=True)
            missed |= (there == 0).any()
            best = gather(value, a).gather(2, first)[..., 0]
            ranked = a.gather(1, best.sort(dim=1, descending=True, stable=True).indices)
            gone = min(drop, places.shape[1] - count, a.shape[1])
            places = torch.cat([ranked[:, gone:], b], 1)
        places = start.gather(1, places)
    return places, missed


def _most_similar(
    unit: Float[Tensor, "batch tokens dim"], count: int
) -> tuple[Float[Tensor, "batch tokens {count}"], Int[Tensor, "batch tokens {count}"]]:
    """The ``count`` largest dot products of each token with others, falling, and which tokens these are."""
    batch, tokens = unit.shape[:2]
    values, indices = [], []
    for start in range(0, tokens, some := max(1, SIMILARITIES // (batch * tokens))):
        similarity = unit[:, start : start + some] @ unit.mT
        similarity.diagonal(offset=start, dim1=1, dim2=2).fill_(-torch.inf)
        best = similarity.topk(count)
        values.append(best.values)
        indices.append(best.indices)
    return torch.cat(values, 1), torch.cat(indices, 1)
