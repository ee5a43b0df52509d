"""The bundled suite for lmms-eval: run it to write shapes.jsonl; lmms-eval draws the pictures from the seeds."""

from __future__ import annotations

import json
from pathlib import Path

from visiontrim import zoo


def picture(doc: dict) -> list:
    return [zoo.draw_scene(doc["seed"]).image]


def question(doc: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    return doc["question"]


def score(doc: dict, results: list[str]) -> dict[str, float]:
    return {"right": float(results[0] == doc["answer"])}


if __name__ == "__main__":
    with Path("shapes.jsonl").open("w") as file:
        for sample in zoo.SPLITS["standard"].samples(20):
            row = {"seed": sample.scene_seed, "question": sample.question, "answer": sample.answer, "type": sample.type}
            file.write(json.dumps(row) + "\n")
