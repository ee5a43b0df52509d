"""POPE's official labels and pictures as the data set that lmms-eval's stock task ``pope`` asks a hub for.

Run as ``python local_pope.py FOLDER`` with the folder that holds ``coco/coco_pope_*.json`` and ``val2014/``: it writes
``lmms-lab-encoder/POPE/data`` into the working directory, where ``HF_HUB_OFFLINE=1 lmms-eval --tasks pope`` finds it
before any hub. ``pope_bare.yaml`` is the same task without its suffix, for the bundled model's vocabulary.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from datasets import Dataset, Image

from visiontrim.evaluate.benchmarks.base import Files
from visiontrim.evaluate.benchmarks.pope import POPE

HOME = Path("lmms-lab-encoder") / "POPE" / "data"
BARE = """include: {packaged}
task: pope_bare
lmms_eval_specific_kwargs: {{default: {{pre_prompt: "", post_prompt: ""}}}}
"""


def rows(folder: Path) -> list[dict]:
    """The columns of the stock data set."""
    benchmark = POPE()
    return [
        {
            "id": str(item.id),
            "question_id": str(item.id),
            "question": item.bare,
            "answer": item.answers[0],
            "image_source": Path(str(item.sources[0])).stem,
            "image": str(item.sources[0]),
            "category": item.type,
        }
        for item in benchmark.read(Files(folder, benchmark))
    ]


if __name__ == "__main__":
    HOME.mkdir(parents=True, exist_ok=True)
    found = Dataset.from_list(rows(Path(sys.argv[1]))).cast_column("image", Image())
    found.to_parquet(HOME / "test-00000-of-00001.parquet")
    packaged = Path(str(find_spec("lmms_eval").origin)).parent / "tasks" / "pope" / "pope.yaml"
    Path("pope_bare.yaml").write_text(BARE.format(packaged=packaged))
    print(f"{len(found)} questions in {HOME}")
