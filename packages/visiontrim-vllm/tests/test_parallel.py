"""Two processes share a model, half of the heads each, and answer as visiontrim does on transformers in one."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from conftest import LLAVA, Server
from visiontrim import zoo

SAMPLES = tuple(LLAVA[:8])


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The bundled tower before a random language model, since three heads cannot be halved."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("even") / "model"
    bundled, processor, tower = zoo.load()
    config = LlavaConfig.from_pretrained(zoo.MODEL_DIR)
    even = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    config.text_config.update(even | {"num_hidden_layers": 3})
    config.initializer_range = config.text_config.initializer_range = 0.2  # or it would say the same of all pictures
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).float().eval()
    model.model.vision_tower.load_state_dict(bundled.model.vision_tower.state_dict())
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    options = {"method": "visiontrim", "keep": 64, "text_tower": str(zoo.CLIP_DIR)}
    engine = {"max_model_len": 1024, "max_num_seqs": 8, "tensor_parallel_size": 2}
    server = Server(folder, (model, processor, tower), options, **engine)
    yield server
    server.close()


def test_the_answers_tell_pictures_apart(server):
    said = server.expects(SAMPLES, ("visiontrim", json.dumps({"keep": 64})))
    assert len({tuple(one) for one in said}) >= 4


@pytest.mark.parametrize("method", ["visiontrim", "visionzip", "tome", "none"])
def test_every_sequence_is_equal(server, method):
    said, _ = server.says(SAMPLES, method=method, keep=64)
    assert said == server.expects(SAMPLES, None if method == "none" else (method, json.dumps({"keep": 64})))
