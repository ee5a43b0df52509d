"""LLaVA in vLLM answers as visiontrim does on transformers: token by token, whatever vLLM does with its prompts."""

from __future__ import annotations

import dataclasses
import json

import pytest

from conftest import LLAVA

SAMPLES = tuple(LLAVA)


def spec(method, **options):
    return method, json.dumps(options)


@pytest.mark.parametrize(
    ("method", "keep"), [("visiontrim", 64), ("visiontrim", 0.25), ("visionzip", 64), ("divprune", 0.1), ("tome", 64)]
)
def test_every_sequence_is_equal(llava, method, keep):
    said, outs = llava.says(SAMPLES, method=method, keep=keep)
    assert said == llava.expects(SAMPLES, spec(method, keep=keep))
    kept = keep if isinstance(keep, int) else round(keep * 576)
    text = len(llava.processor.tokenizer(SAMPLES[0].prompt)["input_ids"]) - 1
    assert len(outs[0].prompt_token_ids) == kept + text


def test_consecutive_positions_are_equal_too(llava):
    said, _ = llava.says(SAMPLES, positions="compact")
    assert said == llava.expects(SAMPLES, spec("visiontrim", keep=64, positions="compact"))


def test_the_question_is_read_from_the_prompt_or_given(llava):
    derived, _ = llava.says(SAMPLES)
    given, _ = llava.says(SAMPLES, question=[sample.question for sample in SAMPLES])
    assert derived == given
    other, _ = llava.says(SAMPLES, question="how many objects are there ?")
    assert other != derived, "the question guides"


def test_all_tokens_and_some_in_one_step(llava):
    keeps = [(64, 1.0, 32, 100)[number % 4] for number in range(8)]
    said, outs = llava.says(SAMPLES[:8], keep=keeps)
    for number, keep in enumerate(keeps):
        expected = None if keep == 1.0 else spec("visiontrim", keep=keep)
        assert [said[number]] == llava.expects(SAMPLES[number : number + 1], expected)
    assert len(outs[1].prompt_token_ids) > 576


def test_prompts_from_the_cache_of_prefixes(llava):
    llava.says(SAMPLES[:4])
    said, outs = llava.says(SAMPLES[:4])
    assert sum(out.num_cached_tokens for out in outs) >= 4 * 64
    assert said == llava.expects(SAMPLES[:4], spec("visiontrim", keep=64))


def test_several_questions_about_one_picture(llava):
    same = [dataclasses.replace(sample, image=SAMPLES[0].image) for sample in SAMPLES[:6]]
    said, _ = llava.says(same)
    assert said == llava.expects(tuple(same), spec("visiontrim", keep=64))


def test_two_pictures_in_a_prompt(llava):
    both = [dataclasses.replace(one, before=(two.image,)) for one, two in zip(SAMPLES[:4], SAMPLES[8:12], strict=True)]
    said, outs = llava.says(both, keep=50)
    assert said == llava.expects(tuple(both), spec("visiontrim", keep=50))
    assert len(outs[0].prompt_token_ids) < 120


def test_longer_answers_that_are_preempted(llava):
    before = preemptions(llava)
    said, _ = llava.says(SAMPLES[:8], new=100, keep=200)
    assert preemptions(llava) > before, "there is room for fewer of them"
    assert said == llava.expects(SAMPLES[:8], spec("visiontrim", keep=200), 100)


def test_text_alone(llava):
    from vllm import SamplingParams

    text = "USER: what color is the C ? ASSISTANT:"
    (out,) = llava.llm.generate([text], SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
    assert len(out.outputs[0].token_ids)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"keep": 0}, "keep=0 keeps nothing"),
        ({"keep": "many"}, "is not a number"),
        ({"kep": 64}, "no option 'kep'"),
        ({"method": "fastv"}, "inside the language model"),
        ({"method": "pixelprune"}, "by the picture"),
        ({"method": "nonsense"}, "unknown method"),
        ({"question": "what " * 2000}, "at most 4,000 characters"),
        ({"positions": "members"}, "choose 'keep' or 'compact'"),
    ],
)
def test_requests_that_are_refused(llava, options, match):
    with pytest.raises(ValueError, match=match):
        llava.says(SAMPLES[:1], **options)


def preemptions(server) -> int:
    return sum(metric.value for metric in server.llm.get_metrics() if metric.name == "vllm:num_preemptions")
