"""Ways to a first token beside each other, counted and timed in turn, in any release of transformers.

Counts are those of the project's own instruments (kernels, stops, peak bytes), which know PyTorch alone and are loaded
from their files, since the package asks for a newer transformers than a peer may. It knows calls, no models.
"""

from __future__ import annotations

import copy
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

MEASURE = Path(__file__).parent.parent / "src" / "visiontrim" / "measure"


def _attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


ON_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
"""What PyTorch's table of FLOPs lacks."""


def instrument(name: str) -> Any:
    """A module of ``visiontrim.measure`` that needs nothing of the package."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, MEASURE / f"{name}.py")
        assert spec is not None and spec.loader is not None  # noqa: PT018
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def deepen(layers: Any, depth: int) -> None:
    """``depth`` decoder layers in place of one, with its weights: as much work in a fraction of the memory."""
    (layer,) = layers
    shared = {id(tensor): tensor for tensor in (*layer.parameters(), *layer.buffers())}
    for index in range(1, depth):
        layers.append(copy.deepcopy(layer, dict(shared)))
        layers[index].self_attn.layer_idx = index


@dataclass(frozen=True)
class Way:
    """One way to a first token."""

    name: str
    answer: Callable[[], Any]
    """All of a call, with what it takes to set a method up; gives the cache."""
    beside: str = "plain"
    """Name of the way that it is divided by."""
    timed: bool = True
    """Counted only, if not."""


def compare(ways: Sequence[Way], rounds: int) -> list[dict[str, Any]]:
    """A row for each way, ready for JSON.

    ``of_plain`` are ratios to the way ``beside``; that of ``cpu``, CPU seconds of all threads, is [lower quartile,
    median, upper quartile] of a ratio in each of ``rounds`` rounds, of which every one begins with another way.
    """
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    timed = [way for way in ways if way.timed]
    for turn in range(rounds):
        first = turn % len(timed)
        for way in (*timed[first:], *timed[:first]):
            began = time.process_time()
            way.answer()
            seconds[way.name].append(time.process_time() - began)
    rows = {way.name: counted(way) for way in ways}
    for row in rows.values():
        plain, own = rows[row["beside"]], seconds[row["name"]]
        row["of_plain"] = {key: row[key] / plain[key] for key in ("kernels", "flops", "peak_bytes", "cache_bytes")}
        if own:
            row["cpu_seconds"] = statistics.median(own)
            pairs = zip(own, seconds[row["beside"]], strict=True)
            row["of_plain"]["cpu"] = quartiles([ours / other for ours, other in pairs])
    return list(rows.values())


def counted(way: Way) -> dict[str, Any]:
    """What a call is made of, which is not the first."""
    caches: list[Any] = []
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as flops, instrument("counting").Counting() as counts:
        peak = instrument("memory").peak_bytes(lambda: caches.append(way.answer()), torch.device("cpu"))
    return {
        "name": way.name,
        "beside": way.beside,
        "kernels": counts.kernels,
        "stops": counts.waits,
        "flops": flops.get_total_flops(),
        "cache_bytes": cache_bytes(caches[0]),
        "peak_bytes": peak,
    }


def cache_bytes(cache: Any) -> int:
    """Of all keys and values, in layers or in tuples."""
    layers = getattr(cache, "layers", None)
    held = cache if layers is None else [(layer.keys, layer.values) for layer in layers]
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(held) if isinstance(leaf, torch.Tensor))


def quartiles(values: Sequence[float]) -> list[float]:
    """[lower, median, upper]."""
    if len(values) < 2:
        return [*values] * 3
    return statistics.quantiles(values, n=4, method="inclusive")
