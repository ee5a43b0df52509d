"""Optimal transport between two sets of tokens."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor


def sinkhorn(
    cost: Float[Tensor, "batch sources targets"], eps: float = 0.1, iterations: int = 100
) -> Float[Tensor, "batch sources targets"]:
    """Entropic transport plan: every source gives 1 / sources, every target gets 1 / targets.

    ``eps`` is the temperature, small ones send each source to its cheapest targets. In logarithms, float32: a kernel
    exp(-cost / eps) alone underflows. The last of the ``iterations`` meets the targets exactly, the sources nearly.
    """
    kernel = -cost.float() / eps
    sources, targets = cost.shape[1:]
    down = kernel.new_zeros(len(cost), sources, 1)
    across = kernel.new_zeros(len(cost), 1, targets)
    for _ in range(iterations):
        down = -math.log(sources) - (kernel + across).logsumexp(2, keepdim=True)
        across = -math.log(targets) - (kernel + down).logsumexp(1, keepdim=True)
    return (kernel + down + across).exp()
