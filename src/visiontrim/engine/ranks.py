"""Several processes with one encoder (tensor parallelism): each hears all heads, and all keep what the first one chose.

It knows a group of processes; it does not know which engine made it, what is heard and what is chosen.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from visiontrim.core.view import Keep


@dataclass(frozen=True)
class Ranks:
    """The processes of ``group``, all of which see the same images, in the same calls.

    What they compute may differ in its last bits, where two scores tie or a kernel adds in no fixed order. Tokens that
    differ by process would mix in every later sum over the processes, so what is chosen is told, not computed anew.
    """

    group: Any
    """A process group of :mod:`torch.distributed`."""
    split: bool
    """Whether each has a part of the heads of the encoder, those of the first process first; else each has all."""

    def heads(self, own: Tensor) -> Tensor:
        """Queries or keys [pictures, heads, sequence, dim] of all heads, of those of this process."""
        if not self.split:
            return own
        parts = [torch.empty_like(own) for _ in range(distributed.get_world_size(self.group))]
        distributed.all_gather(parts, own.contiguous(), group=self.group)
        return torch.cat(parts, 1)

    def agreed(self, keep: Keep) -> Keep:
        """What the first process keeps; all must keep equally many, so no count may depend on what is seen."""
        first, told = distributed.get_global_rank(self.group, 0), {}
        for field in dataclasses.fields(keep):
            if isinstance(value := getattr(keep, field.name), Tensor):
                # bytes, as not every backend has every dtype
                told[field.name] = value.detach().clone(memory_format=torch.contiguous_format)
                distributed.broadcast(told[field.name].view(torch.uint8), first, group=self.group)
        return dataclasses.replace(keep, **told)
