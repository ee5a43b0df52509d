"""``visiontrim batch`` on 300 rows, three of them bad, killed twice: ``python benchmarks/batch.py [OUT.json]``.

Asked are the bundled model and, where Ray is installed (``python tests/matrix.py ray`` makes ``.matrix/ray``), both
runners with two workers. A run that nothing disturbs writes what is expected; each other one is killed (SIGKILL) after
a third and after two thirds of the batches. Fails unless every run ends with exit code 1, 297 answers and three errors
in the order of the input, and the file is that of the first run, byte for byte. Knows nothing of how batches are kept.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from visiontrim.zoo import held_out

ROWS, BATCH = 300, 4
BAD = {
    50: {"id": "broken", "image": "broken.png", "question": "what color is the C ?"},
    150: {"id": "missing", "image": "nowhere.png", "question": "what color is the C ?"},
    250: {"id": "words", "image": "0.png", "question": "what is this, a zebra ?"},
}
"""By their place among the rows: no picture, no file, and words that the model cannot read."""


def make_rows(folder: Path) -> dict[str, str]:
    """Writes the rows and their pictures; the right answer of each good one, by id, in the order of the input."""
    samples = list(held_out(44))[: ROWS - len(BAD)]
    (folder / "broken.png").write_bytes(b"not a png")
    rows: list[dict[str, str]] = []
    for number, sample in enumerate(samples):
        sample.image.save(folder / f"{number}.png")
        rows.append({"id": f"r{number}", "image": f"{number}.png", "question": sample.question})
    for place, row in BAD.items():
        rows.insert(place, row)
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = {f"r{number}": sample.answer for number, sample in enumerate(samples)}
    return {row["id"]: answers.get(row["id"], "") for row in rows}


def start(folder: Path, out: str, *options: str | int) -> subprocess.Popen[bytes]:
    program = [sys.executable, "-c", "from visiontrim.cli import main; main()", "batch", folder / "in.jsonl"]
    settings = ["--out", folder / out, "--max-new-tokens", 3, "--batch-size", BATCH, "--device", "cpu", "--threads", 1]
    with (folder / f"{out}.log").open("a") as log:  # a session of its own, so that what a kill leaves can be counted
        return subprocess.Popen(list(map(str, [*program, *settings, *options])), stderr=log, start_new_session=True)


def batches(partial: Path) -> int:
    """Batches that are answered: lines after the header."""
    return max(0, partial.read_bytes().count(b"\n") - 1) if partial.exists() else 0


def left(session: int) -> int:
    """Processes of a session that still run (Linux; elsewhere 0)."""
    found = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, own = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has ended meanwhile
            continue
        found += int(own) == session and state != "Z"
    return found


def killed_twice(folder: Path, out: str, *options: str | int) -> dict[str, Any]:
    """Runs until a third, until two thirds and to the end; what was seen on the way."""
    total, partial, done, ended, begun = -(-ROWS // BATCH), folder / f"{out}.partial", [], [], time.monotonic()
    for share in (1 / 3, 2 / 3):
        process = start(folder, out, *options)
        while batches(partial) < share * total:
            if process.poll() is not None or time.monotonic() - begun > 3600:
                sys.exit(f"{out} ended by itself, or waits: {(folder / f'{out}.log').read_text()[-2000:]}")
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        done.append(batches(partial))
        begun_ending = time.monotonic()
        while left(process.pid) and time.monotonic() - begun_ending < 120:
            time.sleep(0.1)
        if left(process.pid):
            sys.exit(f"{left(process.pid)} processes of {out} are left two minutes after the kill")
        ended.append(round(time.monotonic() - begun_ending, 1))
    code = start(folder, out, *options).wait(3600)
    return {"code": code, "batches": total, "killed_at": done, "workers_ended_after": ended}


def check(folder: Path, out: str, code: int, right: dict[str, str]) -> dict[str, Any]:
    rows = [json.loads(line) for line in (folder / out).read_text().splitlines()]
    good = [row for row in rows if row["error"] is None]
    failed = {row["id"]: row["error"] for row in rows if row["error"] is not None}
    assert code == 1, f"exit code {code}"
    assert [row["id"] for row in rows] == list(right), "the order is another one"
    assert list(failed) == [row["id"] for row in BAD.values()], failed
    assert (folder / out).read_bytes() == (folder / "whole.jsonl").read_bytes(), "it is not the undisturbed run's file"
    assert not list(folder.glob(f"{out}.new")), "what is renamed into place is left"
    correct = sum(row["answer"] == right[row["id"]] for row in good)
    return {"answers": len(good), "errors": list(failed), "right": correct}


def main() -> None:
    runs: dict[str, Any] = {"local": ("--workers", 2)}
    if find_spec("ray"):
        runs["ray"] = ("--runner", "ray", "--workers", 2)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        right = make_rows(folder)
        begun = time.monotonic()
        code = start(folder, "whole.jsonl").wait(3600)
        found = {"undisturbed": check(folder, "whole.jsonl", code, right) | {"seconds": time.monotonic() - begun}}
        print("undisturbed", found["undisturbed"], flush=True)
        for runner, options in runs.items():
            begun, out = time.monotonic(), f"{runner}.jsonl"
            seen = killed_twice(folder, out, *options)
            found[runner] = seen | check(folder, out, seen["code"], right) | {"seconds": time.monotonic() - begun}
            print(runner, found[runner], flush=True)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")
    if "ray" not in runs:
        sys.exit("Ray is not installed here, so only local processes were asked")


if __name__ == "__main__":
    main()
