"""vLLM with 64 of 576 vision tokens against all: ``.serving/bin/python benchmarks/serving.py OUT.json [ROUNDS]``.

Needs the environment of ``make serving``. A LLaVA of 29 million parameters with random weights, whose tower has the
size of the bundled model's, stands behind three ``vllm serve`` on this machine, a thread each: plain, with the plug-in,
and made for a picture so small that it is 64 tokens. Rounds take turns in random order; every request has another
picture. Writes requests per second, seconds to the first token, processor seconds of the server, the share of the cache
in use and preemptions, for 1, 8 and 32 requests at a time: medians with their range. Then asks 32 at a time once more,
and compares every token with what transformers answers one by one, with visiontrim where the plug-in is.

``python benchmarks/serving.py --answers OUT.json`` compares alone, and writes that into what is there;
``--draw OUT.json PICTURE.png`` draws it, and needs no vLLM.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

import visiontrim as vt
from visiontrim import zoo
from visiontrim.plotting import pyplot

NEW = 16
"""Tokens of every answer."""
LOADS = {1: 4, 8: 16, 32: 32}
"""Requests at a time, and of a round."""
OPTIONS = {"method": "visiontrim", "keep": 64, "text_tower": str(zoo.CLIP_DIR)}
SERVERS = {"plain": (8631, None, 192), "keep 64": (8632, OPTIONS, 192), "small picture": (8633, None, 64)}
"""Port, the plug-in's options, and pixels of a side of what the tower sees: 24 x 24 tokens, or 8 x 8."""
QUESTION = "what color is the digit ?"


def make_model(folder: Path, side: int) -> int:
    """A wider language model behind the bundled tower's shape, with random weights; its number of parameters."""
    config = LlavaConfig.from_pretrained(zoo.MODEL_DIR)
    vision: Any = config.vision_config
    vision.image_size = side
    text: Any = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 512, 1536, 8
    text.num_attention_heads = text.num_key_value_heads = 8
    text.max_position_embeddings = 2048
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).float()
    model.save_pretrained(folder)
    for file in zoo.MODEL_DIR.iterdir():
        if file.suffix in (".json", ".jinja") and file.name != "config.json":
            (folder / file.name).write_bytes(file.read_bytes())
    processor = json.loads((folder / "processor_config.json").read_text())
    processor["image_processor"]["size"] = {"height": side, "width": side}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return sum(weight.numel() for weight in model.parameters())


def start(model: Path, port: int, options: dict[str, Any] | None, log: Path) -> subprocess.Popen:
    command: list[Any] = [
        *(Path(sys.executable).with_name("vllm"), "serve", model, "--host", "127.0.0.1", "--port", port),
        *("--model-impl", "transformers", "--served-model-name", "m", "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", 1024, "--max-num-seqs", 32, "--max-num-batched-tokens", 2048),
    ]
    if options is not None:
        command += ["--hf-overrides", json.dumps({"visiontrim": options})]
    alone = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        return subprocess.Popen(list(map(str, command)), stdout=file, stderr=file, env=os.environ | alone)


def wait(process: subprocess.Popen, port: int, log: Path) -> None:
    for _ in range(1800):
        if process.poll() is not None:
            sys.exit(log.read_text()[-3000:])
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
            return
        except OSError:
            time.sleep(0.5)
    sys.exit(f"the server at port {port} does not start: {log.read_text()[-3000:]}")


def body(seed: int) -> dict[str, Any]:
    file = io.BytesIO()
    zoo.draw_scene(seed).image.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    request = {"model": "m", "max_tokens": NEW, "messages": [{"role": "user", "content": content}]}
    return request | {"ignore_eos": True, "temperature": 0}


async def ask(client: Any, address: str, request: dict[str, Any]) -> tuple[float, float, int]:
    """Seconds to the first token and to the last one, and the tokens of the prompt."""
    request = request | {"stream": True, "stream_options": {"include_usage": True}}
    begun, first, tokens = time.perf_counter(), 0.0, 0
    async with client.stream("POST", f"{address}/v1/chat/completions", json=request) as said:
        assert said.status_code == 200, await said.aread()
        async for line in said.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if not first and event.get("choices") and event["choices"][0]["delta"].get("content"):
                    first = time.perf_counter() - begun
                tokens = (event.get("usage") or {}).get("prompt_tokens") or tokens
    return first, time.perf_counter() - begun, tokens


def gauge(text: str, name: str) -> float:
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def processor_seconds(process: subprocess.Popen) -> float:
    """What a server and all that it has started have used."""
    import psutil

    own = psutil.Process(process.pid)
    times = [one.cpu_times() for one in (own, *own.children(recursive=True))]
    return sum(time.user + time.system for time in times)


async def measure(process: subprocess.Popen, port: int, at_once: int, number: int, seed: int) -> dict[str, float]:
    import httpx  # pyright: ignore[reportMissingImports]

    address, limit, ended, used = f"http://127.0.0.1:{port}", asyncio.Semaphore(at_once), asyncio.Event(), [0.0]
    requests = [body(seed + one) for one in range(number)]
    async with httpx.AsyncClient(timeout=1800) as client:

        async def watch() -> None:
            while not ended.is_set():
                used.append(gauge((await client.get(f"{address}/metrics")).text, "vllm:kv_cache_usage_perc"))
                await asyncio.sleep(0.2)

        async def one(request: dict[str, Any]) -> tuple[float, float, int]:
            async with limit:
                return await ask(client, address, request)

        watching = asyncio.create_task(watch())
        before, begun = processor_seconds(process), time.perf_counter()
        said = await asyncio.gather(*map(one, requests))
        took = time.perf_counter() - begun
        spent = processor_seconds(process) - before
        ended.set()
        await watching
        preempted = gauge((await client.get(f"{address}/metrics")).text, "vllm:num_preemptions_total")
    firsts, lasts, tokens = zip(*said, strict=True)
    return {
        "requests_per_second": number / took,
        "processor_seconds": spent / number,
        "first_token_seconds": statistics.median(firsts),
        "seconds": statistics.median(lasts),
        "cache_in_use": max(used),
        "preemptions": preempted,
        "prompt_tokens": tokens[0],
    }


async def rounds(running: dict[str, subprocess.Popen], number: int) -> list[dict[str, Any]]:
    seed, found = 2_000_000_000, []
    for name, (port, *_) in SERVERS.items():  # the first calls of a process are slow, whatever it is
        await measure(running[name], port, 8, 8, seed)
        seed += 8
    for turn in range(number):
        for at_once, requests in LOADS.items():
            for name in random.Random(f"{turn} {at_once}").sample(list(SERVERS), len(SERVERS)):
                numbers = await measure(running[name], SERVERS[name][0], at_once, requests, seed)
                seed += requests
                found.append({"server": name, "at_once": at_once, "round": turn, **numbers})
                print(found[-1], flush=True)
    return found


SEEDS = range(2_100_000_000, 2_100_000_032)
"""Pictures of the answers that are compared."""


async def tokens_of(port: int) -> list[list[int]]:
    """The tokens that a server answers, asked 32 at a time."""
    import httpx  # pyright: ignore[reportMissingImports]

    async with httpx.AsyncClient(timeout=1800) as client:

        async def one(seed: int) -> list[int]:
            # LLaVA's chat template has no <s>, which transformers puts before it and vLLM leaves away in chats
            request = body(seed) | {"return_token_ids": True, "add_special_tokens": True}
            said = await client.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=request)
            return said.raise_for_status().json()["choices"][0]["token_ids"]

        return await asyncio.gather(*map(one, SEEDS))


@torch.inference_mode()
def offline(folder: Path, options: dict[str, Any] | None) -> list[tuple[list[int], list[float]]]:
    """The same by visiontrim on transformers, one by one; without ``options`` by the model as it is.

    With how far the logit of each token is above the next one.
    """
    torch.set_num_threads(1)
    model: Any = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor: Any = LlavaProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    run, said = contextlib.nullcontext(), []
    if options is not None:  # of whose two stages vLLM has the first one
        method = {**options, "method": f"{options['method']}:stages=vision"}
        run = vt.trim(model, **method, question=QUESTION, processor=processor)
    with run:
        for seed in SEEDS:
            inputs = processor(images=zoo.draw_scene(seed).image, text=text, return_tensors="pt")
            more = {"do_sample": False, "eos_token_id": None, "output_logits": True, "return_dict_in_generate": True}
            out = model.generate(**inputs, max_new_tokens=NEW, **more)
            first, second = torch.cat(out.logits).topk(2).values.T
            said.append((out.sequences[0, inputs["input_ids"].shape[1] :].tolist(), (first - second).tolist()))
    return said


def compared(tokens: list[list[int]], expected: list[tuple[list[int], list[float]]]) -> dict[str, Any]:
    """How many answers are equal, how close a decision was among all, and how close the first one that differs."""
    parted = [
        next(margin for own, token, margin in zip(ours, theirs, margins, strict=True) if own != token)
        for ours, (theirs, margins) in zip(tokens, expected, strict=True)
        if ours != theirs
    ]
    least = min(min(margins) for _, margins in expected)
    return {"equal": len(tokens) - len(parted), "of": len(tokens), "margins_where_not": parted, "least_margin": least}


def summary(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for at_once in LOADS:
        for name in SERVERS:
            own = [row for row in found if row["server"] == name and row["at_once"] == at_once]
            row: dict[str, Any] = {"server": name, "at_once": at_once}
            for key in own[0].keys() - {"server", "at_once", "round"}:
                values = [one[key] for one in own]
                row[key] = [statistics.median(values), min(values), max(values)]
            rows.append(row)
    return rows


def times_plain(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many times the plain server's requests are answered in a second, and in a second of its processors."""
    median = {(row["server"], row["at_once"]): row for row in rows}
    found = {}
    for name in SERVERS:
        speed, work = {}, {}
        for at_once in LOADS:
            own, plain = median[name, at_once], median["plain", at_once]
            speed[at_once] = own["requests_per_second"][0] / plain["requests_per_second"][0]
            work[at_once] = plain["processor_seconds"][0] / own["processor_seconds"][0]
        found[name] = {"requests_per_second": speed, "requests_per_processor_second": work}
    return found


def draw(told: dict[str, Any], path: Path) -> None:
    plt = pyplot()
    panels = {
        "requests_per_second": "requests per second",
        "processor_seconds": "processor seconds a request",
        "first_token_seconds": "seconds to the first token",
        "cache_in_use": "cache in use, %",
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 3), dpi=120, layout="constrained")
    for panel, (key, title) in zip(axes, panels.items(), strict=True):
        for number, name in enumerate(SERVERS):
            rows = [row for row in told["median_least_most"] if row["server"] == name]
            middle, low, high = (np.array([row[key][place] for row in rows]) for place in range(3))
            scale = 100 if key == "cache_in_use" else 1
            at = np.arange(len(rows)) + (number - 1) * 0.27
            spread = np.stack([middle - low, high - middle]) * scale
            label = f"{name}: {rows[0]['prompt_tokens'][0]:.0f} tokens a prompt"
            panel.bar(at, middle * scale, 0.25, yerr=spread, capsize=2, label=label, color=f"C{number}", ecolor="0.3")
        panel.set_xticks(range(len(LOADS)), [str(at_once) for at_once in LOADS])
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("requests at a time")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, ncols=len(SERVERS), loc="outside lower center")
    figure.savefig(path)


@contextlib.contextmanager
def servers() -> Iterator[tuple[dict[str, subprocess.Popen], dict[int, Path], int]]:
    """All servers, each answering, the models by the side of their pictures, and the parameters of one."""
    with tempfile.TemporaryDirectory() as folder:
        models = {side: Path(folder) / f"model{side}" for _, _, side in SERVERS.values()}
        parameters = [make_model(path, side) for side, path in models.items()]
        running: dict[str, subprocess.Popen] = {}
        try:
            for name, (port, options, side) in SERVERS.items():
                running[name] = start(models[side], port, options, Path(folder) / f"{port}.log")
            for name, (port, *_) in SERVERS.items():
                wait(running[name], port, Path(folder) / f"{port}.log")
            print("all servers answer", flush=True)
            yield running, models, parameters[0]
        finally:
            for process in running.values():
                process.terminate()
                process.wait(120)


def answers(models: dict[int, Path]) -> dict[str, Any]:
    """What the running servers answer, against transformers."""
    tokens = {name: asyncio.run(tokens_of(port)) for name, (port, *_) in SERVERS.items()}
    found = {}
    for name, (_, options, side) in SERVERS.items():
        found[name] = compared(tokens[name], offline(models[side], options))
        print(name, found[name], flush=True)
    return {"visiontrim": version("visiontrim"), "vllm": version("vllm"), "at_once": len(SEEDS), **found}


def main() -> None:
    if sys.argv[1] == "--draw":
        draw(json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3]))
        return
    if sys.argv[1] == "--answers":
        out = Path(sys.argv[2])
        told = json.loads(out.read_text())
        with servers() as (_, models, _):
            told["answers_equal_to_transformers"] = answers(models)
        out.write_text(json.dumps(told, indent=1) + "\n")
        return
    out, turns = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 3
    with servers() as (running, models, parameters):
        found = asyncio.run(rounds(running, turns))
        print("rounds are over", flush=True)
        equal = answers(models)
    rows = summary(found)
    versions = {name: version(name) for name in ("vllm", "torch", "transformers", "visiontrim")}
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()}
    said = {"parameters": parameters, "new_tokens": NEW, "versions": versions, "machine": machine}
    said |= {"answers_equal_to_transformers": equal, "times_plain": times_plain(rows)}
    out.write_text(json.dumps(said | {"median_least_most": rows, "rounds": found}, indent=1) + "\n")
    print(said["times_plain"], equal)


if __name__ == "__main__":
    main()
