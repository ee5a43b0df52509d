"""What a run costs and saves on the bundled model: ``python benchmarks/overhead.py``.

Plain and compressed calls take turns, so that both see the same machine; every figure is the median of ``REPEATS``.
"""

from __future__ import annotations

import statistics

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
    "visiontrim:keep=64,stages=both",
]
PARTS = ("vision", "method", "prefill", "decode", "total")


def timed(bundle: zoo.Bundle, inputs, questions: list[str], method: str) -> dict[str, float]:
    """Seconds by part of one generate() of four tokens."""
    with (
        torch.inference_mode(),
        Clock(bundle.model) as clock,
        vt.trim(bundle.model, method, question=questions, text_tower=bundle.text_tower, clock=clock),
    ):
        bundle.model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    return clock.seconds


def main() -> None:
    bundle = zoo.load()
    for batch in (1, 8):
        samples = list(zoo.held_out(batch, per_scene=1))
        inputs = bundle.processor(
            images=[sample.image for sample in samples],
            text=[zoo.PROMPT.format(question=sample.question) for sample in samples],
            padding=True,
            return_tensors="pt",
        )
        questions = [sample.question for sample in samples]
        runs: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
        for repeat in range(REPEATS + 2):
            for method in METHODS:
                seconds = timed(bundle, inputs, questions, method)
                if repeat >= 2:
                    runs[method].append(seconds)
        median = {m: {p: statistics.median(run[p] for run in runs[m]) for p in PARTS} for m in METHODS}
        print(
            f"batch {batch}, {torch.get_num_threads()} threads: ratios to plain; the method's share of vision + prefill"
        )
        for method in METHODS:
            parts, plain = median[method], median["none"]
            ratios = "  ".join(f"{part} {parts[part] / plain[part]:5.2f}" for part in PARTS if part != "method")
            print(f"  {method:36} {ratios}  method {parts['method'] / (parts['vision'] + parts['prefill']):6.1%}")


if __name__ == "__main__":
    main()
