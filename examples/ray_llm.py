"""A large table of questions, answered by Ray Data with vLLM and 64 vision tokens an image.

    python examples/ray_llm.py ROWS.jsonl FOLDER [MODEL]

needs ray, vllm and visiontrim-vllm. Each line of ROWS.jsonl has ``image``, a path beside it, ``question``, and, if it
wants another budget than the others, ``keep``. FOLDER gets JSON lines, in parts; a row that fails is there with all its
columns and a text as ``__inference_error__``. Nothing here belongs to visiontrim but the two options of that name: what
Ray hands on to vLLM, the plug-in hears.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

import ray
from visiontrim import zoo


def ask(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the stages get for a row. Pictures are opened here, so that the engine never waits for them."""
    row = json.loads(row["text"])  # read_json would make one column of whole numbers and fractions, and gaps NaN
    content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
    return row | {
        "messages": [{"role": "user", "content": content}],
        "multimodal_data": {"image": Image.open(folder / row["image"]).convert("RGB")},
        "mm_processor_kwargs": {"visiontrim": {"question": row["question"], "keep": row.get("keep")}},
        "sampling_params": {"temperature": 0, "max_tokens": 16},
    }


def answered(row: dict[str, Any]) -> dict[str, Any]:
    """What is kept of what the stages say about a row."""
    kept = {name: row[name] for name in ("image", "question")}
    return kept | {"answer": row["generated_text"].strip(), "prompt_tokens": row["num_input_tokens"]}


def answers(rows: Path, model: str, options: dict[str, Any], gpus: int = 1, **engine: Any) -> ray.data.Dataset:
    """The answers to ``rows`` by ``model`` under the plug-in's ``options``; ``engine`` goes to vLLM."""
    config = vLLMEngineProcessorConfig(
        model_source=model,
        engine_kwargs={"model_impl": "transformers", "hf_overrides": {"visiontrim": options}, **engine},
        tokenize_stage={"enabled": False},  # vLLM does it, and detokenises
        detokenize_stage={"enabled": False},
        batch_size=16,
        concurrency=1,
        should_continue_on_error=True,
        log_engine_metrics=False,  # vLLM has its own; those for Ray want Ray Serve beside it
        placement_group_config=None if gpus else {"bundles": [{"CPU": 1}]},
    )
    processor = build_processor(config, preprocess=partial(ask, folder=rows.parent), postprocess=answered)
    return processor(ray.data.read_text(str(rows)))


if __name__ == "__main__":
    table, out, *named = sys.argv[1:]
    if named:
        said = answers(Path(table), named[0], {"method": "visiontrim", "keep": 64})
    else:  # the bundled model on a CPU, where vLLM wants most of the memory unless it is told how much to take
        own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        # if the engine held all CPUs, reading would wait for ever
        ray.init(num_cpus=8, include_dashboard=False, runtime_env={"env_vars": own})
        options = {"method": "visiontrim", "keep": 64, "text_tower": str(zoo.CLIP_DIR)}
        small = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 8}
        said = answers(Path(table), str(zoo.MODEL_DIR), options, gpus=0, **small)
    said.write_json(out)
