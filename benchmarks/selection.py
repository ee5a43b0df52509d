"""What one selection of every method costs, and how that grows with the picture or the video.

    python benchmarks/selection.py                      # every method; JSON lines, then a table
    python benchmarks/selection.py --method mmtok --tokens 576 2304 --repeats 3

One selection of the first step that removes something, on random signals: 64 tokens are kept (after encoder layers: as
many as the first of them leaves), features have width 1,024, what is in the language model's space 4,096. A video has
frames of 196 tokens. Columns:

- operations that PyTorch is asked for, views included: on a fast card each is about 3 to 5 microseconds;
- stops: reads of the device by the host;
- elements that operations return, in all, and bytes of the largest of these tensors;
- CPU milliseconds on one thread, left out beyond ``--limit`` seconds;
- growth: the exponent of elements and of time from the first to the last size, 1 is linear.

All but the times are the same on any machine.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import visiontrim as vt
from visiontrim.core.method import EncoderLayer, Layers
from visiontrim.core.signals import DecoderSignals, EncoderSignals, Sides, Signal, TextSignals
from visiontrim.methods.base import EncoderStep
from visiontrim.methods.cascade import Cascade
from visiontrim.methods.matching import Matching

KEEP, WORDS, WIDTH, LANGUAGE, HEADS, FRAME = 64, 24, 1024, 4096, 16, 196
STOPS = {"_local_scalar_dense", "nonzero", "is_nonzero", "unique2", "_unique2", "masked_select"}
VIDEO = {"aot", "dycoke", "evs", "fastvid", "flashvid", "holitom", "st-gridpool", "v-cast", "vidcom2"}


class Counted(TorchDispatchMode):
    """Counts what the operations inside are and return."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.stops = self.elements = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        name = func.overloadpacket.__name__
        moved = name == "_to_copy" and (kwargs or {}).get("device") is not None
        self.stops += name in STOPS or moved
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor) and not func.is_view:
                self.elements += value.numel()
                self.largest = max(self.largest, value.untyped_storage().nbytes())
        return result


def grid_of(name: str, tokens: int) -> tuple[int, int, int]:
    if name in VIDEO:
        return max(1, round(tokens / FRAME)), 14, 14
    side = math.isqrt(tokens)
    return 1, side, side


def signal(need: Signal, tokens: int, grid: tuple[int, int, int], inside: bool) -> Any:
    """A random value of one signal."""
    name = need[0] if isinstance(need, tuple) else need
    mask = torch.ones(1, WORDS, dtype=torch.bool)
    heads = (1, 32, tokens, 128), (1, 32, WORDS, 128)
    match name.split(".")[1]:
        case "projected":
            return torch.randn(1, tokens, LANGUAGE)
        case "keys" | "queries" if name.startswith("encoder"):
            return torch.randn(1, HEADS, tokens, WIDTH // HEADS)
        case "cls_query":
            return torch.randn(1, HEADS, 1, WIDTH // HEADS)
        case "pixels" | "colours":
            return torch.randn(1, tokens, 3, 1024)
        case "keys" | "queries":
            return Sides(torch.randn(heads[0]), torch.randn(heads[1]))
        case "normed" | "embeddings":
            return Sides(torch.randn(1, tokens, LANGUAGE), torch.randn(1, WORDS, LANGUAGE))
        case "rotary":
            return Sides(torch.randn(1, tokens, 256), torch.randn(1, WORDS, 256))
        case "text_attention":
            return torch.rand(1, 32, WORDS, tokens) / tokens
        case "previous" | "next_normed":
            return torch.randn(1, tokens, LANGUAGE)
        case "mean_rotary":
            return torch.rand(1, tokens, 2)
        case "query":
            return torch.randn(1, LANGUAGE)
        case "values":
            return Sides(torch.randn(heads[0]), torch.randn(heads[1]))
        case "question":
            width = LANGUAGE if inside else 768
            return vt.Text(torch.randn(1, WORDS, width), mask, 100.0, torch.arange(WORDS)[None] == WORDS - 1)
        case "words":
            return vt.Text(torch.randn(1, WORDS, LANGUAGE), mask, 100.0)
        case "joint" | "joint_normalised" | "joint_last":
            return torch.randn(1, tokens, 768)
        case _:  # an attention
            return torch.rand(1, tokens).softmax(-1)


def view_of(name: str, step: vt.Step, tokens: int) -> vt.View:
    """What a step sees."""
    grid = grid_of(name, tokens)
    tokens = math.prod(grid)
    inside = str(step.site).startswith("layer")
    values: dict[Signal, Any] = {need: signal(need, tokens, grid, inside) for need in step.needs}
    if isinstance(step.site, EncoderLayer):
        values |= {"encoder.mass": torch.ones(1, tokens), "encoder.lattice": grid, "encoder.unit": 1}
    groups = {of.group: of({key: values[of.spelled(key)] for key in of.among(values)}) for of in GROUPS}
    return vt.View(
        features=torch.randn(1, tokens, LANGUAGE if inside else WIDTH),
        coordinates=torch.cartesian_prod(*map(torch.arange, grid))[None],
        grid=grid,
        entered=tokens,
        num_layers=32,
        **groups,
    )


GROUPS = (EncoderSignals, DecoderSignals, TextSignals)


def selection(name: str, tokens: int) -> Callable[[], Any] | None:
    """One selection by the method's first step that removes something; None: there is none at this size."""
    method = vt.load_method(name)
    layers = Layers(encoder=24, decoder=32)
    for step in method.steps_for(layers):
        view = view_of(name, step, tokens)
        if isinstance(step, EncoderStep):
            return lambda step=step, view=view: step.choose(view, KEEP)
        owner = getattr(step, "method", None)
        if isinstance(owner, Cascade) and str(step.site).startswith("layer"):
            return lambda owner=owner, view=view: owner.choose(view, KEEP)
        if isinstance(owner, Matching):
            count = owner.count(view, 1, len(method.steps_for(layers)))
            return lambda owner=owner, view=view, count=count: owner.merged(view, count)
        if step.select(view).index.shape[1] < view.total:
            return lambda step=step, view=view: step.select(view)
    return None


def measured(name: str, tokens: int, repeats: int, limit: float) -> dict[str, Any] | None:
    chosen = selection(name, tokens)
    if chosen is None:
        return None
    start = time.process_time()
    with Counted() as counted:
        chosen()
    first = time.process_time() - start
    seconds = []
    while len(seconds) < repeats and first < limit:
        start = time.process_time()
        chosen()
        seconds.append(time.process_time() - start)
    return {
        "method": name,
        "tokens": math.prod(grid_of(name, tokens)),
        "operations": counted.operations,
        "stops": counted.stops,
        "elements": counted.elements,
        "largest_mb": round(counted.largest / 1e6, 2),
        "ms": round(1e3 * (min(seconds) if seconds else first), 2),
    }


def exponent(rows: list[dict[str, Any]], what: str) -> str:
    first, last = rows[0], rows[-1]
    if len(rows) < 2 or not first[what]:
        return "-"
    return f"{math.log(last[what] / first[what]) / math.log(last['tokens'] / first['tokens']):.2f}"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row for each method, sizes in order."""
    lines = [
        "| method | tokens | operations | stops | largest tensor, MB | ms | growth of elements | of time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        columns = [
            " / ".join(f"{row[what]:,}" for row in own)
            for what in ("tokens", "operations", "stops", "largest_mb", "ms")
        ]
        lines.append(f"| {name} | {' | '.join(columns)} | {exponent(own, 'elements')} | {exponent(own, 'ms')} |")
    return "\n".join(lines)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", help="names, with options if wanted; all unless given")
    parser.add_argument("--tokens", type=int, nargs="+", default=[576, 2304, 9216, 16384])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=2.0, help="seconds from which on a selection is timed once")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = []
    for name in options.method or sorted(vt.list_methods()):
        for tokens in options.tokens:
            row = measured(name, tokens, options.repeats, options.limit)
            if row is None:
                break
            rows.append(row)
            print(json.dumps(row), flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
