"""Attention to vision tokens, layer by layer, summed up over a stream of questions.

What FasterVLM (arXiv 2412.01818) and VisionTrim (arXiv 2601.22674) show of LLaVA: the language model attends elsewhere
than the encoder, to late positions, and more widely. For decoder layer l and every prompt, ``A[q, j]`` is the attention
of position q to vision token j of N, mean over heads, after the softmax over everything that q may see. The definitions
are those of FasterVLM's programs, which VisionTrim's repository points to; T is the number of positions behind the
picture:

- ``last``: the row of the position that generates the first token;
- ``text``: the sum over the positions behind the picture *without the last*, divided by T;
- ``image``: the sum over the vision tokens, divided by N - j, the number of those that can see token j;
- ``all``: the sum over all positions from the first vision token on, divided by N - j + T.

The divisors of the last two take the tilt of causality away. The encoder's attention is that of [CLS] in the layer
whose output is projected; encoders without [CLS] give what each patch receives from the others. Prompts go through one
at a time, with all tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from visiontrim.ask import Speaker
from visiontrim.core.errors import TrimError
from visiontrim.core.method import Site, Step, VisionOutput
from visiontrim.core.signals import Signal
from visiontrim.core.view import Keep, View
from visiontrim.engine.probe import AttentionProbe, Listener
from visiontrim.evaluate.asking import encode
from visiontrim.evaluate.items import Item
from visiontrim.methods.base import cls_attention
from visiontrim.models.family import Family, family_of
from visiontrim.ops.attention import attention_rows
from visiontrim.run import trim

QUERIES = ("last", "text", "all", "image")
SIDE = 24
"""Rows and columns of a mean map; grids of another size are averaged or repeated to it."""
POINTS = 200
"""Shares of the tokens at which a cumulative curve is noted: 1/200, 2/200, ..."""
BINS = np.linspace(0, 1, 201)
"""Edges of the histogram of attention, in units of the largest value of all prompts."""
TOP = 0.1
"""Share of the tokens that the overlap of two rankings looks at."""
ROWS = 64
"""Queries whose attention is computed at a time."""


@dataclass(frozen=True, eq=False)
class _Look(Step):
    """Notes the encoder's attention, keeps everything."""

    seen: list[Tensor]

    name: ClassVar[str] = "look"
    summary: ClassVar[str] = "notes the encoder's attention"
    paper: ClassVar[str] = "measurement"

    @property
    def site(self) -> Site:
        return VisionOutput()

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({"encoder.cls_attention"})

    def select(self, view: View) -> Keep:
        if {"cls_attention", "received_attention"} & set(view.encoder):
            self.seen.append(cls_attention(view)[0])
        return Keep.everything(view)

    def __str__(self) -> str:
        return self.name


@dataclass
class Source:
    """Sums over prompts of one distribution over the vision tokens: a layer and a kind of queries, or the encoder."""

    maps: Float[np.ndarray, "side side"] = field(default_factory=lambda: np.zeros((SIDE, SIDE)))
    raw: Float[np.ndarray, " tokens"] | None = None
    """Attention to each vision token as it is defined; None where prompts had different numbers of them."""
    values: list[Float[np.ndarray, " tokens"]] = field(default_factory=list)
    """The same of each prompt, where the histogram wants it."""
    cumulative: Float[np.ndarray, " points"] = field(default_factory=lambda: np.zeros(POINTS))
    height: float = 0.0
    """Mean place from the top (0) to the bottom (1) of the image."""
    entropy: float = 0.0
    """Of the distribution, in units of that of even attention: 1 is even, 0 a single token."""
    overlap: float = 0.0
    """Share of the best tenth of the tokens that is in the encoder's best tenth too."""
    shares: Float[np.ndarray, " 3"] = field(default_factory=lambda: np.zeros(3))
    """Of all attention what goes before the vision tokens, to them, and after them."""

    def add(
        self,
        attention: Float[Tensor, " tokens"],
        grid: tuple[int, int],
        best: Int[Tensor, " best"],
        keep: bool,
        first: bool,
    ) -> None:
        """Take in one prompt, ``first`` of all; ``attention`` need not sum to 1. ``keep`` is for the histogram."""
        values = attention.double().numpy()
        if first:
            self.raw = np.zeros(len(values))
        self.raw = self.raw + values if self.raw is not None and len(self.raw) == len(values) else None
        if keep:
            self.values.append(values.astype(np.float32))
        share = attention / attention.sum().clamp(min=1e-30)
        tokens = len(share)
        place = share.view(1, 1, *grid)
        spread = F.interpolate(place, (SIDE, SIDE), mode="area")[0, 0]
        self.maps += (spread / spread.sum().clamp(min=1e-30)).double().numpy()
        falling = share.sort(descending=True).values.cumsum(0)
        index = (torch.arange(1, POINTS + 1) * tokens / POINTS).ceil().long().clamp(max=tokens) - 1
        self.cumulative += falling[index].double().numpy()
        rows = torch.arange(grid[0], dtype=torch.float32) / max(grid[0] - 1, 1)
        self.height += float((place[0, 0].sum(1) * rows).sum())
        self.entropy += float(-(share * share.clamp(min=1e-30).log()).sum()) / float(np.log(max(tokens, 2)))
        if len(best):
            self.overlap += float(torch.isin(share.topk(len(best)).indices, best).float().mean())

    @property
    def histogram(self) -> Float[np.ndarray, " bins"]:
        """Share of all values of all prompts in each bin, in units of the largest."""
        values = np.concatenate(self.values)
        return np.histogram(values / max(float(values.max()), 1e-30), BINS)[0] / len(values)

    def mean(self, prompts: int) -> dict[str, Any]:
        """Means over prompts, ready for JSON."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in ("values", "raw")]
        found: dict[str, Any] = {name: getattr(self, name) / prompts for name in names}
        found["raw"] = None if self.raw is None else self.raw / prompts
        if self.values:
            found["histogram"] = self.histogram
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in found.items()}


@dataclass
class Attention:
    """What a stream of prompts showed."""

    layers: int
    prompts: int = 0
    encoder: Source = field(default_factory=Source)
    decoder: dict[str, list[Source]] = field(default_factory=dict)
    """For each kind of queries one source a layer."""
    sees_encoder: bool = True
    """Whether the encoder's attention can be heard."""

    def __post_init__(self) -> None:
        self.decoder = {kind: [Source() for _ in range(self.layers)] for kind in QUERIES}

    def to_dict(self) -> dict[str, Any]:
        """Means over prompts to six digits, ready for JSON."""
        decoder = {kind: [source.mean(self.prompts) for source in found] for kind, found in self.decoder.items()}
        encoder = self.encoder.mean(self.prompts) if self.sees_encoder else None
        about = {"prompts": self.prompts, "layers": self.layers, "definitions": "FasterVLM, arXiv 2412.01818"}
        return about | {"encoder": _short(encoder), "decoder": _short(decoder)}


def _short(value: Any) -> Any:
    """The numbers in it, to six digits."""
    if isinstance(value, dict):
        return {name: _short(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_short(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def observe(
    speaker: Speaker,
    items: Iterable[Item],
    limit: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Attention:
    """Let up to ``limit`` prompts pass through the model, the first picture of each. Raises :class:`TrimError`."""
    family = family_of(speaker.model)
    if family.bidirectional:
        raise TrimError(f"{type(family).__name__} lets vision tokens attend both ways, which is not measured here")
    attention = Attention(len(family.language_model.layers))
    for item in items:
        if limit is not None and attention.prompts >= limit:
            break
        _observe(speaker, family, item, attention)
        if limit is not None:
            progress(attention.prompts, limit)
    if not attention.prompts:
        raise TrimError("there are no questions about pictures to look at")
    return attention


@torch.inference_mode()
def _observe(speaker: Speaker, family: Family, item: Item, attention: Attention) -> None:
    model: Any = speaker.model
    if item.prompt is None:  # nothing is left off the question, so that there is no bare one
        item = dataclasses.replace(item, sources=item.sources[:1], bare=None)
    inputs = encode(speaker, [item])
    seen: list[Tensor] = []
    rows: dict[int, dict[str, Float[Tensor, " keys"]]] = {}
    vision = family.placeholders(inputs["input_ids"])[0].nonzero()[:, 0]

    def listen(layer: int) -> Listener:
        def heard(query: Tensor, key: Tensor, scaling: float | None) -> None:
            rows[layer] = _sums(query, key, scaling, int(vision[0]), int(vision[-1]) + 1)

        return heard

    probes = [AttentionProbe(family.decoder_attention(layer), listen(layer)) for layer in range(attention.layers)]
    try:
        with trim(model, _Look(seen), processor=speaker.processor) as run:
            model(**inputs)
    finally:
        for probe in probes:
            probe.remove()
    first = run.trace.images[0]
    frames, *grid = first.grid
    if first.marks or len([image for image in run.trace.images if image.number == 0]) > 1 or frames > 1:
        raise TrimError(
            f"the vision tokens of {item.id!r} are a grid of {first.grid} with {first.marks} marks, or tiles: maps are "
            "drawn of pictures that are one grid"
        )
    place = vision[: first.total]
    encoder = seen[0].cpu() if seen else None
    best = torch.zeros(0, dtype=torch.long)
    if encoder is None:
        attention.sees_encoder = False
    else:
        best = encoder.topk(max(1, round(TOP * len(encoder)))).indices
        attention.encoder.add(encoder, (grid[0], grid[1]), best, keep=True, first=not attention.prompts)
    begin, tokens = int(place[0]), len(place)
    end = begin + tokens
    behind = inputs["input_ids"].shape[1] - end
    see = torch.arange(tokens, 0, -1)
    divisors = {"last": 1, "text": behind, "image": see, "all": see + behind}
    queries = {"last": 1, "text": max(behind - 1, 1), "image": tokens, "all": tokens + behind}
    for layer, sums in rows.items():
        for kind in QUERIES:
            source, values = attention.decoder[kind][layer], sums[kind].cpu()
            source.add(
                values[begin:end] / divisors[kind],
                (grid[0], grid[1]),
                best,
                keep=kind == "last",
                first=not attention.prompts,
            )
            parts = (values / queries[kind]).tensor_split([begin, end])
            source.shares += [float(part.sum()) for part in parts]
    attention.prompts += 1


def _sums(
    query: Float[Tensor, "1 heads length dim"],
    key: Float[Tensor, "1 kv_heads length dim"],
    scaling: float | None,
    begin: int,
    end: int,
) -> dict[str, Float[Tensor, " length"]]:
    """Attention of each kind of queries to every position, summed; vision tokens stand from ``begin`` to ``end``."""
    length = query.shape[2]
    image, text = (torch.zeros(length, device=query.device) for _ in range(2))
    last = image
    for some in torch.arange(begin, length, device=query.device).split(ROWS):
        attention = attention_rows(query, key, some[None], scaling=scaling, causal=True)[0].mean(0)
        image += attention[some < end].sum(0)
        text += attention[(some >= end) & (some < length - 1)].sum(0)
        last = attention[-1]
    return {"last": last, "text": text, "image": image, "all": image + text + last}
