"""What goes wrong in an evaluation: answers that must not be used again, stops, locks, outputs, progress."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import official
from visiontrim.ask import Speaker, load
from visiontrim.commands.progress import Progress
from visiontrim.core.errors import TrimError
from visiontrim.evaluate.asking import PLAIN, Cell, Examiner, _off
from visiontrim.evaluate.evaluation import Block, evaluate
from visiontrim.evaluate.fingerprint import fingerprint, setup
from visiontrim.evaluate.items import Suite
from visiontrim.evaluate.log import NAME, Log, claimed
from visiontrim.evaluate.protocol import Protocol, protocol
from visiontrim.evaluate.report import markdown, page, sections
from visiontrim.evaluate.suites import load_suite, slug


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    return load(device="cpu")


@pytest.fixture
def questions(tmp_path) -> Path:
    return official.two_questions(tmp_path)


def asked(speaker: Speaker, suite: Suite, log: Path, how: Protocol | None = None) -> int:
    """How many batches of the plain model and a method are asked anew."""
    examiner = Examiner(speaker, suite, Log(log), 8, how)
    return sum(examiner.ask(cell, 0)[1] for cell in (Cell(PLAIN, None), Cell("visiontrim", 32)))


def test_an_answer_is_used_again_only_if_nothing_has_changed(speaker, questions, tmp_path):
    log, suite = tmp_path / NAME, load_suite(str(questions))
    assert asked(speaker, suite, log) == 2
    assert asked(speaker, suite, log) == 0
    relabelled = suite.taking([dataclasses.replace(item, answers=("other",)) for item in suite.items])
    assert asked(speaker, relabelled, log) == 0, "a label changes no answer"
    assert asked(dataclasses.replace(speaker, text_tower=None), suite, log) == 2, "the text tower"
    assert asked(dataclasses.replace(speaker, normalise=str.strip), suite, log) == 2, "how questions are spelled"
    assert asked(speaker, suite, log, protocol("chat", pad=True)) == 2, "the protocol"
    assert asked(speaker, suite, log, protocol("chat", max_new_tokens=5)) == 2, "the length"
    processor = speaker.processor.image_processor
    mean, processor.image_mean = processor.image_mean, [0.1, 0.1, 0.1]
    try:
        assert asked(speaker, suite, log) == 2, "the processor"
    finally:
        processor.image_mean = mean
    assert asked(speaker, suite, log) == 0
    Image.open(tmp_path / "a.png").transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png")
    assert asked(speaker, suite, log) == 2, "the picture's content"
    assert asked(speaker, suite, log) == 0


def test_weights_in_another_order_are_other_weights(speaker):
    before, name = fingerprint(speaker.model), setup(speaker)
    weight = speaker.model.model.language_model.layers[0].mlp.up_proj.weight
    old = weight.data.clone()
    try:
        weight.data[[0, 1]] = old[[1, 0]]  # the sum of all stays
        assert fingerprint(speaker.model) != before
    finally:
        weight.data.copy_(old)
    assert (fingerprint(speaker.model), setup(speaker)) == (before, name)


def test_an_error_is_never_used_again(speaker, questions, tmp_path, monkeypatch):
    suite, cell = load_suite(str(questions)), Cell("visiontrim", 32)

    def fails(*arguments: object) -> None:
        raise TrimError("no text tower")

    with monkeypatch.context() as patch:
        patch.setattr("visiontrim.evaluate.asking.answers", fails)
        row, fresh = Examiner(speaker, suite, Log(tmp_path / NAME), 8).ask(cell, 0)
    assert (row.error, fresh) == ("no text tower", True)
    row, fresh = Examiner(speaker, suite, Log(tmp_path / NAME), 8).ask(cell, 0)
    assert (row.error, fresh) == ("", True)


def test_each_suite_has_a_folder_of_its_own(questions, tmp_path):
    other = tmp_path / "other" / "q.jsonl"
    other.parent.mkdir()
    other.write_text(questions.read_text())
    Image.open(tmp_path / "a.png").save(other.parent / "a.png")
    names = [str(questions), str(other)]
    folders = {slug(load_suite(name), name) for name in names}
    folders |= {slug(load_suite("shapes", split, 1), "shapes") for split in ("standard", "hard")}
    assert len(folders) == 4
    assert "shapes-standard" in folders


def test_few_scenes_mark_nothing(speaker, tmp_path):
    """With fewer than 8 no mark, no interval, and a sentence; with 8 all of them."""
    block = Block.comparison(["visiontrim"], [32])
    for scenes in (1, 8):
        suite = load_suite("shapes", scenes=scenes)
        suite = suite.taking([next(group) for _, group in itertools.groupby(suite.items, lambda item: item.group)])
        found = evaluate(Examiner(speaker, suite, Log(tmp_path / f"{scenes}.jsonl"), 8), block.cells)
        first, second, *_ = scores = block.scores(found)
        text = markdown("t", [], sections(block, found, scores))
        few = scenes < 8
        assert (first.interval is None, second.gain_interval is None, "Fewer than 8" in text) == (few, few, few)
        assert (re.search(r"\d to [+-]?\d", text) is None) == few, "intervals"


def test_tune_recommends_nothing_from_two_questions(cli, questions, monkeypatch, speaker):
    monkeypatch.setattr("visiontrim.commands.evaluate.load_speaker", lambda *_: speaker)
    command = ("tune", "--data", questions, "--methods", "random", "--keep", 288, "--target-retention", 0)
    code, said, err = cli(*command, "--out", questions.parent / "tuned", "--json")
    assert code == 0, err
    told = json.loads(said)
    assert (told["questions"], told["setting"]) == (2, None)
    assert "2 questions about 1 picture are too few to recommend anything: take at least 8 pictures" in told["advice"]


class _Torn:
    """A file whose writes fail after so many bytes, as on a full disk."""

    def __init__(self, path: Path, room: int) -> None:
        self._path, self._room = path, room

    def __enter__(self) -> _Torn:
        return self

    def __exit__(self, *error: object) -> None: ...

    def write(self, text: str) -> None:
        with open(self._path, "a") as file:
            file.write(text[: self._room])
        raise OSError(28, "No space left on device")


def test_a_log_that_was_torn_is_gone_on_with(speaker, questions, tmp_path, monkeypatch):
    log, suite = tmp_path / NAME, load_suite(str(questions))
    assert asked(speaker, suite, log) == 2
    first, second = log.read_text().splitlines()
    log.write_text(f'{first}\n\n{{"foreign": 1}}\nnot json\n{second[:-40]}')
    opened = Log(log)
    assert len(opened) == 1
    assert "2 lines of" in opened.notes[0]
    assert "torn" in opened.notes[1]
    assert log.read_text().endswith("not json\n"), "what stood before the torn line stays"
    assert asked(speaker, suite, log) == 1
    assert Log(log).notes == opened.notes[:1]
    assert asked(speaker, suite, log) == 0

    examiner = Examiner(speaker, suite, Log(log), 8, protocol("chat", max_new_tokens=2))
    opened_by = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, *a, **k: _Torn(self, 100) if "a" in a else opened_by(self, *a, **k))
        with pytest.raises(TrimError, match=rf"{NAME} cannot be written \(No space left on device\): the 2 batches"):
            examiner.ask(Cell(PLAIN, None), 0)
    assert "torn" in Log(log).notes[1]
    assert asked(speaker, suite, log) == 0


def test_logs_of_anything_are_read(tmp_path):
    path = tmp_path / NAME
    for content in (b"", b"\n\n", b"\xff\xfe{}\n", b"[1]\n", b'{"ids": 3}\n', b"[" * 5000 + b"\n", b"null"):
        path.write_bytes(content)
        assert len(Log(path)) == 0
    path.unlink()
    path.mkdir()
    with pytest.raises(TrimError, match="cannot be read"):
        Log(path)


def test_two_evaluations_do_not_share_a_folder(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from visiontrim.evaluate.log import claimed\n"
        "with claimed(Path(sys.argv[1])): print('in', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        with pytest.raises(
            TrimError, match=f"process {other.pid} is writing to .*: wait for it, or give another --out"
        ):
            claimed(tmp_path).__enter__()
    finally:
        other.kill()  # its lock goes with it
        other.wait()
    with claimed(tmp_path):
        assert (tmp_path / "log.lock").read_text() == str(os.getpid())
    assert not (tmp_path / "log.lock").exists()


def test_outputs_are_checked_before_the_work(cli, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "seen.png").mkdir()
    nowhere = tmp_path / "nowhere"
    for arguments, words in (
        (("eval", "--scenes", 1, "--out", tmp_path / "file"), "is a file: give a folder"),
        (("eval", "--scenes", 1, "--out", tmp_path / "file" / "x"), "cannot be written"),
        (("tune", "--data", "shapes", "--scenes", 1, "--out", tmp_path / "file"), "is a file: give a folder"),
        (("bench", "--out", nowhere / "b.json"), "is no folder: create it first"),
        (("bench", "--out", tmp_path), "is a folder: give the name of a file"),
        (("bench", "--plot", nowhere / "b.png"), "is no folder: create it first"),
        (("bench", "--plot", tmp_path / "b.doc"), "does not end like a picture"),
        (("analyze", "shift", "--out", nowhere / "s"), "is no folder: create it first"),
        (("analyze", "shift", "--out", tmp_path / "seen"), "is a folder: give the name of a file"),
    ):
        code, _, err = cli(*arguments)
        assert code == 2, arguments
        assert words in err, err
        assert len(err.strip().splitlines()) == 1


def test_ctrl_c_is_one_line_and_130(cli, tmp_path, monkeypatch):
    def stopped(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Examiner, "_ask", stopped)
    for command in (("eval", "--scenes", 1), ("tune", "--data", "shapes", "--scenes", 1)):
        code, _, err = cli(*command, "--out", tmp_path)
        assert code == 130
        assert err.strip() == f"visiontrim: stopped; answers are in {tmp_path / NAME}, and the same command goes on"
    assert not (tmp_path / "log.lock").exists()


def test_progress_off_a_terminal_is_a_line_a_minute():
    file, now = io.StringIO(), [0.0]
    progress = Progress("batches", file, lambda: now[0])
    for done in range(1, 21):
        now[0] += 30.0
        progress(done, 20, done > 4)  # four were in the log
    lines = file.getvalue().splitlines()
    assert len(lines) == 9
    assert lines[-1] == "batches: 18 of 20, about 60 s left"


def test_progress_on_a_terminal_rewrites_a_line():
    file = io.StringIO()
    file.isatty = lambda: True
    now = [0.0]
    progress = Progress("batches", file, lambda: now[0])
    for done in (1, 2):
        now[0] += 600.0
        progress(done, 2)
    assert file.getvalue() == "\rbatches: 1 of 2, about 10 min left" + f"\r{'batches: 2 of 2':<34}\n"


def test_scores_of_the_models_that_ship_tell_how_far_they_are(cli, monkeypatch, speaker):
    """Every question of every way to look is a step, and every scene of every embedding; off a terminal a line.

    Nothing is answered here but by a stand-in.
    """
    monkeypatch.setattr("visiontrim.zoo.loading.load", lambda _: speaker)
    monkeypatch.setattr("visiontrim.zoo.dynamic.load_qwen", lambda _: speaker)
    monkeypatch.setattr("visiontrim.zoo.evaluate.trim", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr("visiontrim.zoo.evaluate.answer", lambda _, __, batch, **___: [""] * len(batch))
    monkeypatch.setattr("visiontrim.zoo.evaluate.blind_answers", lambda samples, *_, **__: [""] * len(samples))
    monkeypatch.setattr("visiontrim.zoo.canvas_scores.blind_canvas_answers", lambda samples, _: [""] * len(samples))
    monkeypatch.setattr(Progress.__init__, "__defaults__", (None, itertools.count(step=61).__next__, 60.0))
    for command, what in (
        (("eval", "--scenes", 1, "--control-scenes", 1), "standard: questions x ways to look"),
        (("eval", "qwen", "--split", "8x8", "--scenes", 1), "canvases of 8x8: questions x ways to look"),
        (("phrases", "--scenes", 2), "scenes x embeddings"),
    ):
        code, _, err = cli("zoo", *command)
        assert code == 0, err
        lines = [re.fullmatch(rf"{what}: ([\d,]+) of ([\d,]+), about (.+) left", line) for line in err.splitlines()]
        assert all(lines), err
        done = [int(line[1]) for line in lines]
        assert done == sorted(set(done))
        assert len(done) >= 4
        assert {int(line[2]) for line in lines} == {int(lines[0][2])}
        assert done[-1] < int(lines[0][2]), "the last step ends it, and needs no line"


def test_a_report_sorts_and_is_read_aloud(speaker, tmp_path):
    suite, block = load_suite("shapes", scenes=1), Block.comparison(["visiontrim", "visionzip"], [32])
    found = evaluate(Examiner(speaker, suite, Log(tmp_path / NAME), 8), block.cells)
    shown = sections(block, found, block.scores(found))
    shown.append(dataclasses.replace(shown[0], rows=(), picture=Image.new("RGB", (8, 4)), file="p.png"))
    shown.append(dataclasses.replace(shown[0], title="`visiontrim` drawn"))
    text = page("t", ["x"], shown)
    assert 'name=viewport content="width=device-width' in text
    assert text.count('<tr class="control">') >= 4
    assert '<td data-value="random"><code>random</code> <small>(control)</small></td>' in text, "italics are not heard"
    assert "<h2><code>visiontrim</code> drawn</h2>" in text
    assert "class=best" in text
    assert 'alt="Retention. In % of' in text
    assert "width=8 height=4" in text
    assert text.count("<th>") == text.count("<th><button type=button>")
    assert "(control) |" in markdown("t", [], shown)


def test_the_budget_is_at_most_what_an_image_has():
    class FakeImage:
        def __init__(self, number: int, total: int) -> None:
            self.number, self.total, self.marks = number, total, 0

    class FakeRun:
        def __init__(self, totals: list[int], mean: float) -> None:
            self.trace = type("T", (), {"images": [FakeImage(n, total) for n, total in enumerate(totals)]})
            self.report = type("R", (), {"mean": mean})

    assert _off(FakeRun([16, 100], 40.0), 64) == "", "16 whole, 64 of 100"
    assert "where 40 were asked for" in _off(FakeRun([16, 100], 64.0), 64)
    assert "where 64 were asked for" in _off(FakeRun([576], 70.0), 64)
    assert _off(FakeRun([576], 100.0), 0.1) == ""
