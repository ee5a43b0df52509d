"""What is refused before a model is built; and that the plug-in does nothing unless it is configured."""

from __future__ import annotations

import pytest

from visiontrim import zoo


def config(**options):
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(zoo.MODEL_DIR), max_model_len=512, dtype="float32", **options).create_model_config()


def test_nothing_happens_without_the_option():
    made = config(model_impl="transformers")
    assert not made.uses_mrope
    assert not made.multimodal_config.is_multimodal_pruning_enabled()
    assert config(model_impl="transformers", hf_overrides={"visiontrim": {"method": "random", "keep": 9}}).uses_mrope


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"hf_overrides": {"visiontrim": {"method": "random", "keep": 9}}}, "--model-impl transformers"),
        ({"method": "fastv"}, "inside the language model"),
        ({"method": "vscan"}, "inside the language model"),
        ({"method": "pixelprune"}, "by the picture"),
        ({"method": "random", "keep": 0}, "keeps nothing"),
        ({"method": "random", "kep": 9}, "no option 'kep'"),
    ],
)
def test_refused_at_start(options, match):
    if "hf_overrides" not in options:
        options = {"model_impl": "transformers", "hf_overrides": {"visiontrim": options}}
    with pytest.raises(ValueError, match=match):
        config(**options)
