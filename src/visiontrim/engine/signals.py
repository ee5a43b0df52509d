"""Signals of the vision encoder: those of its attention by the queries and keys that a module shows, and the picture.

It knows how they are computed and carried to the tokens that are left; it does not know when a step asks for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from visiontrim.core.errors import TrimError
from visiontrim.core.method import Step
from visiontrim.core.signals import EncoderSignals, Key, Signal, check_name, name_of
from visiontrim.engine.call import Encoding
from visiontrim.engine.inside import Inside
from visiontrim.models.family import Family
from visiontrim.ops.attention import attention_columns, attention_received, attention_rows

AT_OUTPUT = frozenset({"cls_attention", "cls_attention_wide", "received_attention", "column_attention", "keys"})
"""Signals of the encoder's attention that a step at its output may read."""
BETWEEN = AT_OUTPUT - {"cls_attention_wide"} | {"queries", "cls_query"}
"""Those of the layer before a step between the encoder's layers."""
PIXELS = frozenset({"pixels", "colours"})
"""Signals of the picture that such a step may read."""
ALWAYS = frozenset({"mass", "lattice", "unit"})
"""What such a step sees in any case."""


DIRECTIONS, STEP = 64, 0.01
"""Of the difference quotients of a projector: how many, and half the distance of their ends."""


def check_needs(step: Step, given: Set[Signal], where: str, layers: Set[Signal] = frozenset()) -> None:
    """Raise :class:`TrimError` unless ``step`` needs nothing but signals ``given``, or of other layers ``layers``."""
    for need in step.needs:
        check_name(need)
        if name_of(need) not in (layers if isinstance(need, tuple) else given):
            raise TrimError(f"{step} reads {need}, which there is none of {where}")


def encoder_signals(
    family: Family,
    encoding: Encoding,
    signals: Iterable[Key],
    query: Float[Tensor, "pictures heads sequence dim"],
    key: Float[Tensor, "pictures heads sequence dim"],
    scaling: float | None,
) -> Iterator[tuple[Key, Float[Tensor, "patches *rest"]]]:
    """The ``signals`` of one call of an attention module, of one chunk of patches after the other."""
    special, inside = family.special_tokens, encoding.merged
    chunks = family.chunks(encoding.kind, encoding.arguments) if inside is None else inside.chunks()
    bias = None if inside is None else inside.bias(special)
    filled = family.filled(encoding.kind, encoding.arguments) if inside is None else None
    for q, k in _by_chunk(query, key, chunks) if filled is None else _by_row(query, key, filled):
        for signal in signals:
            yield signal, _signal(name_of(signal), q, k, scaling, special, bias).flatten(0, 1)


def _signal(
    name: str,
    query: Float[Tensor, "images heads tokens dim"],
    key: Float[Tensor, "images heads tokens dim"],
    scaling: float | None,
    special: int,
    bias: Float[Tensor, "images tokens"] | None,
) -> Float[Tensor, "images patches *rest"]:
    """What an attention module says by its queries and keys."""
    match name:
        case "cls_attention":
            return attention_rows(query[:, :, :1], key, scaling=scaling, bias=bias).mean(1)[:, 0, special:]
        case "cls_attention_wide":
            query, key = (side.transpose(1, 2).flatten(2)[:, None] for side in (query[:, :, :1], key))
            return attention_rows(query, key)[:, 0, 0, special:]
        case "column_attention":
            return attention_columns(query, key, scaling=scaling, skip=special, bias=bias)
        case "keys":
            return key[:, :, special:].transpose(1, 2)
        case "queries":
            return _scaled(query[:, :, special:], scaling).transpose(1, 2)
        case "cls_query":
            tokens = query.shape[2] - special
            return _scaled(query[:, :, :1], scaling).transpose(1, 2).expand(-1, tokens, -1, -1)
        case _:
            return attention_received(query, key, scaling=scaling, skip=special, bias=bias)


def _scaled(query: Tensor, scaling: float | None) -> Tensor:
    return query * (query.shape[-1] ** -0.5 if scaling is None else scaling)


def pixel_signals(
    inside: Inside, encoding: Encoding, needs: Set[Key], deviation: Sequence[float] | None
) -> dict[Key, list[Float[Tensor, "images kept channels values"]]]:
    """``pixels`` and ``colours`` of the tokens that are left, by group."""
    if not needs & PIXELS:
        return {}
    pixels = inside.family.pixels(encoding.kind, encoding.arguments).to(inside.at[0].device)
    left = [pixels[at.gather(1, m.now.index)] for m, at in zip(inside.merging, inside.at, strict=True)]
    signals: dict[Key, list[Tensor]] = {"pixels": left}
    if deviation is not None:
        scale = torch.tensor(deviation, device=pixels.device)[:, None]
        signals["colours"] = [group.float() * scale for group in left]
    return {name: values for name, values in signals.items() if name in needs}


def _by_chunk(query: Tensor, key: Tensor, chunks: list[int] | None) -> Iterable[tuple[Tensor, Tensor]]:
    """Queries and keys of what attends to each other, where a whole sequence of images comes at once."""
    if chunks is None or query.shape[2] != sum(chunks):
        return [(query, key)]
    return zip(query.split(chunks, dim=2), key.split(chunks, dim=2), strict=True)


def _by_row(query: Tensor, key: Tensor, filled: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Queries and keys of every row without its padding."""
    for row, length in enumerate(filled):
        yield query[row : row + 1, :, :length], key[row : row + 1, :, :length]


def of_placeholders(family: Family, encoding: Encoding) -> dict[Key, Float[Tensor, "placeholders *rest"]]:
    """What was heard, as the placeholders would have it. Raises :class:`TrimError` for signals from before a merge."""
    inside, values = encoding.merged, {}
    for signal, parts in encoding.heard.items():
        value = torch.cat(parts)
        if inside is not None:
            units = value.view(-1, inside.unit, *value.shape[1:]).mean(1)
            if len(units) != sum(places.numel() for places in inside.places):
                raise TrimError(
                    f"{EncoderSignals.spelled(signal)} has {len(value)} values from before tokens were merged: read it "
                    "of a later layer"
                )
            value = inside.whole(units)
        if inside is None or family.factor == 1:
            value = family.pooled(encoding.kind, encoding.arguments, value[:, None])[:, 0]
        values[signal] = value
    return values


@torch.no_grad()
def projector_sensitivity(family: Family, features: Float[Tensor, "*shape dim"]) -> Float[Tensor, "*shape"]:
    """Norm of the projector's central differences, mean over unit vectors drawn with a fixed seed.

    In float32 with the weights cast to it: in half precision a step of 0.01 drowns in rounding.
    """
    bare, x = _Bare(family), features.float()
    weights = {name: p.float() for name, p in bare.named_parameters() if p.is_floating_point()}
    directions = torch.randn(DIRECTIONS, x.shape[-1], generator=torch.Generator().manual_seed(0))
    total = x.new_zeros(x.shape[:-1])
    for unit in nn.functional.normalize(directions, dim=-1).to(x.device):
        ends = [functional_call(bare, weights, (x + side * STEP * unit,)) for side in (1, -1)]
        total += torch.linalg.vector_norm(ends[0] - ends[1], dim=-1) / (2 * STEP)
    return total / DIRECTIONS


class _Bare(nn.Module):
    """The projector of a family, called past the hooks on it."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.projector = family.projector
        self._family = family

    def forward(self, features: Tensor) -> Tensor:
        return self._family.to_language(features)
