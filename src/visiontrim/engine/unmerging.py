"""Virtual unmerging: attention sees a merged token at every place that it carries (``positions="unmerged"``).

DyMU's virtual token unmerging (VTU), arXiv 2504.17040. Official code: MikeWangWZHL/dymu, MIT.

Norms, projections and MLP of the decoder layers run on the merged tokens. In every attention, queries, keys and values
are repeated for all tokens of the uncompressed prompt, each being that of the token that it went to; attention is
causal, at the uncompressed positions; and the rows of one token are averaged before the output projection. So the
cache holds the repeated keys and values: memory and decoding are those of the plain model.

What a method dropped instead of merging it is gone in attention, too. This is the default of the released code; its
"exact" variant computes the same from dot products of the merged tokens. Difference: batches.

It knows where each token went; it does not know why.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from visiontrim.core.errors import TrimError
from visiontrim.engine.cache import chunk_mask
from visiontrim.engine.context import Context
from visiontrim.engine.forward import Alive, Forward, Prefill, Repeated
from visiontrim.engine.pack import gather, pack_left
from visiontrim.engine.upstream import DynamicSlidingWindowLayer, Upstream
from visiontrim.models.family import Family


class Unmerging:
    """Hooks on the attention of every decoder layer. Raises :class:`TrimError` where that cannot work."""

    def __init__(self, family: Family, upstream: Upstream, steps: Mapping[int, object], context: Context) -> None:
        self._context = context
        self._upstream = upstream
        self._attentions = [family.decoder_attention(layer) for layer in range(len(family.language_model.layers))]
        name = type(family.model).__name__
        if steps:
            raise TrimError(
                "positions='unmerged' repeats merged tokens in every decoder layer, so no step can stand before layer "
                f"{min(steps)}: leave the stages inside the language model out, or use 'keep'"
            )
        if family.bidirectional:
            raise TrimError(
                f"{name} lets image tokens attend in both directions by a mask of its own, which positions='unmerged' "
                "cannot widen: use 'keep'"
            )
        layers = upstream.cache_layers
        if any(isinstance(layer, DynamicSlidingWindowLayer) for layer in layers):
            raise TrimError(
                f"{name} attends in sliding windows, which positions='unmerged' knows nothing of: use 'keep'"
            )
        if any(getattr(attention, "o_proj", None) is None for attention in self._attentions):
            raise TrimError(
                f"the attention of {name} has no output projection o_proj, before which positions='unmerged' averages: "
                "use 'keep'"
            )

    def attach(self) -> list:
        """Install the hooks and return what removes them again."""
        removers = []
        for attention in self._attentions:
            removers.append(attention.register_forward_pre_hook(self._enter, with_kwargs=True))
            for module in attention.children():
                if module is attention.o_proj:
                    removers.append(module.register_forward_pre_hook(self._average))
                else:
                    removers.append(module.register_forward_pre_hook(self._before_projection))
                    removers.append(module.register_forward_hook(self._after_projection))
        return removers

    def repeated(self, prefill: Prefill, embeds: Float[Tensor, "batch length dim"]) -> Repeated:
        """What attention sees of the tokens that are left of the chunk, which came as ``embeds``."""
        alive = prefill.alive
        batch, left = alive.origin.shape
        places = torch.full((batch, prefill.length + 1), -1, device=alive.origin.device)
        own = torch.arange(left, device=places.device).expand(batch, -1)
        places.scatter_(1, torch.where(alive.valid, alive.origin, prefill.length), own)
        groups = zip(prefill.groups, prefill.rows, prefill.whole, alive.columns, strict=True)
        for group, rows, whole, columns in groups:
            went_to = columns.gather(1, group.now.assignment.clamp_min(0))
            places[rows[:, None], whole] = torch.where(group.now.assignment >= 0, went_to, -1)
        places = places[:, :-1]
        index, valid = pack_left(places >= 0)
        mask = self._upstream.mask(
            embeds[:, :1].expand(-1, index.shape[1], -1),  # only their shape counts
            chunk_mask(prefill.cache, 0, prefill.past_mask, prefill.past, valid, index.shape[1]),
            prefill.cache,
            0,
        )
        return Repeated(Alive(index, valid, [], []), gather(places, index).clamp_min(0), mask)

    def _current(self) -> Repeated | None:
        forward: Forward | None = self._context.forward
        return forward.repeated if isinstance(forward, Prefill) else None

    def _enter(self, module, args, kwargs):
        repeated = self._current()
        if repeated is None:
            return None
        few: Tensor = args[0] if args else kwargs["hidden_states"]
        many = gather(few, repeated.places)
        repeated.few, repeated.many = few, many
        kwargs = kwargs | {"attention_mask": repeated.mask}
        return ((many, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": many})

    def _before_projection(self, module, args):
        """A projection of the repeated rows works on the rows that they repeat."""
        repeated = self._current()
        if repeated is None or not args or args[0] is not repeated.many:
            return None
        return (repeated.few, *args[1:])

    def _after_projection(self, module, args, output):
        repeated = self._current()
        if repeated is None or not args or args[0] is not repeated.few:
            return None
        return gather(output, repeated.places)

    def _average(self, module, args):
        repeated = self._current()
        if repeated is None or repeated.few is None:
            return None
        left = repeated.few.shape[1]
        repeated.few = repeated.many = None
        return (repeated.mean(args[0], left), *args[1:])
