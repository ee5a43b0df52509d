"""Promises, times and memory on a GPU in one go: ``python benchmarks/gpu.py``, less than ten minutes on a large card.

Needs PyTorch, transformers and this package, and no network: models have the shapes of LLaVA-1.5-7B and
Qwen2.5-VL-7B and random weights, so that nothing here says anything about answers. Every part stands for itself: one
that fails is told with its error and the next one begins, and what is measured is written after each. ``--small`` runs
the same code with narrow models, ``--device cpu`` anywhere.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ltam
import torch
from speed import shares

import visiontrim as vt
from visiontrim import promises
from visiontrim.doctor import diagnose
from visiontrim.measure.bench import Load, Subject, bench, environment, noise_tower
from visiontrim.measure.noise import noise_prompt
from visiontrim.measure.shapes import Shape
from visiontrim.models.family import family_of
from visiontrim.ops.affinity import local_affinity

MODELS = ("llava-1.5-7b", "qwen2.5-vl-7b")
METHODS = ("visiontrim", "visiontrim:stages=vision", "fastv", "random")
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
TEXT = 60
"""Words of a prompt."""
SIDE = 168
"""Pixels of a picture where models are small."""


@dataclass(frozen=True)
class Size:
    """How much is done."""

    device: torch.device
    small: bool
    batches: tuple[int, ...]
    answer: int
    rounds: int
    warmup: int
    keep: int | float

    def shape(self, name: str, layers: int | None = None) -> Shape:
        """Of a model: whole, or ``layers`` of its decoder; narrow where it is small."""
        shape = Shape.load(name)
        if self.small:
            shape = shape.narrow().sliced(5)
            if hasattr(shape.config.vision_config, "image_size"):
                shape.config.vision_config.image_size = SIDE
            return shape.seeing(SIDE, SIDE, 0)
        return shape if layers is None else shape.sliced(layers)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def kept_promises(size: Size) -> dict[str, Any]:
    """Every promise in float32, on two decoder layers, as ``visiontrim doctor`` has them."""
    names = MODELS[:1] if size.small else MODELS
    found = {name: diagnose(name, size.device).to_dict() for name in names}
    broken = [f"{name}: {one}" for name, told in found.items() for one in told["promises"] if not one["kept"]]
    if broken:
        raise promises.PromiseError("; ".join(broken))
    return {name: {one["promise"]: one["said"] for one in told["promises"]} for name, told in found.items()}


def half_precision(size: Size) -> dict[str, Any]:
    """In bfloat16 with every attention that is there.

    Keeping everything is bit-identical, the cache is as reported, and of what is left the answer is as far from that
    in float32 as the plain model's own, or less than twice as far.
    """
    found: dict[str, Any] = {}
    for name in MODELS:
        shape, found[name] = size.shape(name, 4), {}
        torch.manual_seed(0)
        model: Any = shape.build(str(size.device), torch.float32, "eager")
        row = noise_prompt(family_of(model), shape.picture, TEXT, 1)
        half = vt.Uniform(keep=0.25)  # the same tokens whatever is rounded
        exact = {"plain": _logits(model, row), "ours": _logits(model, row, half)}
        model = model.to(torch.bfloat16)
        row = {key: value.bfloat16() if value.is_floating_point() else value for key, value in row.items()}
        for attention in ATTENTIONS:
            if attention == "flash_attention_2" and (
                size.device.type != "cuda" or importlib.util.find_spec("flash_attn") is None
            ):
                found[name][attention] = "not installed"
                continue
            model.set_attn_implementation(attention)
            apart = {
                way: float((_logits(model, row, None if way == "plain" else half).float() - logits).abs().max())
                for way, logits in exact.items()
            }
            said = {
                "everything": promises.everything_is_bit_identical(model, row, [vt.Random(keep=1.0)]),
                "cache": promises.cache_is_as_reported(model, row, half),
                "from_float32": apart,
            }
            if apart["ours"] > 2 * apart["plain"]:
                raise promises.PromiseError(f"{name} with {attention}: {said}")
            found[name][attention] = said
        del model
        _free()
    return found


@torch.no_grad()
def _logits(model: Any, row: dict[str, Any], method: Any = None) -> torch.Tensor:
    if method is None:
        return model(**row).logits[:, -1]
    with vt.trim(model, method):
        return model(**row).logits[:, -1]


def speed(size: Size) -> dict[str, Any]:
    """``visiontrim bench`` at every batch, in bfloat16: plain, methods and ideals, eager with dynamic caches."""
    found: dict[str, Any] = {}
    for name in MODELS:
        shape = size.shape(name)
        dtype = torch.float32 if size.device.type == "cpu" else torch.bfloat16  # which takes a CPU ten times as long
        model: Any = shape.build(str(size.device), dtype, "sdpa")
        model.generation_config.eos_token_id = None
        subject = Subject(shape.name, model, shape.picture, *noise_tower(family_of(model), 1 if size.small else 12))
        methods = [vt.load_method(method, keep=size.keep) for method in METHODS]
        found[name] = {"environment": environment(model)}
        for batch in size.batches:
            load = Load(batch, TEXT, size.answer, size.rounds, size.warmup)
            found[name][f"batch {batch}"] = bench(subject, methods, load)
        found[name]["static"] = _static(size, subject)
        del model, subject
        _free()
    return found


def _static(size: Size, subject: Subject) -> list[dict[str, Any]]:
    """Seconds of a decoding step by kind of cache: a static one is decoded by compiled graphs on a GPU."""
    model: Any = subject.model
    rows = []
    for batch in size.batches:
        inputs = noise_prompt(family_of(model), subject.picture, TEXT, batch)
        for way in ("plain", METHODS[1]):
            for cache in ("dynamic", "static"):
                step = _step(size, model, inputs, way, cache)
                rows.append({"batch": batch, "way": way, "cache": cache, "step_seconds": step})
    return rows


def _step(size: Size, model: Any, inputs: dict[str, Any], way: str, cache: str) -> float:
    """The median over rounds of what each further token takes."""

    def answered(tokens: int) -> float:
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        if cache == "static":
            options["cache_implementation"] = "static"
        size.wait()
        began = time.perf_counter()
        model.generate(**inputs, **options)
        size.wait()
        return time.perf_counter() - began

    def measured() -> float:
        for tokens in (size.answer, 2):  # compiles
            answered(tokens)
        pairs = [(answered(size.answer), answered(2)) for _ in range(size.rounds)]
        return statistics.median((long - short) / (size.answer - 2) for long, short in pairs)

    with torch.inference_mode():
        if way == "plain":
            return measured()
        with vt.trim(model, way, keep=size.keep):
            return measured()


def local_score(size: Size) -> dict[str, Any]:
    """VisionTrim's local score (eq. 4) against a loop over tokens and neighbours, as its formula reads."""
    features = torch.randn(1, ltam.SIDE**2, ltam.DIM, device=size.device)
    grid = (1, ltam.SIDE, ltam.SIDE)
    coordinates = torch.cartesian_prod(*map(torch.arange, grid))[None].to(size.device)

    def ours() -> torch.Tensor:
        score = local_affinity(features, coordinates, grid)
        size.wait()
        return score

    torch.testing.assert_close(ours()[0].cpu(), ltam.double_loop(features[0]), rtol=1e-3, atol=1e-3)
    loop = ltam.median_ms(lambda: ltam.double_loop(features[0]), 1)
    return {"loop_of_ours": loop / ltam.median_ms(ours, 20)}


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def markdown(told: dict[str, Any]) -> str:
    """What was found, for a reader."""
    lines = [f"# On {told['device_name']}", "", f"PyTorch {torch.__version__}, {told['when']}.", ""]
    for part, found in told["parts"].items():
        lines += [f"## {part.replace('_', ' ')}", ""]
        if "error" in found:
            lines += [f"Failed: {found['error']}", ""]
        elif part == "speed":
            for name, measured in found.items():
                lines += _tables(name, measured)
        else:
            lines += ["```json", json.dumps(found, indent=1), "```", ""]
    return "\n".join(lines)


def _tables(name: str, measured: dict[str, Any]) -> list[str]:
    lines = []
    for key in [key for key in measured if key.startswith("batch")]:
        lines += [f"### {name}, {key}: shares of the plain model, medians", ""]
        lines += [*shares(measured[key]), ""]
    lines += [
        f"### {name}: a decoding step, of the plain model's with a dynamic cache",
        "",
        "| batch | way | cache | |",
    ]
    lines.append("|---|---|---|---|")
    for row in measured["static"]:
        (plain,) = [
            one["step_seconds"]
            for one in measured["static"]
            if (one["batch"], one["way"], one["cache"]) == (row["batch"], "plain", "dynamic")
        ]
        lines.append(f"| {row['batch']} | {row['way']} | {row['cache']} | {row['step_seconds'] / plain:.3f} |")
    return [*lines, ""]


PARTS: tuple[Callable[[Size], dict[str, Any]], ...] = (kept_promises, half_precision, local_score, speed)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="narrow models, to try the program itself")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="JSON; Markdown is written beside it")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU: --device cpu --small tries the program")
    size = Size(device, given.small, *(((2,), 3, 1, 0, 0.5) if given.small else ((1, 8), 32, 4, 2, 64)))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    told: dict[str, Any] = {"device_name": name, "when": datetime.now(UTC).isoformat(timespec="seconds"), "parts": {}}
    failed = False
    for part in PARTS:
        began = time.perf_counter()
        try:
            found = part(size)
        except Exception as error:  # the rest of a rare hour on a GPU is not lost with it
            traceback.print_exc()
            found, failed = {"error": f"{type(error).__name__}: {error}"}, True
            _free()
        told["parts"][part.__name__] = found
        print(f"{part.__name__}: {'FAILED' if 'error' in found else 'done'} after {time.perf_counter() - began:.0f} s")
        given.out.write_text(json.dumps(told, indent=1) + "\n")
        given.out.with_suffix(".md").write_text(markdown(told) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
