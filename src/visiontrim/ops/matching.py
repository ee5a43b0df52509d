"""Merging tokens into each other: which ones, and their mean."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from visiontrim.ops import host
from visiontrim.ops.diverse import SIMILARITIES, nearest_similarity
from visiontrim.ops.select import gather, leftovers

ROUNDING = 1e-6
"""By which two computations of the same cosine may differ."""


@dataclass(frozen=True)
class Merged:
    """Fewer tokens, and where each token went."""

    index: Int[Tensor, "batch kept"]
    """The token that took up the others."""
    features: Float[Tensor, "batch kept dim"]
    """float32."""
    assignment: Int[Tensor, "batch tokens"]


def match(
    metric: Float[Tensor, "batch tokens dim"], count: int, penalty: Float[Tensor, "batch tokens"] | None = None
) -> tuple[Int[Tensor, "batch {count}"], Int[Tensor, "batch {count}"]]:
    """``count`` tokens and what each merges into, by bipartite soft matching (ToMe, arXiv 2210.09461, section 3).

    Every second token, from the first on, is a source; its target is the most similar of the others by the cosine of
    ``metric``. The ``count`` sources with the largest similarity, less their ``penalty``, are taken; at most half of
    the tokens can be.
    """
    best, target = edges(metric)
    if penalty is not None:
        best = best - penalty[:, ::2]
    source = best.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return 2 * source, 2 * target.gather(1, source) + 1


def edges(
    metric: Float[Tensor, "batch tokens dim"],
) -> tuple[Float[Tensor, "batch sources"], Int[Tensor, "batch sources"]]:
    """Largest cosine of every second token, from the first on, to one of the others, and which of these it is.

    All of these pairs are compared, so work grows with the square of the tokens; memory does not.
    """
    unit = F.normalize(metric.float(), dim=-1)
    sources, targets = unit[:, ::2], unit[:, 1::2]
    some = max(1, SIMILARITIES // (len(unit) * max(1, targets.shape[1])))
    parts = [(part @ targets.mT).max(-1) for part in sources.split(some, 1)]
    return torch.cat([part.values for part in parts], 1), torch.cat([part.indices for part in parts], 1)


def match_any(
    metric: Float[Tensor, "batch tokens dim"], importance: Float[Tensor, "batch tokens"], count: int
) -> tuple[Int[Tensor, "batch {count}"], Int[Tensor, "batch {count}"]]:
    """``count`` tokens and what each merges into, by complete-graph soft matching (CrossGET, arXiv 2305.17455).

    Tokens are ranked by their largest cosine to another one, ties by index. The ``count`` with the smallest
    ``importance`` less their largest cosine to a token of later rank are taken; so the last one never is. Each merges
    into the most similar token that is not taken itself.

    Two tokens that are nearest to each other tie exactly: the lower index is ranked first. All pairs are compared once,
    so work grows with the square of the tokens, and tokens that may be taken once more: on the CPU those that are most
    similar to any other for their importance, and more of them only if these do not settle it; elsewhere, where to ask
    would stop the host, all. ``SIMILARITIES`` are held at a time.
    """
    unit = F.normalize(metric.float(), dim=-1)
    batch, tokens = unit.shape[:2]
    nearest = nearest_similarity(unit)
    # by rank from here on, so that of equal values the earlier rank is taken
    order = nearest.sort(dim=1, descending=True, stable=True).indices
    ranked, weight = gather(unit, order), importance.float().gather(1, order)
    least = weight - nearest.gather(1, order) - ROUNDING  # no token's value is below
    by_least = least.sort(dim=1, stable=True).indices
    known, some = min(tokens, 4 * count + 64), max(1, SIMILARITIES // (batch * tokens))
    while True:
        known = known if host.asks_freely(unit) else tokens
        maybe, later = by_least[:, :known].sort(dim=1).values, []
        rank = torch.arange(tokens, device=unit.device)
        for part in maybe.split(some, 1):
            similarity = gather(ranked, part) @ ranked.mT
            later.append(similarity.masked_fill_(rank <= part[..., None], -torch.inf).amax(-1))
        value, place = (weight.gather(1, maybe) - torch.cat(later, 1)).sort(dim=1, stable=True)
        if known == tokens or bool((value[:, count - 1] < least.gather(1, by_least[:, known, None])[:, 0]).all()):
            break
        known = min(tokens, 4 * known)
    source = order.gather(1, maybe.gather(1, place[:, :count]))
    taken = torch.zeros(unit.shape[:2], dtype=torch.bool, device=unit.device).scatter(1, source, True)
    target = [
        (gather(unit, part) @ unit.mT).masked_fill_(taken[:, None], -torch.inf).argmax(-1)
        for part in source.split(some, 1)
    ]
    return source, torch.cat(target, 1)


def merge_into(
    features: Float[Tensor, "batch tokens dim"],
    mass: Float[Tensor, "batch tokens"],
    source: Int[Tensor, "batch merged"],
    target: Int[Tensor, "batch merged"],
    weights: tuple[Float[Tensor, "batch merged"], Float[Tensor, "batch merged"]] | None = None,
) -> Merged:
    """Merge each ``source`` into its ``target``, as means weighted by ``mass``; what is left stays in order.

    Several sources may have the same target, but no target is a source. ``weights`` (of the source, of the target)
    replace the contribution s + t of a pair by w_s s + (w_t - 1) t + t, before the division by the mass (CrossGET).
    """
    index = leftovers(source, features.shape[1])
    own, other = mass.float().gather(1, source)[..., None], mass.float().gather(1, target)[..., None]
    giver, taker = gather(features, source).float(), gather(features, target).float()
    went_to = torch.zeros(mass.shape, dtype=torch.long, device=mass.device)
    went_to.scatter_(1, index, torch.arange(index.shape[1], device=index.device).expand_as(index))
    place = went_to.gather(1, target)
    went_to.scatter_(1, source, place)
    # what each source moves the mean of its target by; all other tokens are copied alone
    moved = own * (giver - taker)
    if weights is not None:
        moved = moved + (weights[0][..., None] - 1) * own * giver + (weights[1][..., None] - 1) * other * taker
    masses = mass.float().scatter_add(1, target, own[..., 0]).gather(1, target)
    mean = gather(features, index).float()  # a copy: no other is made
    mean.scatter_add_(1, place[..., None].expand_as(moved), moved / masses[..., None])
    return Merged(index, mean, went_to)


def best_pairs(similarity: Float[Tensor, "lines gaps"], count: int) -> Bool[Tensor, "lines gaps"]:
    """Per line the ``count`` disjoint pairs of neighbours with the largest sum of similarities.

    Gap q lies between token q and q + 1 of the line; of two choices as good, the one with the lower gaps is taken.
    Dynamic programming: best[t][k] is the largest sum of k pairs among the first t tokens,
    max(best[t - 1][k], best[t - 2][k - 1] + similarity[t - 2]).
    """
    lines, gaps = similarity.shape
    start = similarity.new_full((lines, count + 1), -torch.inf)
    start[:, 0] = 0
    earlier, before = start, start
    taken = []
    for gap in range(gaps):
        last = F.pad(earlier[:, :-1], (1, 0), value=-torch.inf) + similarity[:, gap, None]
        taken.append(last > before)
        earlier, before = before, torch.maximum(before, last)
    left = torch.full((lines, 1), count, device=similarity.device)
    chosen, blocked = [], torch.zeros_like(left, dtype=torch.bool)
    for gap in reversed(range(gaps)):
        pair = taken[gap].gather(1, left) & ~blocked
        left, blocked = left - pair.long(), pair
        chosen.append(pair)
    return torch.cat(chosen[::-1], 1)


def fixed_pairs(similarity: Float[Tensor, "lines gaps"], count: int) -> Bool[Tensor, "lines gaps"]:
    """Per line the ``count`` most similar of the pairs (0, 1), (2, 3), ..."""
    best = similarity[:, ::2].sort(dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(similarity, dtype=torch.bool).scatter(1, 2 * best, True)


def merge_axis(
    features: Float[Tensor, "batch tokens dim"],
    mass: Float[Tensor, "batch tokens"],
    lattice: tuple[int, int, int],
    axis: int,
    count: int,
    *,
    unit: int = 1,
    best: bool = True,
) -> Merged:
    """Merge ``count`` disjoint pairs of similar neighbours in every line along ``axis`` of ``lattice``.

    ``axis`` 1 runs down the rows, 2 along the columns of (frames, rows, columns). Similarity is the cosine of the means
    over the ``unit`` patches that stand side by side in a token, without gradients. Pairs become means weighted by
    ``mass``; everything else stays as it is, and the tokens still form a box.
    """
    batch, tokens, dim = features.shape
    length, left = lattice[axis], lattice[axis] - count
    frames, rows, columns = (left if number == axis else side for number, side in enumerate(lattice))
    after = frames, rows, columns
    order = _lines(torch.arange(tokens, device=features.device), lattice, axis)
    lines, masses = features[:, order].reshape(-1, length, dim), mass[:, order].reshape(-1, length)
    means = F.normalize(lines.detach().float().view(*lines.shape[:2], unit, -1).mean(2), dim=-1)
    similarity = (means[:, 1:] * means[:, :-1]).sum(-1)
    pairs = best_pairs(similarity, count) if best else fixed_pairs(similarity, count)

    stays = F.pad(~pairs, (1, 0), value=True)  # a pair goes on as its first token
    first = stays.byte().sort(dim=1, descending=True, stable=True).indices[:, :left]
    second = (first + 1).clamp(max=length - 1)
    one, other = masses.gather(1, first)[..., None], masses.gather(1, second)[..., None]
    values = gather(lines, first).float()
    mean = (one * values + other * gather(lines, second).float()) / (one + other)
    values = torch.where(F.pad(pairs, (0, 1)).gather(1, first)[..., None], mean, values)

    # from lines back to raster order
    back = _lines(torch.arange(math.prod(after), device=order.device), after, axis).flatten()
    raster = back.argsort()
    index = order.expand(batch, -1, -1).reshape(-1, length).gather(1, first).view(batch, -1)[:, raster]
    went_to = back.view(-1, left).expand(batch, -1, -1).reshape(-1, left).gather(1, stays.cumsum(1) - 1)
    assignment = torch.empty(batch, tokens, dtype=torch.long, device=order.device)
    assignment[:, order.flatten()] = went_to.view(batch, tokens)
    return Merged(index, values.view(batch, -1, dim)[:, raster], assignment)


def _lines(raster: Int[Tensor, " tokens"], lattice: tuple[int, int, int], axis: int) -> Int[Tensor, "lines length"]:
    """Raster indices line after line along ``axis``."""
    return raster.view(lattice).movedim(axis, -1).reshape(-1, lattice[axis])
