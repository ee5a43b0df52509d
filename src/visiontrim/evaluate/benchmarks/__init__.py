"""The benchmarks that papers print, by the names that ``--suite NAME:ROOT`` takes."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from visiontrim.core.errors import TrimError
from visiontrim.evaluate.benchmarks.base import Benchmark, Files
from visiontrim.evaluate.benchmarks.gqa import GQA
from visiontrim.evaluate.benchmarks.mmbench import MMBench
from visiontrim.evaluate.benchmarks.mme import MME
from visiontrim.evaluate.benchmarks.mmvet import MMVet
from visiontrim.evaluate.benchmarks.mvbench import MVBench
from visiontrim.evaluate.benchmarks.pope import POPE
from visiontrim.evaluate.benchmarks.scienceqa import ScienceQA
from visiontrim.evaluate.benchmarks.seed import SEED
from visiontrim.evaluate.benchmarks.textvqa import TextVQA
from visiontrim.evaluate.benchmarks.videomme import VideoMME
from visiontrim.evaluate.benchmarks.videoqa import NAMES as VIDEO_QA
from visiontrim.evaluate.benchmarks.videoqa import VideoQA
from visiontrim.evaluate.benchmarks.vizwiz import VizWiz
from visiontrim.evaluate.benchmarks.vqav2 import VQAv2, VQAv2Val

_MAKERS: tuple[Callable[[], Benchmark], ...] = (
    GQA,
    ScienceQA,
    lambda: ScienceQA(images_only=True),
    TextVQA,
    lambda: TextVQA(ocr=False),
    POPE,
    MMBench,
    lambda: MMBench(chinese=True),
    SEED,
    lambda: SEED(images_only=True),
    MMVet,
    VQAv2,
    VQAv2Val,
    VizWiz,
    lambda: VizWiz(val=True),
    MME,
    lambda: MME(perception_only=True),
    *(lambda name=name: VideoQA(name) for name in VIDEO_QA),
    MVBench,
    VideoMME,
    lambda: VideoMME(subtitles=True),
)


def list_benchmarks() -> dict[str, Benchmark]:
    """All of them by name."""
    return {benchmark.name: benchmark for benchmark in (make() for make in _MAKERS)}


def parse_name(text: str) -> tuple[Benchmark, Path] | None:
    """The benchmark and the root of ``NAME:ROOT``; None where that is no name of a benchmark.

    Raises :class:`TrimError` for a name without a root.
    """
    name, colon, root = text.partition(":")
    known = list_benchmarks()
    if name not in known:
        return None
    if not colon or not root:
        raise TrimError(f"{name} needs the folder of its files: {name}:ROOT, where eval.zip was unpacked")
    return known[name], Path(root)


def open_benchmark(text: str, images: Path | None = None) -> tuple[Benchmark, Files]:
    """The benchmark of ``NAME:ROOT`` and its files. Raises :class:`TrimError` where one of them is not there."""
    found = parse_name(text)
    if found is None:
        name = text.partition(":")[0]
        close = difflib.get_close_matches(name, list_benchmarks(), n=1)
        known = f"did you mean {close[0]}?" if close else f"choose from {', '.join(list_benchmarks())}"
        raise TrimError(f"there is no benchmark {name!r}: {known}")
    benchmark, root = found
    return benchmark, Files(root, benchmark, images)
