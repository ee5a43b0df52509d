"""LiteLVLM: for pixel grounding, keep the patches that are *least* like the text in CLIP's space.

"LiteLVLM", ICML 2026, arXiv 2605.13178. Official code: sejong-rcv/LiteLVLM, Apache-2.0; made for GLaMM.

1. For each of Q phrases, the T // Q patches with the lowest cosine to the phrase's end token are kept, in the space of
   CLIP's text tower. Dense patches of CLIP match a text best where nothing is, which CDPruner meets too.
2. What is missing to T, since phrases share patches, are the others that [CLS] attends to most in the last layer.

Raster order, consecutive positions. With one phrase the second half is empty: "the T lowest similarities".

Phrases are the windows in which CLIP's text tower reads the question, of 77 tokens each, so one but for long questions.
Where the language model's own embeddings of the question guide, which have no end token, the mean cosine with all of
them is the one phrase, and the *highest* are kept: the inversion is CLIP's. ``sign`` sets it by hand. Without a
question, the attention alone decides.

Differences: context is the attention of [CLS] with all heads as one, where the original multiplies it by the value and
takes the norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from visiontrim.core.registry import register
from visiontrim.core.signals import Signal, Text
from visiontrim.core.view import Keep, View
from visiontrim.methods.base import EncoderStep, cls_attention
from visiontrim.methods.checks import require
from visiontrim.ops.select import top_k

WIDE = ("encoder.cls_attention_wide", -1)


@register
@dataclass(frozen=True)
class LiteLVLM(EncoderStep):
    sign: int | None = None
    """1 or -1: the highest or the lowest cosines are kept; None: -1 with a CLIP text tower, 1 with word embeddings."""

    name: ClassVar[str] = "litelvlm"
    summary: ClassVar[str] = "patches least like the question in CLIP's space, for pixel grounding"
    paper: ClassVar[str] = "arXiv 2605.13178, ICML 2026"
    text_aware: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.sign in (None, 1, -1), f"sign={self.sign!r}: give 1, -1, or null for the guidance's own")

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"text.joint_normalised", "text.question", WIDE, ("encoder.cls_attention", -1)})

    def choose(self, view: View, count: int) -> Keep:
        wide = view.encoder.get(("cls_attention_wide", -1))
        context = cls_attention(view, -1) if wide is None else wide.float()
        if "question" not in view.text:
            return Keep(top_k(context, count))
        cosine, exists = phrases(view.text.question, view.text.joint_normalised)
        sign = self.sign or (-1 if view.text.question.ends is not None else 1)
        each = count // exists.sum(1).clamp(min=1)
        order = (-sign * cosine).argsort(dim=-1, stable=True).argsort(-1)
        chosen = ((order < each[:, None, None]) & exists[..., None]).any(1)
        # attention is at most 1, so chosen patches come before all others
        return Keep(top_k(context + 2 * chosen, count))


def phrases(
    text: Text, patches: Float[Tensor, "batch tokens joint"]
) -> tuple[Float[Tensor, "batch phrases tokens"], Tensor]:
    """Cosine of each phrase with each patch, and which phrases there are [batch, phrases]."""
    words, unit = F.normalize(text.tokens.float(), dim=-1), F.normalize(patches.float(), dim=-1)
    if text.ends is None:
        share = text.mask / text.mask.sum(-1, keepdim=True).clamp(min=1)
        return (share[:, None] @ words) @ unit.mT, torch.ones_like(text.mask[:, :1])
    order = text.ends.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : int(text.ends.sum(1).max())]
    of_ends = words.gather(1, order[..., None].expand(-1, -1, words.shape[-1]))
    return of_ends @ unit.mT, text.ends.gather(1, order)
