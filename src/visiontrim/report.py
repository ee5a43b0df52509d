"""What a compressed prefill saved, in numbers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from visiontrim.core.method import Method, Plan, Positions, Site
from visiontrim.core.trace import ImageTrace, Trace
from visiontrim.models.family import Family


@dataclass(frozen=True, slots=True)
class Report:
    """Tokens, cache and arithmetic of one prefill, beside those of the uncompressed prompt.

    Vision tokens are the mean over the prompt's images, audio tokens, where a run reduces them, that over its sounds;
    cache and FLOPs are those of the whole batch, text and beams included.
    """

    method: str
    images: int
    input_tokens: float
    """Vision tokens of an image before compression."""
    kept_tokens: float
    """Vision tokens of an image that entered the language model."""
    per_layer: tuple[float, ...]
    """Vision tokens of an image that each decoder layer processed."""
    stages: tuple[dict[str, Any], ...]
    """For every step its ``site`` and the ``dominant`` and ``complement`` tokens that it left of an image."""
    kv_bytes: int
    """Bytes of keys and values after the prefill, read from the cache; 0 without a cache."""
    kv_bytes_plain: int
    """The same for the uncompressed prompt: the bytes that a token takes, times its tokens and layers."""
    flops: int
    """FLOPs (2 per multiply-add) of the decoder layers in the prefill: weights x tokens, and queries x keys twice."""
    flops_plain: int
    """The same for the uncompressed prompt."""
    sounds: int = 0
    """Sounds of the prompt, if the run reduces their tokens; they are no images and are counted apart."""
    audio_method: str = ""
    audio_input: float = 0
    """Tokens of a sound before compression."""
    audio_kept: float = 0
    """Tokens of a sound that entered the language model."""
    audio_per_layer: tuple[float, ...] = ()
    """Tokens of a sound that each decoder layer processed."""
    notes: tuple[str, ...] = ()
    """What else a reader of these numbers has to know, in sentences without a full stop."""

    @property
    def mean(self) -> float:
        """Mean vision tokens per decoder layer: the number at which methods compare."""
        return sum(self.per_layer) / len(self.per_layer)

    @classmethod
    def of(
        cls, trace: Trace, method: Method, family: Family, rule: Positions = "keep", sound: Method | None = None
    ) -> Report:
        """Count up ``trace``; ``rule`` is that of position ids, ``sound`` the method that reduced audio tokens."""
        layers = len(trace.widths)
        images, sounds = (
            [_Image.of(parts) for _, parts in itertools.groupby(of_kind, key=lambda image: image.number)]
            for of_kind in (trace.images, trace.sounds)
        )
        cached = trace.batch * sum(trace.cache_lengths)
        full = trace.past + trace.length
        keys = trace.cache_lengths or trace.attended
        every = (trace.length,) * layers
        holding = [layer not in family.recurrent for layer in range(layers)]
        whole = tuple(full * holds for holds in holding)
        keys = tuple(length * holds for length, holds in zip(keys, holding, strict=True))
        return cls(
            method=str(method),
            images=len(images),
            input_tokens=_mean(image.total for image in images),
            kept_tokens=_mean(image.per_layer[0] for image in images),
            per_layer=_per_layer(images, layers),
            stages=_stages(images),
            kv_bytes=trace.cache_bytes,
            kv_bytes_plain=trace.cache_bytes * trace.batch * sum(whole) // cached if cached else 0,
            flops=trace.batch * _prefill_flops(family, trace.widths, trace.attended, keys),
            flops_plain=trace.batch * _prefill_flops(family, every, every, whole),
            sounds=len(sounds),
            audio_method=str(sound or ""),
            audio_input=_mean(heard.total for heard in sounds),
            audio_kept=_mean(heard.per_layer[0] for heard in sounds),
            audio_per_layer=_per_layer(sounds, layers) if sounds else (),
            notes=(*_whole(images, method), *_beyond(trace, family, rule)),
        )

    def to_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON."""
        return dataclasses.asdict(self) | {"mean": self.mean}

    def table(self) -> Table:
        """The numbers beside those of the uncompressed prompt, for rich."""
        table = Table("", "plain", self.method, "of plain", title=None)
        rows = [
            (f"vision tokens in{self._each}", self.input_tokens, self.kept_tokens, ""),
            (f"mean per layer{self._each}", self.input_tokens, self.mean, ""),
        ]
        if self.sounds:
            each = f", of each of {self.sounds} sounds" if self.sounds > 1 else ""
            rows.append((f"audio tokens in{each}", self.audio_input, self.audio_kept, ""))
            rows.append((f"audio per layer{each}", self.audio_input, self._audio_mean, ""))
        rows += [
            ("KV cache after prefill", self.kv_bytes_plain, self.kv_bytes, "B"),
            ("prefill FLOPs (decoder)", self.flops_plain, self.flops, "FLOP"),
        ]
        for name, plain, ours, unit in rows:
            cells = [scaled(one, unit, plain) if unit else _count(one) for one in (plain, ours)]
            table.add_row(name, *cells, f"{ours / plain:.1%}" if plain else "-")
        for column in table.columns[1:]:
            column.justify = "right"
        return table

    @property
    def _each(self) -> str:
        """Cache and FLOPs are those of all images, tokens are not."""
        return f", of each of {self.images} images" if self.images > 1 else ""

    @property
    def _audio_mean(self) -> float:
        return sum(self.audio_per_layer) / len(self.audio_per_layer)

    def __str__(self) -> str:
        parts = [self.method]
        if self.images or not self.sounds:
            parts.append(_tokens(self.images, "vision", "image", self.input_tokens, self.kept_tokens, self.mean))
        if self.sounds:
            audio = (self.audio_input, self.audio_kept, self._audio_mean)
            parts.append(f"{_tokens(self.sounds, 'audio', 'sound', *audio)} by {self.audio_method}")
        parts += (
            f"KV {_both(self.kv_bytes_plain, self.kv_bytes, 'B')}",
            f"prefill {_both(self.flops_plain, self.flops, 'FLOP')}",
            *self.notes,
        )
        return " | ".join(parts)


def _tokens(number: int, kind: str, noun: str, before: float, after: float, mean: float) -> str:
    """The tokens of so many images or sounds, all of them and of each."""
    tokens = f"{_count(before)} -> {_count(after)} {kind} tokens"
    if number > 1:
        tokens = (
            f"{_count(number * before)} -> {_count(number * after)} {kind} tokens of {number} {noun}s ({tokens} each)"
        )
    return f"{tokens}, mean {mean:.1f} per layer{f' and {noun}' if number > 1 else ''}"


@dataclass(frozen=True, slots=True)
class _Image:
    """The parts of one image, video or sound, counted together."""

    total: int
    per_layer: tuple[int, ...]
    stages: tuple[tuple[Site, int, int], ...]
    """Site, dominant and complement tokens."""

    @classmethod
    def of(cls, parts: Iterable[ImageTrace]) -> _Image:
        parts = list(parts)
        return cls(
            total=sum(part.total + part.marks for part in parts),
            per_layer=tuple(map(sum, zip(*(part.per_layer for part in parts), strict=True))),
            stages=tuple(
                (
                    stages[0].site,
                    sum(int((~stage.complement).sum()) for stage in stages),
                    sum(int(stage.complement.sum()) for stage in stages),
                )
                for stages in zip(*(part.stages for part in parts), strict=True)
            ),
        )


def _whole(images: list[_Image], method: Method) -> list[str]:
    """That images have no more tokens than a number asks for."""
    methods = method.methods if isinstance(method, Plan) else (method,)
    asked = [keep for keep in (getattr(one, "keep", None) for one in methods) if type(keep) is int]
    small = [image for image in images if asked and image.total <= max(asked)]
    if not small:
        return []
    some = f"{len(small)} of {len(images)} images have" if len(images) > 1 else "the image has"
    return [f"{some} no more than keep={max(asked)} tokens and pass{'' if len(images) > 1 else 'es'} whole"]


def _beyond(trace: Trace, family: Family, rule: Positions) -> list[str]:
    """That a prompt is longer than the model was made for."""
    limit = getattr(family.language_model.config, "max_position_embeddings", None)
    if limit is None:
        return []
    if family.mrope:  # a picture takes as many positions as its longer side has tokens; text goes on behind that
        length = int(trace.positions[-3:].max()) + 1
    else:
        length = trace.past + (trace.widths[0] if rule == "compact" else trace.length)
    if length <= limit:
        return []
    return [f"the prompt takes {length:,} positions, the model was made for {limit:,}: its answers may be of no use"]


def _mean(values) -> float:
    values = list(values)
    mean = sum(values) / len(values) if values else 0
    return int(mean) if mean == int(mean) else mean


def _per_layer(images: list[_Image], layers: int) -> tuple[float, ...]:
    return tuple(_mean(image.per_layer[layer] for image in images) for layer in range(layers))


def _stages(images: list[_Image]) -> tuple[dict[str, Any], ...]:
    return tuple(
        {
            "site": str(stages[0][0]),
            "dominant": _mean(dominant for _, dominant, _ in stages),
            "complement": _mean(complement for _, _, complement in stages),
        }
        for stages in zip(*(image.stages for image in images), strict=True)
    )


def _prefill_flops(family: Family, widths: tuple[int, ...], attended: tuple[int, ...], keys: tuple[int, ...]) -> int:
    """FLOPs of the decoder layers for one row of ``widths`` tokens: ``attended`` of them, or of what they were merged
    from, attend to ``keys`` keys in each layer: none where that has linear attention, whose weights alone count."""
    config = family.language_model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads_width = config.num_attention_heads * head_dim
    total = 0
    for layer, width, queries, length in zip(family.language_model.layers, widths, attended, keys, strict=True):
        weights = sum(parameter.numel() for parameter in layer.parameters() if parameter.ndim > 1)
        total += 2 * weights * width + 4 * heads_width * queries * length
    return total


def _count(tokens: float) -> str:
    return f"{tokens:.0f}" if tokens == int(tokens) else f"{tokens:.1f}"


def _both(plain: float, ours: float, unit: str) -> str:
    """Two numbers that are compared have one unit."""
    return f"{scaled(plain, unit).partition(' ')[0]} -> {scaled(ours, unit, plain)}"


def scaled(number: float, unit: str, like: float | None = None) -> str:
    """``number`` to three digits, with a prefix of ``unit`` in powers of 1000: that of ``like``, or its own."""
    size = number if like is None else like
    for prefix in ("", "k", "M", "G", "T"):
        if size < 1000 or prefix == "T":
            return f"{number:.3g} {prefix}{unit}" if prefix else f"{number:.0f} {unit}"
        number, size = number / 1000, size / 1000
    raise AssertionError("unreachable")
