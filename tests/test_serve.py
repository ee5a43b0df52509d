"""The server: OpenAI's chat completions, batches whose rows do not touch each other, limits, and plain refusals."""

from __future__ import annotations

import base64
import io
import json
import threading

import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

import visiontrim as vt
from visiontrim import ask, zoo
from visiontrim.serving.batching import Batcher, Done, Failed, FullError, Job, _Drawing
from visiontrim.serving.requests import Limits
from visiontrim.serving.server import Settings, build

SAMPLES = list(zoo.held_out(2))[:6]
METHOD = vt.load_method("visiontrim", keep=64)


@pytest.fixture(scope="module")
def speaker():
    return ask.load(device="cpu")


@pytest.fixture(scope="module")
def batcher(speaker):
    batcher = Batcher(speaker, max_batch=8, max_waiting=16, max_prompt=700, gather=0.2)
    yield batcher
    batcher.close()


@pytest.fixture(scope="module")
def client(batcher):
    limits = Limits(
        body_bytes=400_000, images=2, image_bytes=200_000, pixels=100_000, new_tokens=6, default_new_tokens=3
    )
    settings = Settings("bundled", METHOD, limits, api_key="secret")
    client = TestClient(build(batcher, settings), headers={"Authorization": "Bearer secret"})
    return client  # without its lifespan, which would close the batcher


@pytest.fixture(scope="module")
def truth(speaker):
    return [ask.answer(speaker, [s.image], s.question, METHOD, max_new_tokens=3).text for s in SAMPLES]


def uri(image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def picture(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def user(content) -> dict:
    return {"messages": [{"role": "user", "content": content}]}


def body(sample, **more):
    return user([picture(uri(sample.image)), {"type": "text", "text": sample.question}]) | more


def post(client, *arguments, **more):
    return client.post("/v1/chat/completions", json=body(*arguments, **more))


def job(sample, **options):
    events = []
    ended = threading.Event()

    def tell(event):
        events.append(event)
        if not isinstance(event, str):
            ended.set()

    given = {"method": METHOD, "max_new_tokens": 3} | options
    made = Job(sample.prompt, list(sample.images), sample.question, tell=tell, **given)
    return made, events, ended


def test_an_answer_says_what_was_kept(client, truth):
    said = post(client, SAMPLES[0]).json()
    assert "choices" in said, said
    (choice,) = said["choices"]
    assert choice["message"] == {"role": "assistant", "content": truth[0]}
    assert choice["finish_reason"] == "stop"
    assert said["visiontrim"]["images"] == [{"tokens": 576, "kept": 146}]
    assert said["usage"]["prompt_tokens"] > 576
    assert said["usage"]["total_tokens"] == said["usage"]["prompt_tokens"] + said["usage"]["completion_tokens"]
    other = post(client, SAMPLES[0], visiontrim={"keep": 32, "method": "visionzip"}).json()
    assert other["visiontrim"]["images"] == [{"tokens": 576, "kept": 32}]
    assert other["visiontrim"]["method"].startswith("visionzip")


def test_a_stream_gives_the_same_text(client, truth):
    with client.stream(
        "POST", "/v1/chat/completions", json=body(SAMPLES[1], stream=True, stream_options={"include_usage": True})
    ) as said:
        assert said.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in said.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content", "") for delta in deltas) == truth[1]
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-2]["visiontrim"]["images"] == [{"tokens": 576, "kept": 146}]
    assert chunks[-1]["usage"]["completion_tokens"] > 0


def test_rows_of_a_batch_do_not_touch_each_other(batcher, truth):
    sizes = []
    batcher.on_batch = sizes.append
    jobs = [job(sample) for sample in SAMPLES]
    sampled = [job(SAMPLES[0], temperature=20.0, seed=7, max_new_tokens=6) for _ in range(2)]
    for made, _, _ in (*jobs, *sampled):
        batcher.submit(made)
    for _, _, ended in (*jobs, *sampled):
        assert ended.wait(60)
    assert max(sizes) > 4
    assert ["".join(events[:-1]) for _, events, _ in jobs] == truth
    assert sampled[0][1][:-1] == sampled[1][1][:-1], "one seed, one answer, whatever the row"
    alone = job(SAMPLES[0], temperature=20.0, seed=7, max_new_tokens=6)
    batcher.submit(alone[0])
    assert alone[2].wait(60)
    assert "".join(alone[1][:-1]) == "".join(sampled[0][1][:-1]), "and whatever it is batched with"
    others = [job(SAMPLES[0], temperature=20.0, seed=seed, max_new_tokens=6) for seed in range(4)]
    for made, _, _ in others:
        batcher.submit(made)
    assert all(ended.wait(60) for _, _, ended in others)
    assert len({"".join(events[:-1]) for _, events, _ in others}) > 1


def test_a_bad_row_fails_alone(batcher, truth):
    good, bad = job(SAMPLES[0]), job(SAMPLES[1])
    bad[0].images = bad[0].images * 2  # two pictures for one place
    for made, _, _ in (good, bad):
        batcher.submit(made)
    assert good[2].wait(60)
    assert bad[2].wait(60)
    assert "".join(good[1][:-1]) == truth[0]
    assert isinstance(bad[1][-1], Failed)


def test_stops_lengths_and_cancellation(batcher, truth):
    word = truth[0]
    stopped, short, gone = job(SAMPLES[0], stops=(word[1:3],)), job(SAMPLES[0], max_new_tokens=1), job(SAMPLES[0])
    gone[0].cancelled.set()
    for made, _, _ in (stopped, short, gone):
        batcher.submit(made)
    assert stopped[2].wait(60)
    assert short[2].wait(60)
    assert "".join(stopped[1][:-1]) == word[:1]
    assert isinstance(stopped[1][-1], Done)
    assert stopped[1][-1].reason == "stop"
    assert short[1][-1].reason == "length"
    assert short[1][-1].answer_tokens == 1
    assert gone[1] == [], "nobody waits for it"


@pytest.mark.parametrize(
    ("change", "status", "match"),
    [
        ({"visiontrim": {"keep": 0}}, 400, "keeps nothing"),
        ({"visiontrim": {"method": "nonsense"}}, 400, "unknown method"),
        ({"visiontrim": {"method": "/etc/passwd.yaml"}}, 400, "recipe files are not read"),
        ({"visiontrim": {"kep": 1}}, 400, "visiontrim.kep"),
        ({"model": "other"}, 404, "there is no model 'other'"),
        ({"temperature": -1}, 400, "temperature"),
        ({"stop": ["a"] * 5}, 400, "at most 4"),
        ({"messages": []}, 400, "messages"),
        (user("what is this, a zebra?"), 400, "zebra"),
        (user([{"type": "audio"}]), 400, "'audio' is not read"),
        (user([picture("http://a/b.png")]), 400, "not fetched"),
        (user([picture("data:image/png;base64,AAAA")]), 400, "image 0"),
        (user("x" * 500_000), 413, "400,000 bytes"),
    ],
)
def test_refusals(client, change, status, match):
    said = client.post("/v1/chat/completions", json=body(SAMPLES[0]) | change)
    assert said.status_code == status
    assert match in said.json()["error"]["message"]


def test_pictures_have_limits(client):
    def refusal(*images) -> str:
        said = client.post("/v1/chat/completions", json=user([picture(uri(image)) for image in images]))
        assert said.status_code == 400
        return said.json()["error"]["message"]

    image = SAMPLES[0].image
    assert "1000 x 101 pixels" in refusal(Image.new("RGB", (1000, 101)))
    assert "at most 2 images" in refusal(*[image.resize((32, 32))] * 3)
    assert "more than 200,000 bytes" in refusal(Image.effect_noise((300, 300), 99).convert("RGB"))


def test_a_prompt_that_is_too_long(client):
    words = {"type": "text", "text": "what color is the digit ? " * 30}
    said = client.post("/v1/chat/completions", json=user([picture(uri(SAMPLES[0].image)), words]))
    assert said.status_code == 400
    assert "at most 700 are read" in said.json()["error"]["message"]


def test_the_key_health_models_and_numbers(client):
    wrong = {"Authorization": "Bearer wrong"}
    assert post(client, SAMPLES[0]).status_code == 200
    assert client.post("/v1/chat/completions", json=body(SAMPLES[0]), headers=wrong).status_code == 401
    assert client.get("/v1/models", headers=wrong).status_code == 401
    assert client.get("/v1/models").json()["data"][0]["id"] == "bundled"
    assert client.get("/health", headers=wrong).json()["status"] == "ok"
    numbers = client.get("/metrics").text
    assert 'visiontrim_requests_total{status="401"}' in numbers
    assert "visiontrim_vision_tokens_kept_total" in numbers


def test_too_many_requests_are_refused_and_a_closed_one_ends_what_waits(speaker):
    batcher = Batcher(speaker, max_batch=1, max_waiting=2, gather=0.0)
    entered, go = threading.Event(), threading.Event()

    def hold(rows):
        entered.set()
        go.wait(60)

    batcher.on_batch = hold
    jobs = [job(SAMPLES[0], max_new_tokens=1) for _ in range(3)]
    batcher.submit(jobs[0][0])
    assert entered.wait(60)
    for made, _, _ in jobs[1:]:
        batcher.submit(made)
    client = TestClient(build(batcher, Settings("bundled", METHOD)))
    batcher.on_batch = hold  # which the application took
    said = post(client, SAMPLES[0])
    assert said.status_code == 429
    assert said.headers["retry-after"] == "1"
    go.set()
    batcher.close()
    assert all(isinstance(events[-1], Done) for _, events, _ in jobs)
    with pytest.raises(FullError):
        batcher.submit(job(SAMPLES[0])[0])


def test_draws_follow_the_chances():
    """One row of half, a quarter, an eighth ...: ``top_p`` keeps the first that reach it together."""
    scores = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    drawn = {top: set() for top in (0.4, 0.6, 1.0)}
    for top, seen in drawn.items():
        for seed in range(60):
            made = job(SAMPLES[0], temperature=1.0, top_p=top, seed=seed)[0]
            seen.add(int(_Drawing([made])(torch.zeros(1, 1), scores).argmax()))
    assert drawn == {0.4: {0}, 0.6: {0, 1}, 1.0: {0, 1, 2, 3}}
    greedy = job(SAMPLES[0])[0]
    assert _Drawing([greedy])(torch.zeros(1, 1), scores) is scores
