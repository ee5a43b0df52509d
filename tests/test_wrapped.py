"""Models in the hands of others: a pipeline, an assistant. tests/optional has what is slow or needs a package."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from transformers import AutoModelForCausalLM, pipeline

import families
import visiontrim as vt
from families import Prompts
from tiny import generate
from visiontrim import zoo

pytestmark = pytest.mark.usefixtures("no_grad")

PLAN = vt.Random(keep=0.5) | vt.Random(keep=0.25, layer=2)


def batch(name: str) -> dict[str, torch.Tensor]:
    return Prompts(name, (3, "image", 5), (1, "image", 2)).batch()


def test_static_caches_of_windows_are_refused():
    model = families.build("gemma3")
    with (
        vt.trim(model, "random", keep=0.5),
        pytest.raises(vt.TrimError, match=r"layer 0 of the cache is a Static.*or a DynamicCache"),
    ):
        generate(model, batch("gemma3"), cache_implementation="static")


def test_assisted_decoding_equals_greedy_search():
    """The assistant reads the text and sees no image; here it is the model's own language model."""
    model, inputs = families.build("llava"), Prompts("llava", (3, "image", 9)).batch()
    assistant = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    assistant.model.load_state_dict(model.model.language_model.state_dict())
    assistant.lm_head.load_state_dict(model.lm_head.state_dict())
    if Version(transformers.__version__) < Version("5.17"):  # the plain model cannot either
        with pytest.raises(ValueError, match="pixel_values"):
            model.generate(**inputs, max_new_tokens=10, do_sample=False, assistant_model=assistant)
        return
    accepted = []
    handle = model.model.language_model.register_forward_hook(lambda *call: accepted.append(call[-1][0].shape[1]))
    with vt.trim(model, PLAN):
        greedy = generate(model, inputs, max_new_tokens=10).sequences
        accepted.clear()
        assisted = model.generate(**inputs, max_new_tokens=10, do_sample=False, assistant_model=assistant)
    handle.remove()
    assert max(accepted[1:]) > 1  # several tokens at a time were verified
    assert torch.equal(greedy, assisted)


def test_the_pipeline_of_transformers():
    bundle, image = zoo.load(), Image.open(Path(__file__).parent.parent / "examples" / "shapes.png")
    question = "what shape is blue ?"
    ask = pipeline("image-text-to-text", model=bundle.model, processor=bundle.processor)
    with vt.trim(bundle.model, keep=64, question=question, text_tower=bundle.text_tower) as run:
        (said,) = ask(images=image, text=zoo.PROMPT.format(question=question), max_new_tokens=4, return_full_text=False)
    assert said["generated_text"].strip() == "star"
    assert run.report.kept_tokens == 146
