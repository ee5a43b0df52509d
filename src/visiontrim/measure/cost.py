"""What compression saves by arithmetic: FLOPs, cache and tokens of a model whose weights nobody needs to have.

The real engine runs on a stand-in: a model with the layers, pictures and prompt of the real one, but tiny widths.
Whatever passes through a weight or an attention function is counted there, and multiplied with the widths of the real
model, which exists on the "meta" device alone. docs/cost.md has the formula.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from visiontrim.core.errors import TrimError
from visiontrim.core.method import Method
from visiontrim.measure.noise import noise_prompt
from visiontrim.measure.shapes import Shape
from visiontrim.models.family import ATTENTIONS, Family, family_of
from visiontrim.run import trim

_WEIGHTED = (F.linear, F.conv2d, F.conv3d)
"""Functions that multiply with a weight [channels out, ...]."""
SAMPLE = 60
"""Text tokens that the stand-in reads at most; what further ones cost is arithmetic."""
LONGEST = 8192
"""The same for models with experts or linear attention, where no formula says what further ones cost."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one call of ``generate()`` for a whole batch. FLOPs are 2 per multiply-add, without the method's own."""

    method: str
    vision_tokens: float
    """Of one picture, as they enter the language model."""
    mean: float
    """Mean vision tokens of a picture per decoder layer."""
    per_layer: tuple[float, ...]
    """Vision tokens of a picture in each decoder layer."""
    vision: int
    """FLOPs of the vision encoder and the projector."""
    prefill: int
    """FLOPs of the decoder layers for the prompt, and of the head for its last token."""
    decode: int
    """FLOPs of all further steps: one less than tokens in the answer."""
    kv_vision: int
    """Bytes of the keys and values of vision tokens."""
    kv_prompt: int
    """Bytes of all keys and values after the prefill."""
    kv_answer: int
    """Bytes of all keys and values at the end: all but the last token of the answer are cached by then."""
    weights: int
    """Bytes of all weights, those of every expert included: what has to lie in memory."""

    @property
    def flops(self) -> int:
        """Of the whole call."""
        return self.vision + self.prefill + self.decode

    def to_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON."""
        return dataclasses.asdict(self) | {"flops": self.flops}


class Counter(TorchFunctionMode):
    """Counts FLOPs of ``real`` while ``standin``, the same layers in other widths, runs.

    Attention gives back its queries: nobody reads the values, and pictures of any size take no time.
    """

    def __init__(self, real: Family, standin: Family) -> None:
        super().__init__()
        weights = dict(real.model.named_parameters())
        decoder = {id(parameter) for parameter in standin.language_model.parameters()}
        self._weights = {
            id(parameter): (weights[name].numel(), self._part(name, id(parameter) in decoder))
            for name, parameter in standin.model.named_parameters()
        }
        layers = zip(standin.language_model.layers, _widths(real), strict=True)
        self._widths = {id(parameter): wide for layer, (wide, _) in layers for parameter in layer.parameters()}
        """Of all query heads of the layer that a weight is in."""
        self._experts = dict(_experts(real.model))
        self._last, self._encoder = "vision", _encoder_width(real)
        self._wide = self._encoder
        self._off = 0
        self.flops = {"vision": 0, "decoder": 0, "head": 0}

    @staticmethod
    def _part(name: str, in_decoder: bool) -> str:
        return "decoder" if in_decoder else "head" if name.startswith("lm_head") else "vision"

    @contextmanager
    def routed(self, model: Any) -> Iterator[None]:
        """While ``model``, the stand-in, runs: a token counts for the experts it is sent to, and for no others."""
        handles = []

        def enter(name: str, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            chosen = args[1] if len(args) > 1 else kwargs["top_k_index"]
            self.flops["decoder"] += 2 * self._experts[name] * chosen.numel()
            self._last = "decoder"
            self._off += 1

        def leave(*_: Any) -> None:
            self._off -= 1

        for name, module in model.named_modules():
            if name in self._experts:
                hook = functools.partial(enter, name)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
                handles.append(module.register_forward_hook(leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """As the clock of a run: what runs in it is the method's own and does not count."""
        self._off += 1
        try:
            yield
        finally:
            self._off -= 1

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and not self._off:
            return self._attention(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in _WEIGHTED and not self._off:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            size, self._last = self._weights[id(weight)]
            self._wide = self._widths.get(id(weight), self._encoder)
            self.flops[self._last] += 2 * size * (result.numel() // weight.shape[0])
        return result

    def _attention(self, query, key, value, *_, **__):
        # queries, keys and values come from weights of the same layer, which were the last to be counted
        pairs = query.shape[:-3].numel() * query.shape[-2] * key.shape[-2]
        self.flops[self._last] += 4 * self._wide * pairs
        return query


def costs(
    shape: Shape, methods: Sequence[Method], *, text: int = 60, answer: int = 64, batch: int = 1, seed: int = 0
) -> list[Cost]:
    """What one call costs with each of ``methods``, of which ``none`` is the plain model.

    Every row of the batch has one picture of ``shape`` and ``text`` text tokens, and gets ``answer`` tokens. Weights
    are random: methods that let the content decide how many tokens stay show a number of no meaning. Raises
    :class:`TrimError` for what cannot work. Of a mixture of experts those that a token is sent to count.
    """
    for name, number in (("answer", answer), ("batch", batch)):
        if number < 1:
            raise TrimError(f"{name}={number}: give at least 1")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        standin = family_of(shape.narrow().build("cpu", torch.float32, "sdpa"))
    real = family_of(shape.build("meta", shape.dtype))
    plain = not real.recurrent and not any(_experts(real.language_model.layers)) and not _beside(real)
    counted = min(text, SAMPLE if plain else LONGEST)
    inputs = noise_prompt(standin, shape.picture, counted, 1, seed)
    return [_cost(real, standin, inputs, method, answer, batch, text - counted) for method in methods]


@torch.inference_mode()
def _cost(
    real: Family, standin: Family, inputs: Mapping[str, Tensor], method: Method, answer: int, batch: int, more: int
) -> Cost:
    """``more`` text tokens than ``inputs`` have are counted by the formula that what runs has to agree with."""
    counter = Counter(real, standin)
    with trim(standin.model, method, clock=counter) as run, counter.routed(standin.model), counter:
        standin.model(**inputs, use_cache=True, logits_to_keep=1)
    report, flops = run.report, counter.flops
    text = run.trace.widths[0] - round(report.per_layer[0])
    widths = _widths(real)
    # (bytes of a token, tokens) of every layer that caches: some use keys and values of an earlier one
    cached = [
        (2 * narrow * real.model.dtype.itemsize, length)
        for layer, (length, (_, narrow)) in enumerate(zip(run.trace.cache_lengths, widths, strict=True))
        if length and layer not in real.recurrent
    ]
    seen = [length or width for length, width in zip(run.trace.cache_lengths, run.trace.widths, strict=True)]
    if more:
        trace, wides = run.trace, [4 * wide for wide, _ in widths]
        sizes = [sum(weight.numel() for weight in layer.parameters() if weight.ndim > 1) for layer in _layers(real)]
        rows = list(zip(sizes, wides, trace.widths, trace.attended, trace.cache_lengths, strict=True))
        found = sum(2 * size * width + wide * queries * keys for size, wide, width, queries, keys in rows)
        if real.recurrent or found != flops["decoder"]:
            raise TrimError(
                f"{real.model.config.model_type} has decoder layers of which the formula knows nothing: give at most "
                f"{text:,} text tokens"
            )
        flops["decoder"] = sum(
            2 * size * (width + more) + wide * (queries + more) * (keys + more)
            for size, wide, width, queries, keys in rows
        )
        cached = [(token, length + more) for token, length in cached]
        seen = [length + more for length in seen]
        text += more
    layers = real.language_model.layers
    weights = sum(parameter.numel() for parameter in layers.parameters() if parameter.ndim > 1)
    sent = getattr(real.language_model.config, "num_experts_per_tok", None) or 0
    held = {name: module.num_experts for name, module in layers.named_modules() if hasattr(module, "num_experts")}
    idle = sum(size * (held[name] - sent) for name, size in _experts(layers))
    # torch counts no step of linear attention: neither its convolution nor its state
    convolutions = sum(module.weight.numel() for module in layers.modules() if isinstance(module, torch.nn.Conv1d))
    steps = answer - 1
    attention = sum(
        4 * wide * (steps * length + steps * (steps + 1) // 2)
        for layer, ((wide, _), length) in enumerate(zip(widths, seen, strict=True))
        if layer not in real.recurrent
    )
    step = 2 * (weights - idle - convolutions + _beside(real)) + 2 * real.model.lm_head.weight.numel()
    return Cost(
        method=str(method),
        vision_tokens=report.kept_tokens,
        mean=report.mean,
        per_layer=report.per_layer,
        vision=batch * flops["vision"],
        prefill=batch * (flops["decoder"] + flops["head"]),
        decode=batch * (steps * step + attention),
        kv_vision=batch * sum(token * (length - text) for token, length in cached),
        kv_prompt=batch * sum(token * length for token, length in cached),
        kv_answer=batch * sum(token * (length + steps) for token, length in cached),
        weights=sum(parameter.numel() for parameter in real.model.parameters()) * real.model.dtype.itemsize,
    )


def _layers(family: Family) -> list[Any]:
    return list(family.language_model.layers)


def _experts(model: Any) -> Iterator[tuple[str, int]]:
    """(name, numbers of one expert) of every module that holds the experts of a layer as weights [experts, out, in]."""
    for name, module in model.named_modules():
        stacked = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim == 3]
        if stacked and hasattr(module, "num_experts"):
            yield name, sum(parameter[0].numel() for parameter in stacked)


def _widths(family: Family) -> list[tuple[int, int]]:
    """Of every decoder layer the width of all query heads, and of all key-value heads; layers may differ in both."""
    config, widths = family.language_model.config, []
    heads = config.num_attention_heads
    for layer in family.language_model.layers:
        attention = next((getattr(layer, name) for name in ATTENTIONS if hasattr(layer, name)), None)
        wide, groups = getattr(attention, "head_dim", None), getattr(attention, "num_key_value_groups", None)
        wide = wide or getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = heads // groups if groups else getattr(config, "num_key_value_heads", None) or heads
        widths.append((heads * wide, kv_heads * wide))
    return widths


def _beside(family: Family) -> int:
    """Weights that every token passes outside of the decoder layers: Gemma 4's inputs of each layer."""
    text = family.language_model
    inside = {id(module) for module in text.layers.modules()}
    linear = (module for module in text.modules() if isinstance(module, torch.nn.Linear) and id(module) not in inside)
    return sum(module.weight.numel() for module in linear)


def _encoder_width(family: Family) -> int:
    """Width of all heads of the encoder together."""
    config = family.model.config.vision_config
    return getattr(config, "embed_dim", None) or config.hidden_size
