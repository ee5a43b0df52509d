"""Train the small Qwen2.5-VL stage by stage: ``python -m visiontrim.zoo.training.qwen decoder --out DIR``.

The same command again goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path

import torch

from visiontrim.zoo.training.loop import Run, train
from visiontrim.zoo.training.qwen.clips import CALMING, ClipRun, ClipStage
from visiontrim.zoo.training.qwen.decoder import DecoderRun, DecoderStage
from visiontrim.zoo.training.qwen.joint import JointRun, JointStage
from visiontrim.zoo.training.qwen.ship import VIDEO_TEMPLATE, assemble, ship, video_model
from visiontrim.zoo.training.qwen.vision import VisionRun, VisionStage

STAGES = {"decoder": DecoderStage, "vision": VisionStage, "joint": JointStage, "clips": ClipStage, "calming": CALMING}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m visiontrim.zoo.training.qwen", description=__doc__)
    parser.add_argument("stage", choices=[*STAGES, "ship", "ship-video"])
    parser.add_argument("--out", type=Path, required=True, help="directory of checkpoint, log and settings")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop at the first checkpoint after this")
    parser.add_argument("--steps", type=int, help="steps of the whole schedule")
    parser.add_argument("--decoder", type=Path, help="directory of the decoder stage, for joint")
    parser.add_argument("--vision", type=Path, help="directory of the vision stage, for joint and ship")
    parser.add_argument("--joint", type=Path, help="directory of the joint stage, for ship")
    parser.add_argument("--clips", type=Path, help="directory of the clips stage, for calming")
    parser.add_argument("--calming", type=Path, help="directory of the calming stage, for ship-video")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    needed = {
        "joint": ("decoder", "vision"),
        "ship": ("vision", "joint"),
        "calming": ("clips",),
        "ship-video": ("calming",),
    }.get(options.stage, ())
    if missing := [name for name in needed if getattr(options, name) is None]:
        parser.error(f"{options.stage} needs --" + " and --".join(missing))

    torch.set_num_threads(options.threads)
    if options.stage == "ship":
        vision, joint = (directory / "checkpoint.pt" for directory in (options.vision, options.joint))
        ship(assemble(JointStage().shape, vision, joint), options.out)
        return
    if options.stage == "ship-video":
        ship(video_model(ClipRun(CALMING, options.calming / "checkpoint.pt").model), options.out, VIDEO_TEMPLATE)
        return
    stage = STAGES[options.stage]
    stage = stage() if isinstance(stage, type) else stage
    if options.steps:
        stage = dataclasses.replace(stage, steps=options.steps)
    run: Run
    if isinstance(stage, ClipStage):
        run = ClipRun(stage, None if options.clips is None else options.clips / "checkpoint.pt")
    elif isinstance(stage, JointStage):
        run = JointRun(stage, options.decoder / "checkpoint.pt", options.vision / "checkpoint.pt")
    else:
        run = DecoderRun(stage) if isinstance(stage, DecoderStage) else VisionRun(stage)
    for line in train(run, options.out, options.minutes):
        print(" ".join(f"{name} {value}" for name, value in line.items()), flush=True)


if __name__ == "__main__":
    main()
