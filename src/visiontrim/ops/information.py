"""How much the attention of a text tells about where it looks."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def mutual_information(
    attention: Float[Tensor, "batch heads text tokens"], mask: Bool[Tensor, "batch text"]
) -> Float[Tensor, " batch"]:
    """Mutual information of text and vision tokens in bits, summed over heads (AutoPrune).

    With a the attention as it is, whose rows do not sum up to 1, and p its mean over the n text tokens:
    sum of a_xy / n log2(a_xy / p_y). 0 where all rows are equal. float32; ``mask`` is False for padding.
    """
    rows = mask[:, None, :, None]
    number = mask.sum(-1).clamp(min=1)[:, None, None]
    weight = attention.float() * rows
    mean = weight.sum(2) / number
    tiny = torch.finfo(torch.float32).tiny
    ratio = (weight.clamp(min=tiny) / mean[:, :, None].clamp(min=tiny)).log2()
    return (weight * ratio).sum((2, 3)).div(number[..., 0]).sum(1)
