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
from visiontrim.models.family import Family, Picture, family_of
from visiontrim.models.text import TextTower
from visiontrim.run import trim

TIMERS = ("vision", "method", "prefill", "decode", "total")
"""Seconds of the encoder and projector, of the method itself, of the language model's prefill, of one decoding step,
and of the whole ``generate()``."""
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
    opened: Callable[[Clock | None], AbstractContextManager]
    """Opens the context in which the model answers that way, timed by a clock if there is one."""
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
            clock = Clock(model, timer)
            with torch.inference_mode(), way.opened(clock), clock:
                output = model.generate(**way.inputs, **options, return_dict_in_generate=True)
            kept[way.name] = cache_bytes(given_cache(output))
            done += 1
            if progress is not None:
                progress(done, len(ways) * (load.warmup + load.rounds))
            if turn >= load.warmup:
                seconds = clock.seconds
                seconds["decode"] /= max(load.answer - 1, 1)
                samples[way.name].append(seconds)
    short = options | {"max_new_tokens": 2, "min_new_tokens": 2}
    return [_row(way, samples, kept[way.name], _peak(model, way, short)) for way in ways]


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
    ways = [Way("plain", "plain", total, inputs, lambda clock: nullcontext())]
    ideals: dict[int, Way] = {}
    for method in methods:
        run = trim(model, method, question=QUESTION, text_tower=subject.text_tower, processor=subject.processor)
        with torch.inference_mode(), run:
            model(**inputs, logits_to_keep=1)
        mean = run.report.mean
        size = max(round(mean), 1)
        ideal = Ideal(family, inputs, size)
        ideals[size] = Way(f"ideal of {size}", "ideal", size, ideal.inputs, lambda clock, ideal=ideal: ideal)

        def opened(clock: Clock | None, method: Method = method) -> AbstractContextManager:
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


def noise_tower(family: Family) -> tuple[TextTower | None, Any]:
    """A text tower with random weights in the shape of CLIP ViT-L/14, where the family can have one, and a tokenizer.

    The tokenizer finds the words of any text at random.
    """
    if not family.text_tower or family.vision_width is None:
        return None, _noise_words
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
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
    with torch.inference_mode(), way.opened(None):
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
        "of_plain": {timer: _ratios(ours, plain, timer) for timer in TIMERS if timer != "method"},
    }
    if way.ideal is not None:
        whole = [sample["vision"] + sample["prefill"] for sample in plain]
        shares = [sample["method"] / of for sample, of in zip(ours, whole, strict=True)]
        row["method_of_plain_prefill"] = _quartiles(shares)
        row["ideal_of_ours"] = {timer: _ratios(samples[way.ideal], ours, timer) for timer in ("decode", "total")}
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
