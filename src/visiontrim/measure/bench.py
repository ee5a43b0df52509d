"""How fast a method is: interleaved calls of the plain model, the method, and the ideal of the same size."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, PreTrainedModel

from visiontrim.core.method import Method
from visiontrim.engine.cache import cache_bytes
from visiontrim.engine.upstream import given_cache
from visiontrim.measure.clock import Clock
from visiontrim.measure.ideal import Ideal
from visiontrim.measure.memory import peak_bytes
from visiontrim.measure.noise import noise_prompt
from visiontrim.measure.steps import compare
from visiontrim.models.family import Family, Picture, family_of
from visiontrim.models.text import TextTower
from visiontrim.run import trim

TIMERS = ("opening", "vision", "method", "prefill", "decode", "total", "cpu")
"""Seconds of opening and closing a run, of the encoder and projector, of the method itself, of the language model's
prefill, of one decoding step, of the whole with ``generate()``; CPU seconds of all threads in the whole."""
QUESTION = "what shape is blue ?"
"""Read anew by the text tower, within the method's time, in every call."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to time, and what reads the question for methods that are guided by it."""

    name: str
    model: PreTrainedModel
    picture: Picture
    text_tower: TextTower | None = None
    processor: Any = None


@dataclass(frozen=True, slots=True)
class Load:
    """What every call does."""

    batch: int = 1
    text: int = 60
    answer: int = 64
    rounds: int = 10
    """How often every way is timed."""
    warmup: int = 2
    """Rounds before these."""
    cpu_time: bool = False
    """CPU seconds of all threads in place of wall seconds: for machines that others use too."""


@dataclass(frozen=True, slots=True)
class Way:
    """One of the ways to answer that take turns."""

    name: str
    kind: str
    """plain, method or ideal."""
    tokens: float
    """Mean vision tokens of a picture per decoder layer."""
    inputs: Mapping[str, Tensor]
    open_on: Callable[[Any, Clock | None], AbstractContextManager]
    """Opens the context in which a model answers that way, timed by a clock if there is one."""
    method: str = ""
    """Name of the method without its budget."""
    ideal: str | None = None
    """Name of the way that is the ideal of this one."""


def bench(
    subject: Subject, methods: Sequence[Method], load: Load, progress: Callable[[int, int], object] | None = None
) -> list[dict[str, Any]]:
    """A row for the plain model, for every method, and for the ideal of every size; ready for JSON.

    The ways take turns, and every round begins with another one, so that all see the same machine. Times are
    [lower quartile, median, upper quartile] of all rounds. Ratios are those of a ratio in each round. ``progress`` is
    told how many calls of how many are done, between two of them.
    """
    ways = _ways(subject, methods, load)
    model: Any = subject.model
    options = {"max_new_tokens": load.answer, "min_new_tokens": load.answer, "do_sample": False}
    timer = time.process_time if load.cpu_time else time.perf_counter
    samples: dict[str, list[dict[str, float]]] = {way.name: [] for way in ways}
    kept: dict[str, int] = {}
    done = 0
    for turn in range(load.warmup + load.rounds):
        for way in (*ways[turn % len(ways) :], *ways[: turn % len(ways)]):
            seconds, output = _timed(model, way, subject.text_tower, options, timer)
            kept[way.name] = cache_bytes(given_cache(output))
            done += 1
            if progress is not None:
                progress(done, len(ways) * (load.warmup + load.rounds))
            if turn >= load.warmup:
                seconds["decode"] /= max(load.answer - 1, 1)
                samples[way.name].append(seconds)
    short = options | {"max_new_tokens": 2, "min_new_tokens": 2}
    rows = [_row(way, samples, kept[way.name], _peak(model, way, short)) for way in ways]
    for row, steps in zip(rows, _steps(model, ways, options, load), strict=True):
        row |= steps
    return rows


def _timed(
    model: Any, way: Way, tower: TextTower | None, options: Mapping[str, Any], timer: Callable[[], float]
) -> tuple[dict[str, float], Any]:
    """Seconds by :data:`TIMERS` of one call, with the opening of its run, and its output. ``tower`` reads anew."""
    if tower is not None:
        tower.forget()
    clock = Clock(model, timer)
    began, cpu = timer(), time.process_time()
    with torch.inference_mode(), way.open_on(model, clock):
        opened = timer()
        with clock:
            output = model.generate(**way.inputs, **options, return_dict_in_generate=True)
        seconds = clock.seconds  # waits for the device
        answered = timer()
    ended = timer()
    seconds["opening"] = opened - began + ended - answered
    seconds["total"] += seconds["opening"]
    return seconds | {"cpu": time.process_time() - cpu}, output


def _steps(model: Any, ways: Sequence[Way], options: Mapping[str, Any], load: Load) -> list[dict[str, Any]]:
    """What the rows of ``ways`` say of decoding steps in turn; nothing where an answer has no step.

    ``step_ideal_of_ours`` for a method, ``step_noise`` for an ideal beside itself: the ratios that
    :func:`visiontrim.measure.steps.ratio` gives.
    """
    pairs = [(way.name, way.ideal or way.name) for way in ways if way.kind != "plain"]
    if load.answer < 2 or not pairs:
        return [{} for _ in ways]

    def answering(way: Way) -> Callable[[Any, Any], object]:
        def answer(model: Any, turns: Any) -> None:
            with way.open_on(model, None):
                model.generate(**way.inputs, **options, stopping_criteria=[turns])

        return answer

    found = compare({way.name: answering(way) for way in ways}, pairs, model, max(load.rounds // 2, 1))
    ratios = iter(found)
    return [
        {} if way.kind == "plain" else {"step_ideal_of_ours" if way.ideal else "step_noise": next(ratios)}
        for way in ways
    ]


def environment(model: PreTrainedModel) -> dict[str, Any]:
    """What a time depends on besides the load."""
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    versions = {package: version(package) for package in ("visiontrim", "torch", "transformers")}
    return {
        "device": str(device),
        "device_name": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **versions,
    }


def _ways(subject: Subject, methods: Sequence[Method], load: Load) -> list[Way]:
    """Plain, every method, and the ideals; running every method once says how many tokens it leaves."""
    model: Any = subject.model
    family = family_of(model)
    inputs = noise_prompt(family, subject.picture, load.text, load.batch)
    total = int(family.placeholders(inputs["input_ids"])[0].sum())
    ways = [Way("plain", "plain", total, inputs, lambda model, clock: nullcontext())]
    ideals: dict[int, Way] = {}
    for method in methods:
        run = trim(model, method, question=QUESTION, text_tower=subject.text_tower, processor=subject.processor)
        with torch.inference_mode(), run:
            model(**inputs, logits_to_keep=1)
        mean = run.report.mean
        size = max(round(mean), 1)
        ideals[size] = _ideal(family, inputs, size)

        def opened(model: Any, clock: Clock | None, method: Method = method) -> AbstractContextManager:
            return trim(
                model,
                method,
                question=QUESTION,
                text_tower=subject.text_tower,
                processor=subject.processor,
                clock=clock,
            )

        ways.append(Way(str(method), "method", mean, inputs, opened, _label(method), ideals[size].name))
    return [*ways, *ideals.values()]


def _ideal(family: Family, inputs: Mapping[str, Tensor], size: int) -> Way:
    own = Ideal(family, inputs, size)

    def opened(model: Any, clock: Clock | None) -> AbstractContextManager:
        return own if model is family.model else Ideal(family_of(model), inputs, size)

    return Way(f"ideal of {size}", "ideal", size, own.inputs, opened)


def noise_tower(family: Family, layers: int = 12) -> tuple[TextTower | None, Any]:
    """A text tower with random weights in the shape of CLIP ViT-L/14, where the family can have one, and a tokenizer.

    The tokenizer finds the words of any text at random. ``layers`` are fewer where no time is looked at.
    """
    if not family.text_tower or family.vision_width is None:
        return None, _noise_words
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": layers, "num_attention_heads": 12}
    vision = {"hidden_size": family.vision_width, "num_hidden_layers": 1, "num_attention_heads": 1}  # never run
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=768)
    with family.model.device:
        tower = CLIPModel._from_config(config, dtype=family.model.dtype)
    return TextTower(tower.eval(), cast(Any, _noise_words)), _noise_words


def _noise_words(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
    return {"input_ids": list(range(20, 20 + len(text.split()) + 2 * add_special_tokens))}


def _label(method: Method) -> str:
    recipe = method.to_dict()
    return str(method) if "keep" not in recipe else str(recipe["method"])


def _peak(model: Any, way: Way, options: Mapping[str, Any]) -> int:
    with torch.inference_mode(), way.open_on(model, None):
        return peak_bytes(lambda: model.generate(**way.inputs, **options), model.device)


def _row(way: Way, samples: Mapping[str, list[dict[str, float]]], kv_bytes: int, peak: int) -> dict[str, Any]:
    ours, plain = samples[way.name], samples["plain"]
    row = {
        "name": way.name,
        "kind": way.kind,
        "method": way.method,
        "tokens": way.tokens,
        "kv_bytes": kv_bytes,
        "peak_bytes": peak,
        "seconds": {timer: _quartiles([sample[timer] for sample in ours]) for timer in TIMERS},
        "of_plain": {timer: _ratios(ours, plain, timer) for timer in TIMERS if timer not in ("method", "opening")},
    }
    if way.ideal is not None:
        whole = [sample["vision"] + sample["prefill"] for sample in plain]
        shares = [sample["method"] / of for sample, of in zip(ours, whole, strict=True)]
        row["method_of_plain_prefill"] = _quartiles(shares)
        row["ideal_of_ours"] = {timer: _ratios(samples[way.ideal], ours, timer) for timer in ("decode", "total", "cpu")}
    return row


def _ratios(over: Sequence[Mapping[str, float]], under: Sequence[Mapping[str, float]], timer: str) -> list[float]:
    pairs = [(a[timer], b[timer]) for a, b in zip(over, under, strict=True)]
    return _quartiles([a / b for a, b in pairs if b] or [float("nan")])


def _quartiles(values: Sequence[float]) -> list[float]:
    return [float(value) for value in np.percentile(values, [25, 50, 75])]


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
