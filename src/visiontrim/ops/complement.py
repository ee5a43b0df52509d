"""Text-guided vision complement (TGVC, VisionTrim eq. 7-11): leftovers that the text asks for, carrying the others."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from visiontrim.ops.select import gather, top_k

Scores = Literal["softmax", "raw"]
"""Text similarities as the softmaxes of eq. 7 and 8, or as they are (the released code)."""

Merge = Literal["add", "mean", "uniform"]
"""How a centre takes up its cluster: see :func:`complement`."""


class Complement(NamedTuple):
    """What :func:`complement` returns."""

    features: Float[Tensor, "batch centres dim"]
    """Merged features, in the order of ``centres``."""
    centres: Int[Tensor, "batch centres"]
    """The centres among the leftovers, ascending."""
    assignment: Int[Tensor, "batch leftovers"]
    """For every leftover the position in ``centres`` of the one that it went to in the last round, -1 for none."""


def complement(
    features: Float[Tensor, "batch leftovers dim"],
    joint: Float[Tensor, "batch leftovers space"],
    text: Float[Tensor, "batch text space"],
    mask: Bool[Tensor, "batch text"],
    count: int,
    *,
    scale: float,
    cosine: bool = True,
    scores: Scores = "softmax",
    merge: Merge = "add",
    iterations: int = 3,
) -> Complement:
    """Choose ``count`` centres by their relevance to the text and merge the other leftovers into them.

    ``joint`` and ``text`` are the leftovers and the text tokens in one space, where a similarity is ``scale`` times
    their cosine, or their dot product; a negative scale inverts it. ``mask`` is False for padding of the text. Centres
    are the leftovers most relevant to the text (eq. 7). A round assigns every other leftover to the centre that agrees
    with it most about the text tokens (eq. 8-9), and adds the cluster's weighted mean to the centre (eq. 10). An empty
    cluster leaves its centre as it is; ``iterations=0`` only chooses.

    - ``merge="add"``: eq. 10. The norm of a centre grows with every round.
    - ``merge="mean"``: eq. 10 divided by one more than the number of rounds in which the centre grew: the mean of the
      centre and of the cluster means that it took up. The clusters under a cosine are those of "add", the result
      stays on the scale of a feature.
    - ``merge="uniform"``: "add" with the unweighted mean of the cluster.

    The joint embedding is a linear map without bias, so a centre's embedding is merged with the same weights instead
    of being projected again. float32 inside, ``features`` come back in their dtype. Holds O(leftovers x (centres +
    text)) numbers. Raises :class:`ValueError` for ``count`` above the number of leftovers, and for raw scores with
    weighted merging: they may be negative, so they are no weights.
    """
    if scores == "raw" and merge != "uniform":
        raise ValueError(f"merge={merge!r} weighs by the scores, and raw scores are no weights: merge='uniform'")
    unit = functools.partial(F.normalize, dim=-1) if cosine else torch.Tensor.float
    softmax = scores == "softmax"
    words = (unit(text.float()) * scale).mT
    similarity = unit(joint.float()) @ words
    share = mask / mask.sum(-1, keepdim=True).clamp(min=1)
    relevance = (similarity.softmax(1) if softmax else similarity) @ share[..., None]
    index = top_k(relevance[..., 0], count)
    ordinals = torch.arange(count, device=index.device).expand_as(index)
    own = torch.full(joint.shape[:2], -1, device=index.device).scatter(1, index, ordinals)
    if iterations == 0 or count == 0:
        return Complement(gather(features, index), index, own)
    # what each leftover says about the text stays the same in all rounds, padding says nothing
    padding = ~mask[:, None]
    if softmax:
        of_tokens = similarity.masked_fill(padding, torch.finfo(similarity.dtype).min).softmax(-1)
    else:
        of_tokens = similarity.masked_fill(padding, 0.0)

    values, places = features.float(), joint.float()
    others = (own < 0)[..., None]
    total, centres = gather(values, index), gather(places, index)
    there, terms, nearest = centres, torch.ones_like(centres[..., :1]), own[..., None]
    for remaining in reversed(range(iterations)):
        of_centres = unit(centres) @ words
        agreement = of_tokens @ (of_centres.softmax(1) if softmax else of_centres).mT
        best, nearest = agreement.max(-1, keepdim=True)
        weight = others.float() if merge == "uniform" else best * others
        weights = torch.zeros_like(agreement).scatter_(-1, nearest, weight)
        size = weights.sum(1)[..., None]
        grew = size > 0
        size = torch.where(grew, size, 1.0)
        total = total + weights.mT @ values / size
        if merge == "mean":
            terms = terms + grew
        if remaining:
            there = total if joint is features else there + weights.mT @ places / size
            centres = there / terms if merge == "mean" else there
    assignment = torch.where(others, nearest, own[..., None])[..., 0]
    merged = total / terms if merge == "mean" else total
    return Complement(merged.to(features.dtype), index, assignment)
