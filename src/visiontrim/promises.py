"""What the engine promises of any model, each promise as a check that runs on the model it is given.

``visiontrim doctor`` runs them on the model that a user has, the tests on tiny ones of every family. The references are
the plain model itself: with nothing removed, with tokens hidden by masks in place of being removed, and with its rows
one at a time. Which tokens are gone is read off what decoder layers are called with, not off a run's trace. It knows
tensors that go in and come out; it knows nothing of pictures, and of how the engine removes tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from visiontrim.core.errors import TrimError
from visiontrim.core.method import Method
from visiontrim.engine.upstream import SHARED, cache_name, given_cache
from visiontrim.models.family import family_of
from visiontrim.run import Run, trim

ANSWER = 4
"""Tokens of each answer."""
TOLERANCE = 2e-5
"""Largest difference of logits, as a share of the largest (or of 1), of two ways to the same numbers in float32."""

Inputs = Mapping[str, Any]
"""What ``generate()`` takes: ``input_ids`` and ``attention_mask`` [rows, tokens], left-padded, and pixels."""


class PromiseError(Exception):
    """A promise that was not kept; the message says by how much."""


@dataclass(frozen=True, slots=True)
class Result:
    """One promise, and whether it was kept."""

    promise: str
    kept: bool
    said: str
    """What was found, or why it is broken."""
    seconds: float


def checked(promise: str, check: Callable[[], str]) -> Result:
    """Run ``check``, which says what it found, or raises :class:`PromiseError`, or whatever else a model can raise."""
    start = time.perf_counter()
    try:
        with torch.no_grad():
            kept, said = True, check()
    except Exception as error:  # what a model of an unknown release does is what the user wants to be told
        lines = str(error).strip().splitlines()
        kept, said = False, lines[0] if lines else "no message"
        if not isinstance(error, PromiseError | TrimError):
            said = f"{type(error).__name__}: {said}"
    return Result(promise, kept, said, time.perf_counter() - start)


def everything_is_bit_identical(model: Any, inputs: Inputs, plans: Sequence[Method]) -> str:
    """Runs of ``plans``, which keep everything, give the plain model's logits, and so does the model after them."""
    plain = logits(answer(model, inputs))
    for plan in plans:
        with trim(model, plan):
            ours = logits(answer(model, inputs))
        if not ours.equal(plain):
            raise PromiseError(f"{plan} keeps everything, but logits differ by {_apart(ours, plain):.2g}")
    if not logits(answer(model, inputs)).equal(plain):
        raise PromiseError("once the runs are closed, the model answers otherwise than before")
    return f"{plain.shape[0]} x {plain.shape[1]} tokens answered"


def removal_equals_masking(model: Any, inputs: Inputs, plan: Method) -> str:
    """Removing tokens is hiding them from the layers that they do not reach. ``plan`` must merge nothing."""
    _, output, gone = watched(model, inputs, plan)
    ours, plain = logits(output), logits(answer(model, inputs))
    with Masked(model, inputs["attention_mask"], gone):
        reference = logits(answer(model, inputs))
    said = _equal(ours, reference)
    _differs(ours, plain)
    return said


def removal_equals_feeding(model: Any, row: Inputs, plan: Method) -> str:
    """Removing tokens before the first decoder layer is feeding the others alone, at their places.

    ``plan`` has no later stage and merges nothing, ``row`` is one without padding. It is the oracle where layers carry
    a state from token to token, through which what a mask hides still acts.
    """
    _, output, gone = watched(model, row, plan, tokens=1)
    ours, plain = logits(output), logits(answer(model, row, tokens=1))
    places = (~gone[0][0]).nonzero()[:, 0] if 0 in gone else torch.arange(row["input_ids"].shape[1])

    def feed(module, args, kwargs):
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(row["input_ids"].shape[1], device=ours.device)[None]
        fed = {"inputs_embeds": kwargs["inputs_embeds"][:, places], "position_ids": positions[..., places]}
        return args, kwargs | fed | {"attention_mask": torch.ones_like(row["attention_mask"][:, places])}

    handle = family_of(model).language_model.register_forward_pre_hook(feed, with_kwargs=True)
    try:
        reference = logits(answer(model, row, tokens=1))
    finally:
        handle.remove()
    said = _equal(ours, reference)
    _differs(ours, plain)
    return said


def batch_equals_rows(model: Any, rows: Sequence[Inputs], together: Inputs, plan: Method) -> str:
    """A left-padded batch gives every row the logits that the row has by itself.

    Where the plain model breaks that, too (HunyuanOCR counts its images over the whole batch), the error says so.
    """
    with trim(model, plan):
        ours, alone = _batch_and_rows(model, rows, together)
    try:
        return _equal(ours, alone)
    except PromiseError as broken:
        plain, single = _batch_and_rows(model, rows, together)
        own = _apart(plain, single)
        if own <= _tolerance(single):
            raise
        raise PromiseError(f"{broken}; the plain model's own batch differs by {own:.2g} from its rows") from broken


def _batch_and_rows(model: Any, rows: Sequence[Inputs], together: Inputs) -> tuple[Tensor, Tensor]:
    """Logits of the rows as a batch, and one at a time."""
    return logits(answer(model, together)), torch.cat([logits(answer(model, row)) for row in rows])


def turn_equals_one_shot(model: Any, inputs: Inputs, question: Int[Tensor, "rows tokens"], plan: Method) -> str:
    """A second turn on the first's cache is the whole conversation in one prompt. ``plan`` must draw alike in both."""
    name = cache_name(type(family_of(model).language_model).forward)
    with trim(model, plan):
        first = answer(model, inputs)
        whole = _conversation(inputs, first.sequences, question)
        text = {key: value for key, value in whole.items() if value.shape == whole["input_ids"].shape}
        ours = logits(answer(model, text | {str(name): given_cache(first)}))
    with trim(model, plan):
        reference = logits(answer(model, whole))
    return _equal(ours, reference)


def cache_is_as_reported(model: Any, inputs: Inputs, plan: Method) -> str:
    """Every layer caches as many tokens and bytes as the report says, which is what reached it, and one a step."""
    run, output, gone = watched(model, inputs, plan, tokens=1)
    trace, mask = run.trace, inputs["attention_mask"].bool()
    layers = _layers(output)
    held = [keys.shape[-2] for keys, _ in layers.values()]
    stored = sum(part.nbytes for layer in layers.values() for part in layer)
    reached = []
    for layer in range(len(trace.widths)):
        mask = mask & ~gone[layer] if layer in gone else mask
        reached.append(int(mask.sum(1).max()))
    for what, counts in (
        ("the report says", trace.cache_lengths),
        ("the layers are said to process", trace.widths),
        ("so many reach the layers:", reached),
    ):
        counted = [count for layer, count in enumerate(counts) if layer in layers]
        if counted != held:
            raise PromiseError(f"the cache holds {_list(held)} tokens by layer, but {what} {_list(counted)}")
    if len(layers) == len(trace.widths) and stored != trace.cache_bytes:
        raise PromiseError(f"the cache has {stored:,} bytes, but the report says {trace.cache_bytes:,}")
    with run:
        later = [keys.shape[-2] for keys, _ in _layers(answer(model, inputs)).values()]
    if later != [length + ANSWER - 1 for length in held]:
        raise PromiseError(f"{ANSWER - 1} steps made the cache's {_list(held)} tokens {_list(later)}")
    return f"{_list(held)} of {trace.length} tokens by layer"


def answer(model: Any, inputs: Inputs, tokens: int = ANSWER, **options: Any) -> Any:
    """Output of ``generate()`` with logits: greedy, and as many ``tokens`` whatever they are."""
    if model.generation_config.pad_token_id is None:
        options["pad_token_id"] = 0
    return model.generate(
        **inputs,
        **options,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        num_beams=1,
        output_logits=True,
        return_dict_in_generate=True,
    )


def logits(output: Any) -> Float[Tensor, "rows steps words"]:
    """Those of every step of an answer."""
    return torch.stack(output.logits, 1)


def left_padded(
    rows: Sequence[Inputs], padding: int, joined: Callable[[str, list[Tensor]], Tensor] | None = None
) -> dict[str, Tensor]:
    """A batch of rows [1, tokens], with ``padding`` as the id before the shorter ones.

    ``joined`` puts what rows have under a name together; without it, pixels come one after the other.
    """
    width = max(row["input_ids"].shape[1] for row in rows)

    def padded(row: Inputs, key: str) -> Tensor:
        if row[key].shape != row["input_ids"].shape:
            return row[key]
        return pad(row[key], (width - row[key].shape[1], 0), value=padding if key == "input_ids" else 0)

    parts = {key: [padded(row, key) for row in rows] for key in rows[0]}
    return {key: torch.cat(of_rows) if joined is None else joined(key, of_rows) for key, of_rows in parts.items()}


def watched(
    model: Any, inputs: Inputs, plan: Method, tokens: int = ANSWER
) -> tuple[Run, Any, dict[int, Bool[Tensor, "rows tokens"]]]:
    """The run of ``plan`` on a prompt, the answer, and by decoder layer the places that are gone from there on.

    What a layer is called with is compared before and after the run's hooks, bit by bit.
    """
    with _Entering(model) as before, trim(model, plan) as run, _Entering(model) as after:
        output = answer(model, inputs, tokens)
    mask = inputs["attention_mask"].bool()
    places = [row.nonzero()[:, 0].tolist() for row in mask]
    gone: dict[int, Tensor] = {}
    for layer, came in before.seen.items():
        went = after.seen[layer]
        if came.shape == went.shape:
            continue
        left = [
            [row[index] for index in _found(came[number, came.shape[1] - len(row) :], went[number])]
            for number, row in enumerate(places)
        ]
        if max(map(len, left)) != went.shape[1]:
            raise PromiseError(f"what reaches decoder layer {layer} is not a part of what came to it")
        gone[layer] = torch.zeros_like(mask)
        for number, (row, stay) in enumerate(zip(places, left, strict=True)):
            gone[layer][number, sorted({*row} - {*stay})] = True
        places = left
    return run, output, gone


class Masked(AbstractContextManager):
    """The plain model, with tokens made invisible from given decoder layers on instead of removed.

    Models that let image tokens attend in both directions keep their own masks otherwise.

    Args:
        model: a plain model, whose attention takes masks [rows, 1, queries, keys] (sdpa, eager).
        mask: padding mask [rows, prompt] of the first forward's prompt.
        hidden: for decoder layers in ascending order the places [rows, prompt] that are invisible from there on.
    """

    def __init__(self, model: Any, mask: Tensor, hidden: Mapping[int, Tensor]) -> None:
        self.mask, self.hidden = mask.bool(), hidden
        self.family, self.handles = family_of(model), []

    def __enter__(self) -> Masked:
        for index, layer in enumerate(self.family.language_model.layers):
            self.handles.append(layer.register_forward_pre_hook(self._hook(index), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, index: int) -> Callable:
        visible = self.mask.clone()
        for start, places in self.hidden.items():
            if start <= index:
                visible &= ~places

        def hook(module, args, kwargs):
            hidden, cache = args[0], given_cache(kwargs)
            batch, queries = hidden.shape[-3:-1]  # Gemma 3n has several predictions of them before
            past = 0 if cache is None else _before(cache, index, queries)
            keys = past + queries
            seen = visible.repeat_interleave(batch // visible.shape[0], 0)[:, :keys]
            seen = pad(seen, (0, keys - seen.shape[1]), value=True)
            own = kwargs["attention_mask"] if self.family.bidirectional else None
            places = torch.arange(keys, device=hidden.device)
            if own is None:
                own = places <= places[past:, None]
            own = own if own.dtype == torch.bool else own == 0
            allowed = own & seen[:, None, None, :]
            # a row of nothing but False would be NaN: such rows are invisible themselves, any value will do
            allowed = allowed | ((places == places[past:, None]) & ~allowed.any(-1, keepdim=True))
            bias = torch.zeros_like(allowed, dtype=hidden.dtype)
            return args, kwargs | {"attention_mask": bias.masked_fill(~allowed, torch.finfo(hidden.dtype).min)}

        return hook


def _before(cache: Any, layer: int, queries: int) -> int:
    """Tokens cached before the forward that is at decoder layer ``layer`` with ``queries`` tokens."""
    if layer < len(cache.layers) and isinstance(cache.layers[layer], SHARED):  # an earlier one has cached them already
        return cache.get_seq_length() - queries
    return cache.get_seq_length(layer)


class _Entering(AbstractContextManager):
    """What the text model (as layer 0) and the decoder layers after the first are first called with."""

    def __init__(self, model: Any) -> None:
        text = family_of(model).language_model
        self._modules = [text, *text.layers[1:]]
        self._handles: list[Any] = []
        self.seen: dict[int, Tensor] = {}
        """By layer, [rows, tokens, dim]."""

    def __enter__(self) -> _Entering:
        for layer, module in enumerate(self._modules):
            self._handles.append(module.register_forward_pre_hook(self._hook(layer), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, layer: int) -> Callable:
        def hook(module, args, kwargs) -> None:
            given = kwargs.get("inputs_embeds", kwargs.get("hidden_states", args[0] if args else None))
            self.seen.setdefault(layer, given)

        return hook


def _found(came: Float[Tensor, "many dim"], went: Float[Tensor, "few dim"]) -> list[int]:
    """Which of the tokens that came the last ones that went on are, in order; those before them are padding."""
    found, left = [], len(went)
    for place in reversed(range(len(came))):
        if left and came[place].equal(went[left - 1]):
            left -= 1
            found.append(place)
    return found[::-1]


def _conversation(inputs: Inputs, said: Tensor, question: Tensor) -> dict[str, Tensor]:
    """The prompt, what was ``said`` with and after it, and a further question, as one prompt."""
    whole = dict(inputs)
    added = said.shape[1] - inputs["input_ids"].shape[1] + question.shape[1]
    for key, value in inputs.items():
        if key == "input_ids":
            whole[key] = torch.cat([said, question], 1)
        elif value.shape == inputs["input_ids"].shape:
            whole[key] = pad(value, (0, added), value=int(key == "attention_mask"))
    return whole


def _layers(output: Any) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values of every layer of the cache in an output that has them."""
    cache: Any = given_cache(output)
    layers = enumerate(cache.layers)
    return {index: (layer.keys, layer.values) for index, layer in layers if getattr(layer, "keys", None) is not None}


def _apart(ours: Tensor, reference: Tensor) -> float:
    return float((ours - reference).abs().max()) if ours.shape == reference.shape else float("inf")


def _tolerance(reference: Tensor) -> float:
    return TOLERANCE * max(1.0, float(reference.abs().max()))


def _equal(ours: Tensor, reference: Tensor) -> str:
    """Say how far two ways are apart. Raises :class:`PromiseError` if that is more than rounding."""
    apart, allowed = _apart(ours, reference), _tolerance(reference)
    if not apart <= allowed:  # NaN is broken, too
        raise PromiseError(f"logits differ by {apart:.2g}, and {allowed:.2g} would be rounding")
    return f"logits differ by {apart:.1g}"


def _differs(ours: Tensor, plain: Tensor) -> None:
    """Raise :class:`PromiseError` where equality proves nothing."""
    if _apart(ours, plain) <= 10 * _tolerance(plain):
        raise PromiseError(
            "logits are those of the plain model: nothing was removed, or the model does not see pictures"
        )


def _list(counts: Sequence[int]) -> str:
    """``40, 40, 28``, or ``40`` where all are alike."""
    return str(counts[0]) if len(set(counts)) == 1 else ", ".join(map(str, counts))
