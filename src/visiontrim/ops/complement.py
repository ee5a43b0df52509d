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

PAIRS = 1 << 21
"""Text tokens times leftovers whose similarities are held at a time (8 MB)."""


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
    of being projected again. float32 inside, ``features`` come back in their dtype. Holds O(leftovers x centres) and
    at most about ``PAIRS`` text similarities. Raises :class:`ValueError` for ``count`` above the number of leftovers,
    and for raw scores with weighted merging: they may be negative, so they are no weights.
    """
    if scores == "raw" and merge != "uniform":
        raise ValueError(f"merge={merge!r} weighs by the scores, and raw scores are no weights: merge='uniform'")
    unit = functools.partial(F.normalize, dim=-1) if cosine else torch.Tensor.float
    source, space, softmax = features.float(), joint.float(), scores == "softmax"
    blocks = _blocks(unit(text.float()) * scale, mask, joint.shape[1])
    tokens = unit(space)

    index = top_k(_relevance(tokens, blocks, softmax), count)
    ordinals = torch.arange(count, device=index.device)
    own = torch.full(space.shape[:2], -1, device=index.device).scatter(1, index, ordinals.expand_as(index))
    others = (own < 0)[..., None]
    both = torch.cat([source, space], -1)
    total = centres = gather(both, index)
    terms = torch.ones_like(total[..., :1])
    normaliser = _log_normaliser(tokens, blocks) if softmax else None
    assignment = own
    for _ in range(iterations if count else 0):
        agreement = _agreement(tokens, unit(centres[..., source.shape[-1] :]), blocks, normaliser)
        nearest = agreement.argmax(-1)
        weights = ((nearest[..., None] == ordinals) & others).float()
        if merge != "uniform":
            weights = weights * agreement
        size = weights.sum(1)[..., None]
        grew = size > 0
        total = total + weights.mT @ both / torch.where(grew, size, 1.0)
        terms = terms + grew
        centres = total / terms if merge == "mean" else total
        assignment = torch.where(own >= 0, own, nearest)
    return Complement(centres[..., : source.shape[-1]].to(features.dtype), index, assignment)


Blocks = list[tuple[Float[Tensor, "batch _ space"], Bool[Tensor, "batch 1 _"]]]
"""Scaled text tokens, and which of them count, a bounded number at a time."""


def _blocks(words: Float[Tensor, "batch text space"], mask: Bool[Tensor, "batch text"], leftovers: int) -> Blocks:
    size = max(1, PAIRS // max(1, leftovers))
    return list(zip(words.split(size, 1), mask[:, None].split(size, -1), strict=True))


def _relevance(
    tokens: Float[Tensor, "batch tokens space"], blocks: Blocks, softmax: bool
) -> Float[Tensor, "batch tokens"]:
    """Mean over the text of the similarities, those of a text token softmaxed over the tokens (eq. 7)."""
    total = tokens.new_zeros(tokens.shape[:2])
    for words, mask in blocks:
        similarity = tokens @ words.mT
        if softmax:
            similarity = similarity.softmax(1)
        total += similarity.masked_fill(~mask, 0.0).sum(-1)
    return total / torch.cat([mask for _, mask in blocks], -1).sum(-1).clamp(min=1)


def _log_normaliser(tokens: Float[Tensor, "batch tokens space"], blocks: Blocks) -> Float[Tensor, "batch tokens 1"]:
    """Logarithm of the denominator of each token's softmax over the whole text."""
    lowest = torch.finfo(tokens.dtype).min
    parts = [(tokens @ words.mT).masked_fill(~mask, lowest).logsumexp(-1) for words, mask in blocks]
    return torch.stack(parts, -1).logsumexp(-1, keepdim=True)


def _agreement(
    tokens: Float[Tensor, "batch tokens space"],
    centres: Float[Tensor, "batch centres space"],
    blocks: Blocks,
    normaliser: Float[Tensor, "batch tokens 1"] | None,
) -> Float[Tensor, "batch tokens centres"]:
    """Sum over the text of (token to text) x (text to centre), softmaxed over the text and the centres (eq. 8).

    Without ``normaliser`` the similarities stay as they are.
    """
    total = tokens.new_zeros(*tokens.shape[:2], centres.shape[1])
    for words, mask in blocks:
        of_tokens, of_centres = tokens @ words.mT, centres @ words.mT
        if normaliser is not None:
            of_tokens, of_centres = (of_tokens - normaliser).exp(), of_centres.softmax(1)
        total += of_tokens.masked_fill(~mask, 0.0) @ of_centres.mT
    return total
