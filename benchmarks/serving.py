"""vLLM with 64 of 576 vision tokens against all of them: ``.serving/bin/python benchmarks/serving.py OUT.json``.

Needs the environment of ``make serving``. A LLaVA with the tower of the bundled model and a random language model of 29
million parameters stands behind two ``vllm serve`` on this machine, a thread each. Rounds take turns in random order;
every request has another picture. Writes requests per second, seconds to the first token, the share of the cache in use
and preemptions, for 1, 8 and 32 requests at a time: medians with their range.
"""

from __future__ import annotations

import asyncio
import base64
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from visiontrim import zoo

NEW = 16
"""Tokens of every answer."""
LOADS = {1: 4, 8: 16, 32: 32}
"""Requests at a time, and of a round."""
OPTIONS = {"method": "visiontrim", "keep": 64, "text_tower": str(zoo.CLIP_DIR)}
SERVERS = {"plain": (8631, None), "keep 64": (8632, OPTIONS)}


def make_model(folder: Path) -> int:
    """A wider language model behind the bundled tower, with random weights; its number of parameters."""
    config = LlavaConfig.from_pretrained(zoo.MODEL_DIR)
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
    question = {"type": "text", "text": "what color is the digit ?"}
    content = [{"type": "image_url", "image_url": {"url": url}}, question]
    more = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True, "temperature": 0}
    return {"model": "m", "max_tokens": NEW, "messages": [{"role": "user", "content": content}], **more}


async def ask(client: httpx.AsyncClient, address: str, request: dict[str, Any]) -> tuple[float, float, int]:
    """Seconds to the first token and to the last one, and the tokens of the prompt."""
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


async def measure(port: int, at_once: int, number: int, seed: int) -> dict[str, float]:
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
        begun = time.perf_counter()
        said = await asyncio.gather(*map(one, requests))
        took = time.perf_counter() - begun
        ended.set()
        await watching
        preempted = gauge((await client.get(f"{address}/metrics")).text, "vllm:num_preemptions_total")
    firsts, lasts, tokens = zip(*said, strict=True)
    return {
        "requests_per_second": number / took,
        "first_token_seconds": statistics.median(firsts),
        "seconds": statistics.median(lasts),
        "cache_in_use": max(used),
        "preemptions": preempted,
        "prompt_tokens": tokens[0],
    }


async def rounds(number: int) -> list[dict[str, Any]]:
    seed, found = 2_000_000_000, []
    for port, _ in SERVERS.values():  # the first call of a process is slow, whatever it is
        await measure(port, 1, 1, seed)
        seed += 1
    for turn in range(number):
        for at_once, requests in LOADS.items():
            for name in random.Random(f"{turn} {at_once}").sample(list(SERVERS), len(SERVERS)):
                numbers = await measure(SERVERS[name][0], at_once, requests, seed)
                seed += requests
                found.append({"server": name, "at_once": at_once, "round": turn, **numbers})
                print(found[-1], flush=True)
    return found


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


def main() -> None:
    out, turns = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 3
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        parameters = make_model(model)
        running = {}
        try:
            for name, (port, options) in SERVERS.items():
                running[name] = start(model, port, options, Path(folder) / f"{port}.log")
            for name, (port, _) in SERVERS.items():
                wait(running[name], port, Path(folder) / f"{port}.log")
            found = asyncio.run(rounds(turns))
        finally:
            for process in running.values():
                process.terminate()
                process.wait(120)
    rows = summary(found)
    speed = {(row["server"], row["at_once"]): row["requests_per_second"][0] for row in rows}
    ratios = {str(at_once): speed["keep 64", at_once] / speed["plain", at_once] for at_once in LOADS}
    versions = {name: version(name) for name in ("vllm", "torch", "transformers", "visiontrim")}
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()}
    said = {"parameters": parameters, "new_tokens": NEW, "versions": versions, "machine": machine}
    out.write_text(json.dumps(said | {"ratios": ratios, "median_least_most": rows, "rounds": found}, indent=1) + "\n")
    print(ratios)


if __name__ == "__main__":
    main()
