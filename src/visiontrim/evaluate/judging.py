"""Grades by a judge: a language model behind an OpenAI-compatible server that the user names. Nothing is sent without
one.

MM-Vet and the open questions about videos have no score but a judge's. The instructions are written here in our own
words, so grades come near to those of the official prompts and are not theirs; a file of grades that the official
scripts wrote is read as it is. Grades are kept as they come, so that a stopped run goes on.
"""

from __future__ import annotations

import ast
import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visiontrim.core.errors import TrimError
from visiontrim.evaluate.benchmarks.base import Benchmark, Breakdown, save_json
from visiontrim.evaluate.benchmarks.mmvet import MMVet, read_grades
from visiontrim.evaluate.benchmarks.videoqa import VideoQA
from visiontrim.evaluate.given import Joined
from visiontrim.evaluate.items import Item
from visiontrim.evaluate.records import entries

TRIES = 5
"""How often an unreadable reply is asked for anew, each time with a higher temperature."""
TIMEOUT = 120.0
"""Seconds that the server may take."""
MM_VET = """You grade answers to questions about images. Compare the prediction with the ground truth and give its
correctness as a number from 0.0 to 1.0 in steps of 0.1: 1.0 is fully right, 0.0 is wrong. <AND> between parts of the
ground truth means that the answer needs all of them; <OR> between alternatives means that any one of them is fully
right. Reply with the number alone.

question | ground truth | prediction | correctness
What is 3 + 4? | 7 | 5 | 0.0
What is 3 + 4? | 7 | seven | 1.0
Which fruits are on the plate? | apple <AND> pear | There is an apple and a banana. | 0.5
Which fruits are on the plate? | apple <AND> pear | Apples and pears. | 1.0
What is the dog doing? | sleeping <OR> resting | It rests in the sun. | 1.0
What is the dog doing? | sleeping <OR> resting | The dog runs. | 0.0
{question} | {truth} | {prediction} | """
VIDEO = """You grade answers to questions about videos. Decide whether the predicted answer means the same as the
correct one: synonyms and paraphrases are right. Reply with a dictionary and nothing else, of the form
{{'pred': 'yes', 'score': 4}}, where pred is yes or no and score is a whole number from 0 (nothing fits) to 5 (the same
meaning).

question: {question}
correct answer: {truth}
predicted answer: {prediction}"""


@dataclass(frozen=True, slots=True)
class Server:
    """Where the judge is, and its model."""

    url: str
    model: str | None
    key: Path | None = None
    """File of the key, for servers that want one."""

    def ask(self, prompt: str, temperature: float) -> str:
        """What the model replies. Raises :class:`TrimError` where the server does not answer."""
        if self.model is None:
            raise TrimError("--judge needs --judge-model NAME: grades depend on it")
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "temperature": temperature}
        headers = {"Content-Type": "application/json"}
        try:
            if self.key is not None:
                headers["Authorization"] = f"Bearer {self.key.read_text(encoding='utf-8').strip()}"
            address = f"{self.url.rstrip('/')}/chat/completions"
            request = urllib.request.Request(address, json.dumps(body | {"max_tokens": 32}).encode(), headers)
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                reply: Any = json.load(response)
            return str(reply["choices"][0]["message"]["content"])
        except (OSError, urllib.error.URLError, ValueError, LookupError, TypeError) as error:
            raise TrimError(f"the judge at {self.url} does not answer ({error}): what is graded is kept") from error


def grade(
    benchmark: Benchmark,
    found: Joined,
    server: Server,
    path: Path,
    runs: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Grade the answers that have too few grades in ``path``, and write them there as they come."""
    known: dict[str, Any] = {name: dict(entry.fields) for name, entry in entries(path)} if path.exists() else {}
    pairs = [(item, text) for item, text in zip(found.items, found.texts, strict=True) if item.answers]
    for done, (item, text) in enumerate(pairs):
        name, fresh = _name(benchmark, item), False
        if isinstance(benchmark, MMVet):
            entry = known.setdefault(name, {"model": [], "content": [], "score": []})
            while len(entry["score"]) < runs:
                content, value = _tenths(server, item, text)
                entry["model"].append(server.model)
                entry["content"].append(content)
                entry["score"].append(value)
                fresh = True
        elif isinstance(benchmark, VideoQA) and name not in known:
            known[name], fresh = _video(server, item, text) | {"model": server.model}, True
        if fresh:
            save_json(known, path, indent=2)
        progress(done + 1, len(pairs))


def tables(benchmark: Benchmark, items: Sequence[Item], path: Path) -> Breakdown:
    """The tables of a file of grades."""
    if isinstance(benchmark, MMVet):
        return benchmark.grades(items, read_grades(path))
    if isinstance(benchmark, VideoQA):
        return benchmark.grades(items, {name: _read(entry) for name, entry in entries(path)})
    raise TrimError(f"{benchmark.title} is not graded by a judge: leave --grades away")


def _read(entry: Any) -> tuple[bool, float]:
    said = entry.text("pred").lower()
    if said not in ("yes", "no"):
        raise entry.error(f"'pred' is {said!r}, where yes or no is expected")
    try:
        return said == "yes", float(entry.text("score"))
    except ValueError:
        raise entry.error("'score' is no number") from None


def _name(benchmark: Benchmark, item: Item) -> str:
    return item.facts["name"] if isinstance(benchmark, MMVet) else str(item.id)


def _tenths(server: Server, item: Item, text: str) -> tuple[str, float]:
    """The first word of the reply as a number in [0, 1]; 0 where there is none after all tries."""
    prompt = MM_VET.format(question=item.question, truth=item.answers[0], prediction=text)
    content = ""
    for attempt in range(TRIES):
        content = server.ask(prompt, temperature=0.2 * attempt)
        found = re.match(r"\s*(\d+(?:\.\d+)?)", content)
        if found and 0 <= float(found[1]) <= 1:
            return content, float(found[1])
    return content, 0.0


def _video(server: Server, item: Item, text: str) -> dict[str, Any]:
    prompt = VIDEO.format(question=item.question, truth=item.answers[0], prediction=text)
    for attempt in range(TRIES):
        content = server.ask(prompt, temperature=0.2 * attempt)
        found = re.search(r"\{.*\}", content, re.DOTALL)
        try:
            value = ast.literal_eval(found[0]) if found else None
            if isinstance(value, dict) and value.get("pred") in ("yes", "no"):
                return {"pred": value["pred"], "score": float(value.get("score", 0))}
        except (ValueError, SyntaxError, TypeError):
            continue
    return {"pred": "no", "score": 0.0}
