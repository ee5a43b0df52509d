"""Accuracy of the bundled model with all its vision tokens: ``python -m visiontrim.zoo --scenes 100``."""

from __future__ import annotations

import argparse
import math
from collections import Counter

from visiontrim.zoo import TYPES, answer, held_out, load


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval for a proportion, 95 % by default."""
    p, shrink = right / total, 1 + z * z / total
    centre = (p + z * z / (2 * total)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / total + (z / (2 * total)) ** 2)
    return centre - half, centre + half


def main() -> None:
    """Print a Markdown table: one row per question type, then all questions."""
    parser = argparse.ArgumentParser(prog="python -m visiontrim.zoo", description=__doc__)
    parser.add_argument("--scenes", type=int, default=100, help="number of held-out scenes, 7 questions each")
    num_scenes = parser.parse_args().scenes

    bundle = load()
    samples = list(held_out(num_scenes))
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for sample, given in zip(samples, answer(bundle.model, bundle.processor, samples), strict=True):
        for row in (sample.type, "all"):
            right[row] += given == sample.answer
            total[row] += 1
    print("| type | questions | right | accuracy | 95 % interval |\n|---|---|---|---|---|")
    for row in (*TYPES, "all"):
        if total[row]:
            low, high = wilson(right[row], total[row])
            share = right[row] / total[row]
            print(f"| {row} | {total[row]} | {right[row]} | {share:.1%} | {low:.1%} to {high:.1%} |")


if __name__ == "__main__":
    main()
