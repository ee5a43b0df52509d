"""What decoder layers get once tokens are missing: masks, position ids and rotary embeddings of those that are left.

From one stage to the next all layers of a type get the same, which is made when the first of them asks. It knows which
tokens are left and what layers call their arguments; it knows nothing of images and of how tokens are chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from visiontrim.core.errors import TrimError
from visiontrim.engine.cache import chunk_mask, trimmed_layer
from visiontrim.engine.contract import check_given
from visiontrim.engine.forward import Forward, Prefill, Removal
from visiontrim.engine.members import Members
from visiontrim.engine.pack import gather
from visiontrim.engine.segment import Segment
from visiontrim.engine.upstream import PER_TOKEN, Upstream

KeyMask = Bool[Tensor, "batch keys"] | None


class Segments:
    """Begins segments of a pass, and says what each of their layers gets."""

    def __init__(self, upstream: Upstream, compact: bool, members: Members | None) -> None:
        self._upstream = upstream
        self._compact = compact
        self._members = members

    def narrow(
        self, prefill: Prefill, layer: int, keep: Tensor, columns: list[Tensor], marks: list[Tensor]
    ) -> Int[Tensor, "batch left"]:
        """Drop tokens from decoder layer ``layer`` on; returns the places, before, of what is left."""
        index, prefill.alive = prefill.alive.narrowed(
            keep, columns, marks, prefill.rows, [group.rows for group in prefill.groups], prefill.left
        )
        if prefill.past and self._upstream.recurrent and prefill.alive.padded:
            lengths = prefill.alive.valid.sum(1).tolist()
            raise TrimError(
                f"the rows of a further turn would have {', '.join(map(str, lengths))} tokens left, and the padding "
                "between the turns would go into the state of layers with linear attention: continue one conversation "
                "at a time"
            )
        prefill.removals.append(Removal(layer, prefill.alive))
        return index

    def key_mask(self, forward: Forward, layer: int) -> KeyMask:
        """Keys that tokens of the chunk may see from decoder layer ``layer`` on."""
        layer = self._upstream.holding(layer)
        if isinstance(forward, Prefill) and forward.removals:
            valid = forward.alive.valid if forward.alive.padded else None
            return chunk_mask(forward.cache, layer, forward.past_mask, forward.past, valid, forward.alive.width)
        earlier = trimmed_layer(forward.cache, layer)
        return None if earlier is None else earlier.logical_mask(forward.mask, forward.past + forward.length)

    def positions(self, forward: Forward, layer: int) -> Tensor:
        """Position ids of what attention sees of the chunk, for decoder layer ``layer``."""
        positions = forward.positions
        if isinstance(forward, Prefill):
            origin = forward.attended.origin
            if positions.ndim == 3:
                positions = torch.stack([gather(channel, origin) for channel in positions])
            else:
                positions = gather(positions, origin)
        if not self._compact:
            return positions
        earlier = trimmed_layer(forward.cache, layer)
        if earlier is not None and earlier.shift is not None:
            positions = positions - earlier.shift[:, None]
        if isinstance(forward, Prefill):
            rank_before = gather(forward.chunk_valid.cumsum(1), forward.alive.origin)
            positions = positions - (rank_before - forward.alive.valid.cumsum(1))
        return positions

    def begin(self, forward: Forward, layer: int, index: Tensor | None) -> None:
        """A segment begins before decoder layer ``layer``; ``index`` are the places, before, of what is left now."""
        missing = isinstance(forward, Prefill) and forward.removals
        cached, ahead = trimmed_layer(forward.cache, layer), forward.ahead
        if not missing and cached is None:
            return
        if ahead is not None and cached is not None:
            forward.segment = ahead.follow(layer, cached, forward.past, forward.length)
            if forward.segment is not None:
                return
        places = None if forward.segment is None else forward.segment.places
        if index is not None:
            places = index if places is None else gather(places, index)
        forward.segment = Segment(self.key_mask(forward, layer), places)
        if ahead is not None and cached is not None:
            ahead.leave(layer, cached, forward.past, forward.length, forward.segment)

    def arguments(self, forward: Forward, layer: int, hidden: Tensor, given: Mapping[str, Any]) -> dict[str, Any]:
        """What decoder layer ``layer`` gets instead of its ``given`` keyword arguments."""
        changed: dict[str, Any] = {}
        if isinstance(forward, Prefill) and forward.removals and "position_ids" in given:
            changed["position_ids"] = None  # layers use them for nothing but finding packed sequences
        segment = forward.segment
        if segment is None:
            return changed
        check_given("attention_mask", given, layer)
        kind = self._upstream.kinds[layer]
        if kind not in segment.masks:
            segment.masks[kind] = self._upstream.mask(hidden, segment.key_mask, forward.cache, layer)
        changed["attention_mask"] = segment.masks[kind]
        if segment.places is not None:
            along = [name for name in PER_TOKEN if given.get(name) is not None]
            changed |= {name: gather(given[name], segment.places) for name in along}
        if (rotary := self._rotary(forward, segment, layer, hidden, given)) is not None:
            changed["position_embeddings"] = rotary
        forward.helped |= len(changed) > 1 or changed["attention_mask"] is not given.get("attention_mask")
        return changed

    def _rotary(
        self, forward: Forward, segment: Segment, layer: int, hidden: Tensor, given: Mapping[str, Any]
    ) -> tuple[Tensor, ...] | None:
        """Cosines and sines of the tokens that are left; None: those of the model are right."""
        if layer in self._upstream.recurrent:
            return None
        if self._compact and segment.steps > 1:
            return self._turn(forward, segment, layer, hidden)
        own, made = given.get("position_embeddings"), segment.rotary
        if self._compact or (self._members is not None and isinstance(forward, Prefill)):
            own = self._upstream.kinds[layer]
        elif segment.places is None or (own is None and "position_embeddings" in given):  # some have no positions
            return None
        check_given("position_embeddings", given, layer)
        if made is None or made[0] is not own:
            made = segment.rotary = own, self._made(forward, segment, layer, hidden, own)
        return made[1]

    def _turn(self, forward: Forward, segment: Segment, layer: int, hidden: Tensor) -> tuple[Tensor, ...]:
        """Those of this step, of which several are made at a time."""
        kind = self._upstream.kinds[layer]
        if kind not in segment.turns:
            steps = torch.arange(segment.steps, device=hidden.device)
            positions = self.positions(forward, layer) + steps
            segment.turns[kind] = self._upstream.rotary(hidden, positions, layer)
        return tuple(part[:, segment.step : segment.step + 1] for part in segment.turns[kind])

    def _made(self, forward: Forward, segment: Segment, layer: int, hidden: Tensor, own: Any) -> tuple[Tensor, ...]:
        if self._compact:
            return self._upstream.rotary(hidden, self.positions(forward, layer), layer)
        if self._members is not None and isinstance(forward, Prefill):
            return self._members.rotary(forward, hidden)
        assert segment.places is not None
        return tuple(_gather_rotary(part, segment.places) for part in own)


def _gather_rotary(part: Tensor, index: Int[Tensor, "batch left"]) -> Tensor:
    """Cosines or sines [batch or 1, tokens, dim], or [axes, batch, tokens, dim], of the tokens at ``index``."""
    if part.ndim == 4:
        return torch.stack([gather(axis, index) for axis in part])
    return gather(part, index)
