"""The recipes of the bundled LLaVAs, stage by stage, as ``visiontrim zoo train`` runs them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from visiontrim.zoo.natural_questions import NATURAL_WORDS
from visiontrim.zoo.training.joint import POLISH, Eyes, JointRun, JointStage
from visiontrim.zoo.training.loop import train
from visiontrim.zoo.training.reading import SETTLING, ReadingRun, ReadingStage
from visiontrim.zoo.training.seeing import LOOKING, SeeingRun, SeeingStage
from visiontrim.zoo.training.ship import load_decoder, ship
from visiontrim.zoo.training.stages import BASICS, LONGER, DecoderRun, DecoderStage
from visiontrim.zoo.training.vision import VisionRun, VisionStage


def train_stage(name: str, out: Path, minutes: float, threads: int) -> Iterator[dict[str, Any]]:
    """Run a stage in its directory of ``out`` and yield the lines of its log."""
    torch.set_num_threads(threads)
    stages = ("basics", "decoder", "longer", "vision", "joint", "polish")
    basics, decoder, longer, vision, joint, polish = (out / stage / "checkpoint.pt" for stage in stages)
    if name == "basics":
        yield from train(DecoderRun(BASICS), basics.parent, minutes)
    elif name == "decoder":
        yield from train(DecoderRun(DecoderStage(), basics), decoder.parent, minutes)
    elif name == "longer":
        yield from train(DecoderRun(LONGER, decoder), longer.parent, minutes)
    elif name == "vision":
        yield from train(VisionRun(VisionStage()), vision.parent, minutes)
    elif name == "joint":
        yield from train(JointRun(JointStage(), longer, vision), joint.parent, minutes)
    elif name == "polish":
        yield from train(JointRun(POLISH, joint, vision), polish.parent, minutes)
    else:
        state = torch.load(polish, weights_only=True)
        eyes = Eyes.load(vision, POLISH.shape.hidden)
        eyes.projector.load_state_dict(state["projector"])
        ship(load_decoder(POLISH.shape, state["model"]), eyes, out)


def train_natural(name: str, out: Path, minutes: float, threads: int) -> Iterator[dict[str, Any]]:
    """The same for the model of natural scenes, which starts from the bundled one."""
    torch.set_num_threads(threads)
    stages = ("seeing", "reading", "looking", "settling")
    seeing, reading, looking, settling = (out / stage / "checkpoint.pt" for stage in stages)
    if name == "seeing":
        yield from train(SeeingRun(SeeingStage()), seeing.parent, minutes)
    elif name == "reading":
        yield from train(ReadingRun(ReadingStage(), seeing), reading.parent, minutes)
    elif name == "looking":
        yield from train(SeeingRun(LOOKING, reading), looking.parent, minutes)
    elif name == "settling":
        yield from train(ReadingRun(SETTLING, looking, reading), settling.parent, minutes)
    else:
        run = ReadingRun(SETTLING, settling, settling)
        ship(run.model, Eyes(run.towers.clip, run.towers.projector), out, NATURAL_WORDS)
