"""Which of VisionTrim's open choices answer best on the bundled model: the table in docs/results/defaults.md.

    python benchmarks/defaults.py --scenes 100      # adds what is missing to docs/results/defaults.jsonl
    python benchmarks/defaults.py --table           # writes docs/results/defaults.md from it

Every setting answers the same held-out questions. Differences are paired with the first setting of their block, their
95 % intervals from a bootstrap over scenes.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import visiontrim as vt
from visiontrim import zoo

RESULTS = Path(__file__).parent.parent / "docs" / "results"
LOG, TABLE = RESULTS / "defaults.jsonl", RESULTS / "defaults.md"

RULES = ["inverse_variance", "variance", "standardised", "cls", "local", "max", "geometric", "mean", "harmonic"]
SPACES = ["features", "last"]
DVTS = "visiontrim:guidance=none,fusion="
LITERAL = "visiontrim:fusion=inverse_variance,split=0.75,merge=add,patch_space=features,iterations=3"
FULL = "visiontrim:fusion=cls,split=0.75,"
BEST = FULL + "merge=mean,patch_space=features,iterations=1"
BLOCKS: dict[str, tuple[list[str], list[int]]] = {
    "Overview": (
        ["random", "uniform", DVTS + "inverse_variance", DVTS + "cls", LITERAL, BEST, "visiontrim:variant=release"],
        [64, 32, 16],
    ),
    "Which score selects (DVTS alone)": (["random", *(DVTS + rule for rule in RULES)], [32]),
    "What the question adds (TGVC), and how centres take up their cluster": (
        [
            DVTS + "cls",
            *(
                FULL + f"merge={m},patch_space={space},iterations=3"
                for m in ("add", "mean", "uniform")
                for space in SPACES
            ),
            *(FULL + f"merge={m},patch_space=last,iterations=1" for m in ("add", "mean", "uniform")),
            BEST,
            FULL + "merge=mean,patch_space=last,iterations=0",
            FULL + "merge=mean,patch_space=last,iterations=3,sign=-1",
            FULL + "merge=mean,patch_space=last,iterations=3,similarity=dot",
        ],
        [32],
    ),
    "Share of dominant tokens": (
        [DVTS + "cls", *(BEST.replace("0.75", str(split)) for split in (0.25, 0.5, 0.75, 0.875))],
        [32, 16],
    ),
    "The local score alone: sigma, window, weight of the position": (
        [DVTS + "local" + options for options in ("", ",sigma=entries", ",window=5", ",w3=0", ",w3=2")],
        [32],
    ),
}
"""Every option that matters is written out, so that the log stays true when defaults change.

Methods and budgets of each table; the first method is what the others are compared with."""


def settings() -> Iterator[tuple[str, int]]:
    """Every (method, keep) of the blocks, once; 32 tokens, where methods separate best, come first."""
    yield "none", 0
    every = {pair: None for methods, keeps in BLOCKS.values() for pair in itertools.product(methods, keeps)}
    yield from sorted(every, key=lambda pair: (pair[1] != 32, -pair[1]))


def right_answers(bundle: zoo.Bundle, samples: list[zoo.Sample], method: str, keep: int) -> list[int]:
    """1 or 0 for every sample. Rows of a batch are the questions about one scene."""
    right = []
    for _, group in itertools.groupby(samples, key=lambda sample: sample.scene_seed):
        batch = list(group)
        options = {"keep": keep} if keep else {}
        questions = [sample.question for sample in batch]
        with vt.trim(bundle.model, method, question=questions, text_tower=bundle.text_tower, **options):
            answers = zoo.answer(bundle.model, bundle.processor, batch)
        right += [int(answer == sample.answer) for answer, sample in zip(answers, batch, strict=True)]
    return right


def measure(scenes: int) -> None:
    """Append every setting that is not in the log yet."""
    bundle, samples = zoo.load(), list(zoo.held_out(scenes))
    done = {(row["method"], row["keep"], row["scenes"]) for row in read()}
    for method, keep in settings():
        if (method, keep, scenes) not in done:
            right = right_answers(bundle, samples, method, keep)
            row = {"method": method, "keep": keep, "scenes": scenes, "right": right}
            with LOG.open("a") as log:
                log.write(json.dumps(row) + "\n")
            print(f"{np.mean(right):6.1%}  {method} keep={keep}", flush=True)


def read() -> list[dict]:
    return [json.loads(line) for line in LOG.read_text().splitlines()] if LOG.exists() else []


def difference(ours: list[int], reference: list[int], scene: np.ndarray) -> tuple[float, float, float]:
    """Mean difference in points, and its 95 % interval by a bootstrap over scenes (2,000 draws, seed 0)."""
    gain = (np.array(ours) - np.array(reference)) * 100.0
    sums, counts = np.bincount(scene, gain), np.bincount(scene)
    draws = np.random.default_rng(0).integers(0, len(sums), (2000, len(sums)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    return gain.mean(), *np.percentile(means, [2.5, 97.5])


def table() -> None:
    """Write the Markdown table."""
    rows = read()
    scenes = max(row["scenes"] for row in rows)
    right = {(row["method"], row["keep"]): row["right"] for row in rows if row["scenes"] == scenes}
    samples = list(zoo.held_out(scenes))
    scene = np.array([sample.scene_seed - zoo.HELD_OUT for sample in samples])
    plain = right["none", 0]
    lines = [
        "# Which of VisionTrim's open choices answer best",
        "",
        f"`python benchmarks/defaults.py --scenes {scenes}`, then `--table`. Accuracy of the bundled model in % on "
        f"{len(samples)} held-out questions about {scenes} scenes (seeds from {zoo.HELD_OUT}), vision stage alone, one "
        f"seed for `random`. The plain model with all 576 tokens: **{np.mean(plain):.1%}**. In brackets the difference "
        "to the first row of the block in points, paired, with its 95 % interval (bootstrap over scenes).",
    ]
    for title, (methods, keeps) in BLOCKS.items():
        lines += ["", f"## {title}", "", "| method | " + " | ".join(f"{keep} tokens" for keep in keeps) + " |"]
        lines += ["|---" * (len(keeps) + 1) + "|"]
        for method in methods:
            cells = []
            for keep in keeps:
                ours = right[method, keep]
                cell = f"{100 * np.mean(ours):.1f}"
                if method != methods[0]:
                    gain, low, high = difference(ours, right[methods[0], keep], scene)
                    cell += f" ({gain:+.1f}; {low:+.1f} to {high:+.1f})"
                cells.append(cell)
            lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    TABLE.write_text("\n".join(lines) + "\n")
    print(TABLE)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=100, help="held-out scenes, up to 7 questions each")
    parser.add_argument("--table", action="store_true", help="write the table from the log and measure nothing")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    table() if given.table else measure(given.scenes)
