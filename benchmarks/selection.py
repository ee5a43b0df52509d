"""How the work of a selection grows with the picture: elements that its operations return, and CPU seconds, per token.

    python benchmarks/selection.py

Elements do not depend on the machine. A method that grows linearly has the same number of them per token at any size.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import visiontrim as vt

WORDS = 24
METHODS = (
    "visiontrim:keep=64,stages=vision",
    "visiontrim:keep=64,variant=lean",
    "visiontrim:keep=64,variant=lean,guidance=none",
    "fastervlm:keep=64",
    "random:keep=64",
)


class Elements(TorchDispatchMode):
    """Counts the elements that operations return, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor) and not func.is_view:
                self.number += value.untyped_storage().nbytes() // value.element_size()
        return result


def view(tokens: int, width: int) -> vt.View:
    """What a step sees of one square picture at the vision encoder's output."""
    side = math.isqrt(tokens)
    grid = (1, side, side)
    return vt.View(
        features=torch.randn(1, side * side, width),
        coordinates=torch.cartesian_prod(*map(torch.arange, grid))[None],
        grid=grid,
        entered=side * side,
        num_layers=28,
        encoder=vt.EncoderSignals(
            cls_attention=torch.rand(1, side * side).softmax(-1), received_attention=torch.rand(1, side * side)
        ),
        text=vt.TextSignals(
            joint=torch.randn(1, side * side, 768),
            question=vt.Text(torch.randn(1, WORDS, 768), torch.ones(1, WORDS, dtype=torch.bool), 100.0),
        ),
    )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[576, 1024, 4096, 16384])
    parser.add_argument("--width", type=int, default=1024, help="of the features")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for name in METHODS:
        (step,) = vt.load_method(name).steps()
        for tokens in options.tokens:
            seen = view(tokens, options.width)
            with Elements() as elements:
                step.select(seen)
            seconds = []
            for _ in range(options.repeats):
                start = time.process_time()
                step.select(seen)
                seconds.append(time.process_time() - start)
            row = {"method": name, "tokens": tokens, "elements_per_token": round(elements.number / tokens)}
            print(
                json.dumps(row | {"cpu_us_per_token": round(1e6 * statistics.median(seconds) / tokens, 2)}), flush=True
            )


if __name__ == "__main__":
    main()
