"""The bundled models in vLLM with the plug-in, and what visiontrim says of the same questions on transformers."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_LOGGING_LEVEL="ERROR", OMP_NUM_THREADS="1"
)

import pytest
import torch

import visiontrim as vt
from visiontrim import zoo

NEW = 5
"""Tokens of every answer: the end token is masked, so that there is more than a word to compare."""
LLAVA = list(zoo.held_out(3))[:16]
QWEN = list(zoo.held_out_canvases((16, 12), 3))[:12]


class Server:
    """A model in vLLM, and the same one in transformers."""

    def __init__(self, path, bundle, options, **engine):
        from vllm import LLM

        self.model, self.processor, *tower = bundle
        self.guide = {"processor": self.processor, **({"text_tower": tower[0]} if tower else {})}
        self.llm = LLM(
            model=str(path),
            model_impl="transformers",
            dtype="float32",
            enforce_eager=True,
            seed=0,
            disable_log_stats=False,
            hf_overrides={"visiontrim": options},
            **engine,
        )

    def close(self):
        self.llm.llm_engine.engine_core.shutdown()

    def says(self, samples, new=NEW, **options):
        """Tokens that vLLM answers, and the tokens of its prompts; ``options`` are those of every request."""
        from vllm import SamplingParams

        prompts = []
        for number, sample in enumerate(samples):
            own = {key: value[number] if isinstance(value, list) else value for key, value in options.items()}
            prompt = {"prompt": sample.prompt, "mm_processor_kwargs": {"visiontrim": own}}
            prompts.append(prompt | {"multi_modal_data": {"image": list(sample.images)}})
        outs = self.llm.generate(prompts, SamplingParams(temperature=0, max_tokens=new, min_tokens=new), use_tqdm=False)
        return [list(out.outputs[0].token_ids) for out in outs], outs

    @functools.cache  # noqa: B019
    def expects(self, samples, spec, new=NEW):
        """What visiontrim on transformers answers; ``spec`` is the method and its options, or None for all tokens."""
        said = []
        for sample in samples:
            inputs = self.processor(images=list(sample.images), text=sample.prompt, return_tensors="pt")
            method, options = (spec, {}) if spec is None else (spec[0], json.loads(spec[1]))
            if method == "visiontrim":  # of whose two stages vLLM has the first one
                method = "visiontrim:stages=vision"
            run = (
                contextlib.nullcontext()
                if method is None
                else vt.trim(self.model, method, question=sample.question, **options, **self.guide)
            )
            with torch.inference_mode(), run:
                out = self.model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)
            said.append(out[0, inputs["input_ids"].shape[1] :].tolist())
        return said


def offline(sample, method, keep, new=16):
    """The text that visiontrim answers on transformers, with the bundled LLaVA."""
    model, processor, tower = zoo.load()
    inputs = processor(images=sample.image, text=sample.prompt, return_tensors="pt")
    with torch.inference_mode(), vt.trim(model, method, keep=keep, question=sample.question, text_tower=tower):
        out = model.generate(**inputs, max_new_tokens=new, do_sample=False)
    return processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def llava():
    """With 40 tokens a step, so that every image is cut in two or more, and little room for the cache."""
    torch.set_num_threads(1)
    server = Server(
        zoo.MODEL_DIR,
        zoo.load(),
        {"method": "visiontrim", "keep": 64, "text_tower": str(zoo.CLIP_DIR)},
        max_model_len=1024,
        max_num_seqs=8,
        max_num_batched_tokens=40,
        enable_chunked_prefill=True,
        block_size=32,
        num_gpu_blocks_override=34,
        limit_mm_per_prompt={"image": 2},
    )
    yield server
    server.close()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """The bundled model names the processor of PaddleOCR-VL, which counts nothing for vLLM; that of Qwen does."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("qwen") / "model"
    shutil.copytree(zoo.QWEN_DIR, folder)
    for name in ("processor_config.json", "tokenizer_config.json"):
        config = json.loads((folder / name).read_text()) | {"processor_class": "Qwen2_5_VLProcessor"}
        if images := config.get("image_processor"):
            config["video_processor"] = images | {"video_processor_type": "Qwen2VLVideoProcessor"}
            del config["video_processor"]["image_processor_type"]
        (folder / name).write_text(json.dumps(config))
    server = Server(
        folder,
        zoo.load_qwen(),
        {"method": "visiontrim", "keep": 64},
        max_model_len=512,
        max_num_seqs=8,
        limit_mm_per_prompt={"image": 1},
    )
    yield server
    server.close()
