"""Train a model that ships, stage by stage: ``python -m visiontrim.zoo.training decoder --out DIR --minutes 20``.

The same command again goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path

import torch

from visiontrim.zoo.training.decoder import DecoderShape
from visiontrim.zoo.training.evaluate import accuracy_by_depth, as_markdown
from visiontrim.zoo.training.scaffold import Placement
from visiontrim.zoo.training.stages import DecoderStage, Run, train


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m visiontrim.zoo.training", description=__doc__)
    stages = parser.add_subparsers(dest="stage", required=True)
    decoder = stages.add_parser("decoder", help="the decoder on symbolic tokens, then its accuracy by depth")
    decoder.add_argument("--out", type=Path, required=True, help="directory of checkpoint, log and settings")
    decoder.add_argument("--minutes", type=float, default=math.inf, help="stop at the first checkpoint after this")
    decoder.add_argument("--threads", type=int, default=1)
    decoder.add_argument("--eval-scenes", type=int, default=300, help="held-out scenes, one question of each type")
    defaults = DecoderStage()
    decoder.add_argument("--steps", type=int, default=defaults.steps, help="steps of the whole schedule")
    decoder.add_argument("--scenes", type=int, default=defaults.scenes, help="scenes a step")
    decoder.add_argument("--seed", type=int, default=defaults.seed)
    decoder.add_argument("--layers", type=int, default=defaults.shape.layers)
    decoder.add_argument("--mlp", type=int, default=defaults.shape.mlp)
    decoder.add_argument(
        "--scaffold",
        default=",".join(map(str, dataclasses.astuple(defaults.placement))),
        help="layers that bind, find, count and answer",
    )
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    stage = dataclasses.replace(
        defaults,
        shape=DecoderShape(layers=options.layers, mlp=options.mlp),
        placement=Placement(*map(int, options.scaffold.split(","))),
        steps=options.steps,
        scenes=options.scenes,
        seed=options.seed,
    )
    for line in train(stage, options.out, options.minutes):
        accuracy = " ".join(f"{type} {share:.1%}" for type, share in line["accuracy"].items())
        print(f"step {line['step']}, loss {line['loss']:.3f}, scaffold {line['scaffold']:.3f}: {accuracy}", flush=True)
    run = Run(stage)
    run.restore(options.out / "checkpoint.pt")
    print(as_markdown(*accuracy_by_depth(run.model, options.eval_scenes, stage.vision_tokens)))


if __name__ == "__main__":
    main()
