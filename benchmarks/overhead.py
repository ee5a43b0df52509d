"""What a run costs and saves on the bundled model: ``python benchmarks/overhead.py``.

Plain and compressed calls take turns, so that both see the same machine; every figure is the median of ``REPEATS``. The
question is read once before: how long that takes is printed by itself.
"""

from __future__ import annotations

import statistics
import time

import torch

import visiontrim as vt
from visiontrim import zoo
from visiontrim.measure import Clock

REPEATS = 15
METHODS = [
    "none",
    "random:keep=64",
    "visiontrim:keep=64,guidance=none",
    "visiontrim:keep=64",
    "visiontrim:keep=64,fusion=inverse_variance",
    "visiontrim:keep=64,stages=both",
]
PARTS = ("vision", "method", "prefill", "decode", "total")


def timed(model, inputs, clock: Clock, run: vt.Run) -> dict[str, float]:
    """Seconds by part of one generate() of four tokens."""
    before = dict(clock.seconds)
    with torch.inference_mode(), clock, run:
        model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    return {part: clock.seconds[part] - before[part] for part in PARTS}


def main() -> None:
    model, processor, text_tower = zoo.load()
    for batch in (1, 8):
        samples = list(zoo.held_out(batch, per_scene=1))
        prompts = [zoo.PROMPT.format(question=sample.question) for sample in samples]
        images = [sample.image for sample in samples]
        inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
        questions = [sample.question for sample in samples]
        clocks = {method: Clock(model) for method in METHODS}
        opened = {
            method: vt.trim(model, method, question=questions, text_tower=text_tower, clock=clocks[method])
            for method in METHODS
        }
        runs: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
        reading: list[float] = []
        for _ in range(REPEATS + 2):
            for method in METHODS:
                runs[method].append(timed(model, inputs, clocks[method], opened[method]))
            start = time.perf_counter()
            text_tower.encode(questions)
            reading.append(time.perf_counter() - start)
        median = {m: {p: statistics.median(run[p] for run in runs[m][2:]) for p in PARTS} for m in METHODS}
        plain = median["none"]
        whole = plain["vision"] + plain["prefill"]
        print(
            f"batch {batch}, {torch.get_num_threads()} threads. Ratios to plain; the method's time in % of the plain "
            f"model's vision + prefill. Reading the questions: {statistics.median(reading[2:]) / whole:.1%}"
        )
        for method in METHODS:
            ratios = "  ".join(f"{p} {median[method][p] / plain[p]:5.2f}" for p in PARTS if p != "method")
            print(f"  {method:43} {ratios}  method {median[method]['method'] / whole:6.1%}")


if __name__ == "__main__":
    main()
