"""Cost of the selection in VisionTrim's vision stage, at the size of LLaVA-1.5: 576 patches of width 1024.

The local score (eq. 4) is timed beside a double loop over tokens and neighbours in plain Python, the way the formula
reads. Run as ``python benchmarks/ltam.py``.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable

import torch

from visiontrim import EncoderSignals, Text, TextSignals, View, VisionTrim
from visiontrim.ops.affinity import local_affinity

SIDE, DIM, JOINT, WORDS = 24, 1024, 768, 24


def double_loop(features: torch.Tensor, window: int = 3, w3: float = 0.5) -> torch.Tensor:
    """Eq. 4 token by token, neighbour by neighbour, over an image of SIDE x SIDE tokens."""
    radius = window // 2
    pairs = {}
    for token in range(SIDE * SIDE):
        row, column = divmod(token, SIDE)
        for r in range(max(0, row - radius), min(SIDE, row + radius + 1)):
            for c in range(max(0, column - radius), min(SIDE, column + radius + 1)):
                if (r, c) != (row, column):
                    distance = (features[token] - features[r * SIDE + c]).norm().item()
                    pairs[token, r * SIDE + c] = distance, math.hypot(row - r, column - c)
    sigma_f, sigma_p = (statistics.pstdev(norms) for norms in zip(*pairs.values(), strict=True))
    kernels: list[list[float]] = [[] for _ in range(SIDE * SIDE)]
    for (token, _), (feature, position) in pairs.items():
        kernels[token].append(-((feature / sigma_f) ** 2) - w3 * (position / sigma_p) ** 2)
    return torch.tensor([statistics.fmean(kernel) for kernel in kernels])


def median_ms(function: Callable[[], object], repeats: int) -> float:
    """Median wall time of ``repeats`` calls after one that warms up, in milliseconds."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def main() -> None:
    torch.manual_seed(0)
    grid = (1, SIDE, SIDE)
    features = torch.randn(1, SIDE * SIDE, DIM)
    coordinates = torch.cartesian_prod(*map(torch.arange, grid))[None]
    view = View(
        features=features,
        coordinates=coordinates,
        grid=grid,
        entered=SIDE * SIDE,
        num_layers=32,
        encoder=EncoderSignals(cls_attention=torch.randn(1, SIDE * SIDE).softmax(-1)),
        text=TextSignals(
            joint=torch.randn(1, SIDE * SIDE, JOINT),
            question=Text(torch.randn(1, WORDS, JOINT), torch.ones(1, WORDS, dtype=torch.bool), 100.0),
        ),
    )

    def local() -> torch.Tensor:
        return local_affinity(features, coordinates, grid)

    torch.testing.assert_close(local()[0], double_loop(features[0]), rtol=1e-3, atol=1e-3)
    loop, ours = median_ms(lambda: double_loop(features[0]), 5), median_ms(local, 50)
    print(f"{SIDE * SIDE} tokens of width {DIM}, float32, CPU, {torch.get_num_threads()} threads; medians")
    print(f"  local score, double loop      {loop:9.2f} ms")
    print(f"  local score, vectorised       {ours:9.2f} ms   {loop / ours:.0f} times faster")
    for keep in (32, 64, 192):
        guided = VisionTrim(keep=keep, stages="vision")
        alone = dataclasses.replace(guided, guidance="none")
        for method, what in ((alone, "dominant only"), (guided, "with complement")):
            (step,) = method.steps()
            cost = median_ms(lambda step=step: step.select(view), 50)
            print(f"  select {keep:3d}, {what:16s}   {cost:9.2f} ms")


if __name__ == "__main__":
    main()
