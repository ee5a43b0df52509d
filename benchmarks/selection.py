"""What one selection of every method costs, how that grows with the picture or the video, and when it pays.

    python benchmarks/selection.py                      # every method; JSON lines, then a table
    python benchmarks/selection.py --method mmtok --tokens 576 2304 --repeats 3
    python benchmarks/selection.py --out benchmarks/results/selection.jsonl    # what is stored there is not run again

One selection of the first step that removes something, on random signals: 64 tokens are kept (after encoder layers: as
many as the first of them leaves), features have width 1,024, what is in the language model's space 4,096. A video has
frames of 196 tokens. Columns:

- operations that PyTorch is asked for, views included;
- stops: reads of the device by the host;
- bytes of the largest tensor that an operation returns;
- CPU milliseconds on one thread, "-" where they are likely to be more than ``--most`` seconds;
- growth: exponents, from the first to the last size, of the bytes that operations read and write and of FLOPs (matrix
  products, and eigenvectors as 20 n^3); 1 is linear, "-" is none at all;
- pays from: **an estimate**, not a measurement, of the smallest decoder, in billions of parameters that a token passes
  through, for which a method saves more time than it takes on a fast card, at each size. An operation that is no view
  takes LAUNCH, a stop STOP, bytes and FLOPs go at BANDWIDTH and FLOAT32, and all of a method's steps count as if none
  had removed anything before; saved are 2 FLOPs a parameter and token that is gone, at BFLOAT16, in the layers after
  the first step that removes any. Saved attention, cache and decoding are not counted, nor what the engine takes to
  give a method its signals, nor that a small decoder is bound by launches itself.

Operations, stops and bytes are those of an accelerator, where nothing asks the device that need not; milliseconds those
of a CPU, which may ask. `none` selects nothing and has no row.

All but the times are the same on any machine.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import visiontrim as vt
from visiontrim.core.method import DecoderLayer, EncoderLayer, Layers, Site
from visiontrim.core.signals import DecoderSignals, EncoderSignals, Sides, Signal, TextSignals
from visiontrim.methods.base import EncoderStep
from visiontrim.methods.cascade import Cascade
from visiontrim.methods.matching import Matching
from visiontrim.methods.twostage import TwoStage
from visiontrim.ops import host

KEEP, WORDS, WIDTH, LANGUAGE, HEADS, FRAME = 64, 24, 1024, 4096, 16, 196
LAUNCH, STOP, BANDWIDTH, FLOAT32, BFLOAT16 = 4e-6, 30e-6, 3e12, 40e12, 400e12
"""Seconds, bytes a second and FLOPs a second assumed of a card of the H100 class."""
STOPS = {"_local_scalar_dense", "nonzero", "is_nonzero", "unique2", "_unique2", "masked_select"}
PICKS = {"index_select", "gather", "index"}
"""Operations that read of what they are given as much as they return."""
PUTS = {"index_put_", "_index_put_impl_", "scatter_", "scatter_add_", "index_add_", "index_copy_", "index_fill_"}
"""Those that leave most of their first argument alone."""
WRITES = {"copy_", "fill_", "zero_"}
"""Those that write what they return and do not read it."""
VIDEO = {"aot", "dycoke", "evs", "fastvid", "flashvid", "holitom", "st-gridpool", "v-cast", "vidcom2"}


class Counted(TorchDispatchMode):
    """Counts what the operations inside are, read and return."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.launches = self.stops = self.bytes = self.flops = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.operations += 1
        name = func.overloadpacket.__name__
        moved = name == "_to_copy" and kwargs.get("device") is not None
        self.stops += name in STOPS or moved
        if func.is_view:
            return result
        self.launches += 1
        given, written = (sum(map(size_of, tensors(of))) for of in ((args, kwargs), result))
        if name in PICKS:
            self.bytes += 2 * written
        elif name in PUTS:
            self.bytes += 2 * (given - size_of(args[0]))
        else:
            self.bytes += given + (0 if name in WRITES else written)
        self.largest = max([self.largest, *map(size_of, tensors(result))])
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
        elif name == "_linalg_eigh":
            self.flops += 20 * args[0].shape[-1] * args[0].numel()
        return result

    @property
    def seconds(self) -> float:
        """What this takes on the card that is assumed."""
        fixed = self.launches * LAUNCH + self.stops * STOP
        return fixed + self.bytes / BANDWIDTH + self.flops / FLOAT32


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def size_of(tensor: torch.Tensor) -> int:
    """Bytes, of what is expanded only those that there are."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


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
            # three of four are like their neighbour on the left
            return torch.randn(1, -(-tokens // 4), 3, 1024).repeat_interleave(4, 1)[:, :tokens]
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
        entered=KEEP if isinstance(step.site, DecoderLayer) else tokens,  # what an earlier step would leave
        num_layers=32,
        **groups,
    )


LAYERS = Layers(encoder=24, decoder=32)
GROUPS = (EncoderSignals, DecoderSignals, TextSignals)


class Selection(NamedTuple):
    """One selection by a step."""

    run: Callable[[], Any]
    site: Site
    left: int | None
    """Tokens that are left once all of the method's steps are done; None: as many as this one leaves."""


def selections(name: str, tokens: int) -> list[tuple[int, Selection]]:
    """The first selection of each kind of step, with how many steps are of that kind."""
    method = vt.load_method(name)
    steps = method.steps_for(LAYERS)
    kinds = Counter((type(step), type(step.site)) for step in steps)
    found: list[tuple[int, Selection]] = []
    for kind, number in kinds.items():
        step = next(step for step in steps if (type(step), type(step.site)) == kind)
        view, owner = view_of(name, step, tokens), getattr(step, "method", None)
        if isinstance(step, EncoderStep):
            chosen = Selection(partial(step.choose, view, KEEP), step.site, None)
        elif isinstance(owner, Cascade) and isinstance(step.site, DecoderLayer):
            chosen = Selection(partial(owner.choose, view, KEEP), step.site, KEEP)
        elif isinstance(owner, TwoStage) and isinstance(step.site, DecoderLayer):
            chosen = Selection(partial(owner.prune, view, KEEP), step.site, KEEP)
        elif isinstance(owner, Matching):
            chosen = Selection(partial(owner.merged, view, owner.count(view, 1, len(steps))), step.site, KEEP)
        else:
            chosen = Selection(partial(step.select, view), step.site, None)
        found.append((number, chosen))
    return found


NO_VALUES = RuntimeError, NotImplementedError
"""How PyTorch says that there are no values on the "meta" device."""


class Counts(NamedTuple):
    """What a method's steps take, and what the first of them that removes something does."""

    first: Counted
    chosen: Selection
    left: int
    seconds: float
    """On the card that is assumed, for all steps."""
    spent: float | None
    """CPU time, unless on the CPU the selection would go another way."""


def counts(name: str, tokens: int, device: str) -> Counts | None:
    """On the "meta" device nothing is computed, so that a step that asks what was found raises."""
    tokens, found, takes = math.prod(grid_of(name, tokens)), None, 0.0
    with torch.device(device), mock.patch.object(host, "asks_freely", return_value=False) as asked:
        for number, chosen in selections(name, tokens):
            start = time.process_time()
            with Counted() as counted:
                answer = chosen.run()
            spent = time.process_time() - start
            takes += number * counted.seconds
            index = getattr(answer, "index", answer)
            if found is None and index.shape[1] < tokens:
                found = Counts(counted, chosen, index.shape[1], 0.0, None if asked.called else spent)
    return found and found._replace(seconds=takes)


@functools.cache
def needs_values(name: str) -> bool:
    """Whether a method cannot be counted without values, or not alike."""
    small, totals = 4 * FRAME if name in VIDEO else 576, []
    for device in ("cpu", "meta"):
        try:
            found = counts(name, small, device)
        except NO_VALUES:
            return True
        totals.append(found and (found.left, found.seconds, found.first.operations, found.first.bytes))
    return totals[0] != totals[1]


def measured(name: str, tokens: int, repeats: int, limit: float, *, timed: bool = True) -> dict[str, Any] | None:
    """``timed``: the selection is run, not only counted, if it can be counted without."""
    timed, found = timed or needs_values(name), None
    if not timed:
        try:
            found = counts(name, tokens, "meta")
        except NO_VALUES:  # a larger picture may be asked what a smaller one is not
            timed = True
    if timed:
        found = counts(name, tokens, "cpu")
    if found is None:
        return None
    tokens, chosen, counted = math.prod(grid_of(name, tokens)), found.chosen, found.first
    seconds = [found.spent] if found.spent is not None and found.spent >= limit else []
    while timed and (not seconds or (len(seconds) < repeats and seconds[0] < limit)):
        start = time.process_time()
        chosen.run()
        seconds.append(time.process_time() - start)
    share = 1 - chosen.site.index / LAYERS.decoder if isinstance(chosen.site, DecoderLayer) else 1.0
    gone = (tokens - (found.left if chosen.left is None else chosen.left)) * share
    return {
        "method": name,
        "tokens": tokens,
        "operations": counted.operations,
        "stops": counted.stops,
        "bytes": counted.bytes,
        "flops": counted.flops,
        "largest_mb": round(counted.largest / 1e6, 2),
        "ms": round(1e3 * min(seconds), 2) if timed else None,
        "pays_from": float(f"{found.seconds * BFLOAT16 / (2 * gone) / 1e9:.2g}"),
    }


def quick(rows: list[dict[str, Any]], name: str, tokens: int, most: float) -> bool:
    """Whether a selection is likely to be done in ``most`` seconds, as work grows with the square at worst."""
    last = max((row for row in rows if row["method"] == name), key=lambda row: row["tokens"], default=None)
    if last is None:
        return True
    return last["ms"] is not None and last["ms"] / 1e3 * (tokens / last["tokens"]) ** 2 < most


COLUMNS = "tokens", "operations", "stops", "largest_mb", "ms"


def exponent(rows: list[dict[str, Any]], what: str) -> float:
    """Of the growth from the first to the last size; 0 where there is nothing."""
    first, last = rows[0], rows[-1]
    if len(rows) < 2 or not first[what] or not last[what]:
        return 0.0
    return math.log(last[what] / first[what]) / math.log(last["tokens"] / first["tokens"])


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row for each method, sizes in order."""
    lines = [
        "| method | tokens | operations | stops | largest tensor, MB | ms | growth: bytes, FLOPs | pays from, B |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        columns = [alike(["-" if row[what] is None else f"{row[what]:,}" for row in own]) for what in COLUMNS]
        growth = [f"{exponent(own, what):.2f}" if any(row[what] for row in own) else "-" for what in ("bytes", "flops")]
        pays = alike([f"{row['pays_from']:g}" for row in own])
        lines.append(f"| {name} | {' | '.join([*columns, ', '.join(growth), pays])} |")
    return "\n".join(lines)


def alike(values: list[str]) -> str:
    return values[0] if len(set(values)) == 1 else " / ".join(values)


@torch.no_grad()  # unlike in inference mode, composite operations are seen as what they consist of
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", help="names, with options if wanted; all unless given")
    parser.add_argument("--tokens", type=int, nargs="+", default=[576, 2304, 9216, 16384], help="of a picture")
    parser.add_argument("--frames", type=int, nargs="+", default=[4, 16, 64, 128], help="of a video")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=1.0, help="seconds from which on a selection is run once")
    parser.add_argument("--most", type=float, default=10.0, help="seconds up to which a selection is timed")
    parser.add_argument("--out", type=Path, help="where rows are stored; those that are there are not measured again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = stored(options.out) if options.out and options.out.exists() else []
    names = options.method or sorted(set(vt.list_methods()) - {"none"})
    for number in range(max(len(options.tokens), len(options.frames))):  # the small ones of all methods first
        for name in names:
            sizes = [FRAME * frames for frames in options.frames] if name in VIDEO else options.tokens
            if number >= len(sizes) or any((row["method"], row["tokens"]) == (name, sizes[number]) for row in rows):
                continue
            torch.manual_seed(0)
            timed = quick(rows, name, sizes[number], options.most)
            row = measured(name, sizes[number], options.repeats, options.limit, timed=timed)
            if row is None:
                continue
            rows.append(row)
            print(json.dumps(row), flush=True)
            if options.out:
                rows.sort(key=lambda row: (row["method"], row["tokens"]))
                options.out.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    print(table(rows))


def stored(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main()
