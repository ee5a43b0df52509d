"""IVC-Prune: tokens whose values are those of the question, and the ones by which RoPE knows its coordinates.

"IVC-Prune: Revealing the Implicit Visual Coordinates in LVLMs for Vision Token Pruning", ICLR 2026, arXiv 2602.03060.
Official code: FireRedTeam/IVC-Prune, MIT. Made for grounding: position ids are kept. No attention is read.

Before decoder layer 16 of 32, W_ij is the softmax over j of v_i . v_j / sqrt(d), mean over heads, where v are the
values of the layer before:

1. Seeds are the ``seeds`` of the image tokens with the largest mean W from the text after the image.
2. f_j is the mean of W_ij over the text and the seeds.
3. Coordinates are the ``coordinates`` of the tokens whose rotary encoding has the largest mean cosine, and as many with
   the largest mean sine: they depend on places alone.
4. Seeds and coordinates go on, and by f as many others as fill the count; half of the tokens as published.

The cache of *all* layers, also those before, then holds only what went on.

The releases are two methods under one name. ``variant="paper"`` has the rule of the one for Qwen2.5-VL, which gives the
paper's half: the softmax is over image tokens. ``variant="code"`` has that for LLaVA: over everything, with
``coordinates=0.05``; there the count is what a fifth by f and the others unite to, here it is ``keep``.

Differences: "everything" is the image and the text after it, not the text before. Text starts right after the image,
not two tokens later. If seeds and coordinates are more than the count, seeds go on first, then coordinates, each by
falling f. The cosines of mRoPE are averaged as the layers get them.

Seeds are a share of the tokens and each is compared with all of them: a hundredth of N x N, so work and memory grow
with the square of the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from visiontrim.core.budget import Depth
from visiontrim.core.registry import register
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.methods.cascade import Cascade, Counts
from visiontrim.methods.checks import require
from visiontrim.ops.select import gather, top_k


@register
@dataclass(frozen=True)
class IVCPrune(Cascade):
    keep: Counts = (0.5,)
    """Mean number of vision tokens per decoder layer (int) or its fraction (float); a 1-tuple gives what is left from
    ``layer`` on."""
    layer: Depth = 16 / 32
    """Decoder layer before which tokens are removed: its index, or a fraction of the depth."""
    seeds: float = 0.01
    """Share of the tokens that are seeds; at least one is."""
    coordinates: float = 0.1
    """Share of the tokens that stay for their cosines, and for their sines."""
    variant: Literal["paper", "code"] = "paper"

    name: ClassVar[str] = "ivc-prune"
    summary: ClassVar[str] = "keeps what has the question's values, and the coordinates of the rotary encoding"
    paper: ClassVar[str] = "arXiv 2602.03060, ICLR 2026"
    text_aware: ClassVar[bool] = True
    narrows_cache: ClassVar[bool | Literal["all"]] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("seeds", "coordinates"):
            share = getattr(self, name)
            require(0 <= share <= 1, f"{name}={share} is no share: give a number in [0, 1]")

    @property
    def depths(self) -> tuple[Depth, ...]:
        return (self.layer,)

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"text.question", "decoder.values", "decoder.mean_rotary"})

    def choose(self, view: View, count: int) -> Keep:
        tokens = view.features.shape[1]
        mask = view.text.question.mask.float()
        values = view.decoder.values
        of_text = self.alike(values.text, view)
        asked = (of_text * mask[..., None]).sum(1)
        seeds = top_k(asked, max(1, round(self.seeds * tokens)))
        of_seeds = gather(values.tokens.transpose(1, 2), seeds).transpose(1, 2)
        score = asked + self.alike(of_seeds, view).sum(1)
        first = torch.zeros_like(score)
        for waves in view.decoder.mean_rotary.unbind(-1):
            first.scatter_(1, top_k(waves.float(), round(self.coordinates * tokens)), 1.0)
        first.scatter_(1, seeds, 2.0)
        place = score.argsort(dim=1, descending=True, stable=True).argsort(1)
        return Keep(top_k(first * tokens - place, count))

    def alike(self, rows: Float[Tensor, "batch heads rows dim"], view: View) -> Float[Tensor, "batch rows tokens"]:
        """W of ``rows`` of values and the image tokens."""
        values = view.decoder.values
        logits = rows.float() @ values.tokens.float().mT * rows.shape[-1] ** -0.5
        if self.variant == "code":
            others = rows.float() @ values.text.float().mT * rows.shape[-1] ** -0.5
            others = others.masked_fill(~view.text.question.mask[:, None, None], -torch.inf)
            return torch.cat([logits, others], -1).softmax(-1)[..., : logits.shape[-1]].mean(1)
        return logits.softmax(-1).mean(1)
