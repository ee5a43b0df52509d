"""``vllm serve`` with the plug-in, asked by OpenAI's client: budgets by request, streams, and refusals."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from openai import BadRequestError, OpenAI

from conftest import LLAVA, offline
from visiontrim import zoo

PORT = 8431
LEAN = "visiontrim:variant=lean"
OPTIONS = {"visiontrim": {"method": LEAN, "keep": 64, "text_tower": str(zoo.CLIP_DIR)}}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [
        *(Path(sys.executable).with_name("vllm"), "serve", zoo.MODEL_DIR, "--port", PORT, "--host", "127.0.0.1"),
        *("--model-impl", "transformers", "--dtype", "float32", "--enforce-eager", "--max-model-len", 1024),
        *("--max-num-seqs", 8, "--served-model-name", "m", "--hf-overrides", json.dumps(OPTIONS)),
        "--trust-request-mm-kwargs",
    ]
    with log.open("w") as file:
        process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=file)
    try:
        until = time.monotonic() + 1800
        while not answers():
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < until, log.read_text()[-4000:]
            time.sleep(0.5)
        yield OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none", max_retries=0)
    finally:
        process.terminate()
        process.wait(60)


def answers() -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5)
    except OSError:
        return False
    return True


def messages(sample):
    file = io.BytesIO()
    sample.image.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": sample.question}]
    return [{"role": "user", "content": content}]


def ask(client, sample, stream=False, **options):
    # the template has no <s>, which transformers puts before a prompt, and vLLM does not in chats
    extra = {"add_special_tokens": True, **({"mm_processor_kwargs": {"visiontrim": options}} if options else {})}
    more = {"max_tokens": 4, "temperature": 0, "stream": stream, "extra_body": extra}
    return client.chat.completions.create(model="m", messages=messages(sample), **more)


def test_budgets_by_request_and_streams(client):
    samples = LLAVA[:8]
    with ThreadPoolExecutor(len(samples)) as threads:
        said = list(threads.map(lambda sample: ask(client, sample), samples))
    assert [one.choices[0].message.content.strip() for one in said] == [offline(s, LEAN, 64, 4) for s in samples]
    assert said[0].usage.prompt_tokens < 100
    fewer = ask(client, LLAVA[0], keep=32)
    assert fewer.usage.prompt_tokens == said[0].usage.prompt_tokens - 32
    chunks = ask(client, LLAVA[0], stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == said[0].choices[0].message.content


@pytest.mark.parametrize(
    ("options", "match"), [({"keep": 0}, "keeps nothing"), ({"method": "fastv"}, "language model")]
)
def test_what_cannot_be_served_is_a_bad_request(client, options, match):
    with pytest.raises(BadRequestError, match=match):
        ask(client, LLAVA[0], **options)
    assert ask(client, LLAVA[0]).choices[0].message.content, "and the next one is answered"
