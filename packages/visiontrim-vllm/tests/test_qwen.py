"""Qwen2.5-VL in vLLM, whose tokens have three positions each, answers as visiontrim does on transformers."""

from __future__ import annotations

import json

import pytest

from conftest import QWEN

SAMPLES = tuple(QWEN)


@pytest.mark.parametrize(("method", "keep"), [("visiontrim", 64), ("visiontrim", 0.25), ("divprune", 40)])
def test_every_sequence_is_equal(qwen, method, keep):
    said, outs = qwen.says(SAMPLES, method=method, keep=keep)
    assert said == qwen.expects(SAMPLES, (method, json.dumps({"keep": keep})))
    kept = keep if isinstance(keep, int) else round(keep * 192)
    assert kept < len(outs[0].prompt_token_ids) < kept + 40


def test_all_tokens(qwen):
    said, outs = qwen.says(SAMPLES, method="none")
    assert said == qwen.expects(SAMPLES, None)
    assert len(outs[0].prompt_token_ids) > 192
