"""Prompts that go through the language model in chunks (``generate(prefill_chunk_size=...)``).

Everything is encoded before the first chunk, so what stays is known for the whole prompt by then, and every chunk loses
its share. A chunk of which nothing stays goes on as a token of padding. It knows places in a prompt; it does not know
how tokens were chosen, nor what layers make of a chunk.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from visiontrim.core.errors import TrimError
from visiontrim.core.method import Positions
from visiontrim.engine.cache import static
from visiontrim.engine.call import Call, Chunks
from visiontrim.engine.forward import Alive, Prefill, Removal
from visiontrim.engine.rows import claim_row_ends
from visiontrim.engine.select import place_groups
from visiontrim.engine.upstream import Cache, Upstream, slices_features
from visiontrim.models.family import Family


def check_chunks(family: Family, upstream: Upstream, between: bool, positions: Positions, size: int) -> None:
    """Raise :class:`TrimError` where chunks of ``size`` tokens cannot be told apart from the whole prompt.

    ``between``: the method acts between decoder layers, or on what the answer sees.
    """
    refused = {
        "is what a step of decoding has: use 2 or more": size < 2,
        "shows a method between decoder layers one part of the prompt at a time: use None (removing vision tokens "
        "shortens the prefill already), or a method that acts at the encoder's output alone": between,
        f"cuts through merged tokens, which positions={positions!r} lets stand at several places: use None, or "
        "positions='keep'": positions in ("members", "unmerged"),
        f"cuts through images, but {type(family.model).__name__} lets image tokens attend in both directions: use "
        "None": family.bidirectional,
        "would leave chunks of padding, which go into the state of layers with linear attention: use None": bool(
            upstream.recurrent
        ),
        "needs a release of transformers that hands every chunk its images, which this one does not: use None": (
            not slices_features()
        ),
    }
    for reason, holds in refused.items():
        if holds:
            raise TrimError(f"prefill_chunk_size={size} {reason}")


def begin_chunks(chunks: Chunks, first: Prefill, family: Family) -> None:
    """Find out, before the ``first`` chunk of a prompt, what is left of all of it.

    Raises :class:`TrimError` for a static cache, which allocates a length once.
    """
    if static(first.cache):
        raise TrimError(
            "prefill_chunk_size lets a static cache be allocated before it is known what chunks leave: use None, or "
            "cache_implementation='dynamic'"
        )
    call, batch = first.call, len(first.chunk_valid)
    ids = call.input_ids.repeat_interleave(batch // call.rows, 0)
    keep = torch.ones_like(ids, dtype=torch.bool)
    whole = replace(
        first,
        call=replace(call, forward_ids=ids),
        length=ids.shape[1],
        alive=Alive(torch.arange(ids.shape[1], device=ids.device).expand_as(ids), keep, [], []),
    )
    place_groups(whole, family)
    claim_row_ends(whole, family)
    places = zip(whole.groups, whole.rows, whole.alive.columns, whole.alive.marks, strict=True)
    for group, rows, columns, marks in places:
        keep[rows[:, None], columns] = False
        keep[rows[:, None], columns.gather(1, group.now.index)] = True
        keep[rows[:, None], marks[:, group.marks_beside(group.kept) :]] = False
    chunks.keep, chunks.groups, chunks.begin = keep, whole.groups, (call.prompt_end or 0) - ids.shape[1]


def cut(chunks: Chunks, prefill: Prefill) -> None:
    """Tell a chunk, which has passed nothing yet, what of it stays."""
    assert chunks.keep is not None
    start = prefill.past - chunks.begin
    keep = chunks.keep[:, start : start + prefill.length] & prefill.chunk_valid
    there, left = torch.stack([prefill.chunk_valid.sum(1), keep.sum(1)]).tolist()  # one look at the device
    prefill.alive.lengths = tuple(there)
    if there != left:
        prefill.staying, prefill.left = keep, tuple(left)


def passed(chunks: Chunks, prefill: Prefill) -> Prefill | None:
    """Note a chunk that has passed the language model. After the last one, the whole prompt as if in one pass."""
    chunks.origins.append(prefill.alive.origin + prefill.past - chunks.begin)
    chunks.positions.append(prefill.positions)
    if prefill.more:
        return None
    origin = torch.cat(chunks.origins, 1)
    alive = Alive(origin, torch.ones_like(origin, dtype=torch.bool), [], [])
    length = prefill.past + prefill.length - chunks.begin
    removals = [Removal(0, alive)] if alive.width < length else []
    return replace(
        prefill,
        past=chunks.begin,
        length=length,
        positions=_joined(chunks.positions, len(origin)),
        alive=alive,
        groups=chunks.groups,
        removals=removals,
    )


def _joined(positions: list[Tensor], batch: int) -> Tensor:
    """Position ids [axes or none, batch, tokens] of all chunks."""
    return torch.cat([part.expand(*part.shape[:-2], batch, -1) for part in positions], -1)


def in_chunks(call: Call, cache: Cache | None) -> bool:
    """Whether a pass on ``cache`` is a chunk of a prompt, not a step of decoding behind it."""
    past = int(cache.get_seq_length()) if cache is not None else 0
    return call.chunks is not None and past < (call.prompt_end or 0)
