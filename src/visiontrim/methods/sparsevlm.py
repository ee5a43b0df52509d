"""SparseVLM: keep the tokens that the telling words of the prompt attend to, and recycle some of the others.

"SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", ICML 2025, arXiv 2410.04417;
github.com/Gumpest/SparseVLMs, Apache-2.0. ``version="v1.5"`` is the paper with fixed counts; ``"v2.0"`` is SparseVLM+.

Once, on the input embeddings, raters are chosen among the text tokens after the image: with M the softmax over them of
vision times text embeddings (a plain dot product), those whose mean over the vision tokens is above the mean of all.
After each of three decoder layers the score of a token is the attention of the raters to it in that layer, averaged
over raters and heads.

- v1.5: of the p tokens that go, the m = int(0.3 p) + 1 with the highest scores are clustered into int(m / 10) + 1 by
  density peaks (:func:`visiontrim.ops.recycle.density_peaks`, as many neighbours as clusters) and each cluster's mean
  follows the kept tokens. Position ids are consecutive again.
- v2.0: every head's attention is divided by what its rotary encoding alone would give (all-ones queries and keys, no
  softmax), the 14 heads with the largest total are averaged, nothing is recycled, position ids stay.

Layers 2, 6 and 15 run on all their tokens, so here the stages stand before layers 3, 7 and 16. Published counts are
what is kept after each of them, without the clusters: 300, 200, 110 ("192"), 303, 110, 36 ("128"), 238, 48, 26 ("96"),
66, 30, 17 ("64"); for v2.0 300, 200, 118; 238, 108, 60; 246, 54, 28; 66, 34, 20. Those names count a layer with what it
leaves. By what a layer processes they are means of 206.5, 145.4, 114.1, 82.3; and 206.8, 144.1, 113.9, 81.8.

Differences: a mean budget counts the clusters; clusters stand in raster order of their centres (by falling score
there, the same ones); the noise that breaks ties of densities is left out (the lower index
wins); text tokens that share a prompt with several images rate each image they follow. The count by the rank of the
attention (v1.0) differs from image to image, which a batch cannot hold: it is not here.

The clusters of v1.5 compare all recycled tokens with each other: work grows with the square of the tokens.
Distances are products but for the nearest ones: 3.4 times less CPU time at 576 tokens and 6.5 at 2,304 than by
differences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from visiontrim.core.budget import Depth
from visiontrim.core.method import Positions
from visiontrim.core.registry import register
from visiontrim.core.signals import Sides, Signal, Text
from visiontrim.core.view import Keep, View
from visiontrim.methods.cascade import Cascade, Counts
from visiontrim.methods.checks import require
from visiontrim.ops.recycle import density_peaks
from visiontrim.ops.select import gather, leftovers, top_k


@register
@dataclass(frozen=True)
class SparseVLM(Cascade):
    keep: Counts = (300, 200, 110)
    """Mean number of vision tokens per decoder layer, clusters included (int), or its fraction (float); a tuple gives
    the share or number that every stage keeps, to which the clusters are added."""
    layers: tuple[Depth, ...] = (3 / 32, 7 / 32, 16 / 32)
    """Decoder layers before which tokens are removed, each the one after the layer whose attention is read: indices,
    or fractions of the depth."""
    version: Literal["v1.5", "v2.0"] = "v1.5"
    """With recycling, or SparseVLM+."""
    recycled: float = 0.3
    """Share of the pruned tokens that is recycled (v1.5)."""
    cluster: int = 10
    """Recycled tokens to a cluster (v1.5)."""
    heads: int = 14
    """Heads that count (v2.0): 14 of 28 in the authors' model."""

    name: ClassVar[str] = "sparsevlm"
    summary: ClassVar[str] = "keeps what the prompt's telling words attend to, in stages, and recycles some of the rest"
    paper: ClassVar[str] = "arXiv 2410.04417, ICML 2025"
    text_aware: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.recycled <= 1, f"recycled={self.recycled} is no share: give a number in [0, 1]")
        require(self.cluster >= 1, f"cluster={self.cluster}: a cluster has at least 1 token")
        require(self.heads >= 1, f"heads={self.heads}: give at least 1")

    @property
    def depths(self) -> tuple[Depth, ...]:
        return self.layers

    @property
    def proportions(self) -> tuple[float, ...]:
        return (300, 200, 110) if len(self.layers) == 3 else super().proportions

    @property
    def positions(self) -> Positions:
        return "compact" if self.version == "v1.5" else "keep"

    @property
    def needs(self) -> frozenset[Signal]:
        needs: set[Signal] = {"text.question", "decoder.embeddings", "decoder.text_attention"}
        if self.version == "v2.0":
            needs.add("decoder.rotary")
        return frozenset(needs)

    def count(self, view: View, number: int, layers: tuple[int, ...]) -> int:
        count, arriving = super().count(view, number, layers), view.features.shape[1]
        if count >= arriving or isinstance(self.keep, tuple) or self.version == "v2.0":
            return count
        least = self.clusters(arriving)[1]
        require(least <= count, f"{self} leaves {count} of {arriving} tokens, fewer than {least} clusters: raise keep")
        # one more kept token adds one or none to the sum of kept and clusters: every sum can be had
        return next(kept for kept in range(count, -1, -1) if kept + self.clusters(arriving - kept)[1] <= count)

    def clusters(self, pruned: int) -> tuple[int, int]:
        """Tokens that are recycled of ``pruned`` ones, and the clusters that they form."""
        if self.version == "v2.0":
            return 0, 0
        recycled = min(pruned, int(self.recycled * pruned) + 1)
        return recycled, min(recycled, recycled // self.cluster + 1)

    def choose(self, view: View, count: int) -> Keep:
        score = self.score(view)
        index = top_k(score, count)
        recycled, clusters = self.clusters(score.shape[1] - count)
        return Keep(index) if not clusters else _recycled(view, score, index, recycled, clusters)

    def score(self, view: View) -> Float[Tensor, "batch tokens"]:
        """Attention of the raters to each token."""
        attention = view.decoder.text_attention
        weight = raters(view.decoder.embeddings, view.text.question).float()
        weight = weight / weight.sum(-1, keepdim=True)
        if self.version == "v1.5":
            return torch.einsum("bt,btn->bn", weight, attention.mean(1))
        rotary = view.decoder.rotary
        by_position = rotary.text.float() @ rotary.tokens.float().mT
        by_position = by_position * (rotary.tokens.shape[-1] / 2) ** -0.5
        of_heads = torch.einsum("bt,bhtn->bhn", weight, attention / by_position[:, None])
        best = top_k(of_heads.sum(-1), min(self.heads, of_heads.shape[1]))
        return gather(of_heads, best).mean(1)


def raters(embeddings: Sides, text: Text) -> Bool[Tensor, "batch text"]:
    """The text tokens that the vision tokens' embeddings point to more than on average."""
    logits = embeddings.tokens.float() @ embeddings.text.float().mT
    match = logits.masked_fill(~text.mask[:, None], torch.finfo(torch.float32).min).softmax(-1).mean(1)
    rating = match * text.mask
    above = rating > rating.sum(-1, keepdim=True) / text.mask.sum(-1, keepdim=True)
    # of words that are all alike, as of a single one, none is above the mean: then all rate
    return torch.where(above.any(-1, keepdim=True), above, text.mask)


def _recycled(view: View, score: Float[Tensor, "batch tokens"], index: Tensor, recycled: int, clusters: int) -> Keep:
    """The tokens of ``index``, then the means of ``clusters`` of the ``recycled`` best others."""
    rest = leftovers(index, score.shape[1])
    best = gather(rest, top_k(score.gather(1, rest), recycled))
    found = density_peaks(gather(view.content, best), clusters, clusters)
    kept = index.shape[1]
    outputs = torch.cat([index, gather(best, found.centres)], 1)
    features = torch.cat([gather(view.content, index), found.features], 1)
    ordinals = torch.arange(kept, device=index.device).expand_as(index)
    assignment = torch.full_like(score, -1, dtype=torch.long).scatter(1, index, ordinals)
    assignment = assignment.scatter(1, best, kept + found.assignment)
    is_cluster = torch.arange(kept + clusters, device=index.device).expand_as(outputs) >= kept
    return Keep(outputs, features, assignment, is_cluster)
