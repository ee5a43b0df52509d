"""What goes wrong in an evaluation: answers that must not be used again, files of all kinds, stops, locks, outputs."""

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

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import official
from visiontrim.ask import Speaker, load
from visiontrim.commands.progress import Progress
from visiontrim.core.errors import TrimError
from visiontrim.evaluate.asking import PLAIN, Cell, Examiner, _off
from visiontrim.evaluate.benchmarks import list_benchmarks, open_benchmark
from visiontrim.evaluate.evaluation import Block, evaluate
from visiontrim.evaluate.files import read_items
from visiontrim.evaluate.fingerprint import fingerprint, setup
from visiontrim.evaluate.given import join, read_given
from visiontrim.evaluate.items import Item, Suite
from visiontrim.evaluate.log import NAME, Log, claimed
from visiontrim.evaluate.protocol import PROTOCOLS, SYSTEM, Protocol, protocol, square
from visiontrim.evaluate.report import markdown, page, sections
from visiontrim.evaluate.scores import Answers
from visiontrim.evaluate.suites import check_pictures, load_suite, slug


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    return load(device="cpu")


@pytest.fixture
def questions(tmp_path) -> Path:
    """Two questions about a picture in a file."""
    (seed, first, answer), (_, second, _) = official.pairs()[:2]
    official.scene(seed).save(tmp_path / "a.png")
    rows = [
        {"image": "a.png", "question": first, "answer": answer},
        {"image": "a.png", "question": second, "answer": None},
    ]
    official.lines(tmp_path / "q.jsonl", rows)
    return tmp_path / "q.jsonl"


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


def test_a_question_without_an_answer_has_no_label(speaker, questions, tmp_path):
    suite = load_suite(str(questions))
    assert [item.answers for item in suite.items][1] == (), "null is no answer 'None'"
    found = evaluate(Examiner(speaker, suite, Log(tmp_path / NAME), 8), [])
    assert (found.labelled, len(found.items)) == (1, 2), "one line without an answer costs no other its label"
    assert found.whole.score == 100.0


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


def test_missing_pictures_are_told_before_a_model_is_loaded(questions):
    suite = load_suite(str(questions))
    check_pictures(suite.items)
    (questions.parent / "a.png").unlink()
    with pytest.raises(TrimError, match=r"1 of 1 pictures or videos are missing, the first is .*a.png: --images DIR"):
        check_pictures(suite.items)


WRONG = [
    ("", "holds no questions"),
    ("[]", "holds no questions"),
    ("{", "line 1 is not valid JSON"),
    ("[1]", "a number, where an object"),
    ("null", "null, where an object"),
    ('{"image": "a.png"}', "asks nothing"),
    (
        '{"image": "a.png", "question": 5.5}\n{"image": "a.png", "question": true}',
        "line 2: 'question' is true or false",
    ),
    ('{"image": "a.png", "question": ["x"]}', "'question' is a list, where text"),
    ('{"image": 5, "question": {}}', "'question' is an object"),
    ('{"image": {}, "question": "x"}', "'image' is an object"),
    ('{"image": "a.png", "question": "x", "answer": {"a": 1}}', "'answer' is an object"),
    ('{"image": "a.png", "question": "x", "answer": [null]}', "there is no 'answer'"),
    ('{"image": "a.png", "conversations": "hello"}', "'conversations' is text, where a list"),
    ('{"image": "a.png", "conversations": [1]}', "conversations, entry 1: it is a number"),
    ('{"image": "a.png", "conversations": [{"from": "human"}]}', "there is no 'value'"),
    ('{"image": "a.png", "question": "<image>"}', "its question is empty"),
    ('{"image": "a.png", "question": "\\ud800"}', "half a sign"),
    ('{"a": ' * 3000, "not valid JSON"),
]


@pytest.mark.parametrize(("content", "words"), WRONG)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_wrong_files_of_questions_are_one_sentence(content, words, encoding, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(content, encoding=encoding)
    with pytest.raises(TrimError, match=words) as caught:
        load_suite(str(path))
    assert "\n" not in str(caught.value)


def test_question_files_in_other_encodings(tmp_path, questions):
    text = questions.read_text()
    for encoding in ("utf-8-sig", "utf-16"):
        questions.write_text(text, encoding=encoding)
        assert len(load_suite(str(questions)).items) == 2
    questions.write_bytes(text.encode() + b'{"image": "a.png", "question": "\xff"}\n')
    with pytest.raises(TrimError, match=r"line 3 is not UTF-8"):
        load_suite(str(questions))
    questions.write_bytes(text.encode("utf-16")[:-3])
    with pytest.raises(TrimError, match=r"cut off in the middle|not valid JSON"):
        load_suite(str(questions))


def test_a_file_that_breaks_off_while_it_is_read(questions, monkeypatch):
    class Broken(io.BytesIO):
        def readline(self, *size: int) -> bytes:
            if self.tell():
                raise OSError(5, "Input/output error")
            return super().readline(*size)

    content = questions.read_bytes()
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: Broken(content))
    read = read_items(questions)
    assert next(read).question
    with pytest.raises(TrimError, match=r"q.jsonl cannot be read \(Input/output error\)"):
        next(read)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    ["image", "question", "answer", "text", "question_id", "id", "type", "conversations", "doc_id", "target", "doc"]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.dictionaries(NAMES, JSON, max_size=6) | JSON, max_size=3),
    suffix=st.sampled_from([".json", ".jsonl"]),
)
def test_any_file_of_questions_reads_or_is_one_sentence(rows, suffix, tmp_path):
    path = tmp_path / f"fuzz{suffix}"
    path.write_text("\n".join(map(json.dumps, rows)) if suffix == ".jsonl" else json.dumps(rows))
    told, items = reading(path)
    assert not told or (told.startswith(str(path)) and "\n" not in told)
    assert all(isinstance(item.question, str) and item.sources for item in items)


def reading(path: Path) -> tuple[str, list[Item]]:
    """What is wrong with a file of questions, or its questions."""
    try:
        return "", list(read_items(path))
    except TrimError as error:
        return str(error), []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60), suffix=st.sampled_from([".json", ".jsonl", ".tsv"]))
def test_any_bytes_are_one_sentence(content, suffix, tmp_path):
    path = tmp_path / f"fuzz{suffix}"
    path.write_bytes(content)
    assert "\n" not in reading(path)[0]


def test_protocols(speaker):
    item = Item("1", "1", (), "What?\nA. x", (), "question", bare="What?")
    other = dataclasses.replace(speaker, name="llava", normalise=str.strip)
    published = PROTOCOLS["llava-1.5"]
    assert published.prompt(other, item, 1) == f"{SYSTEM} USER: <image>\nWhat?\nA. x ASSISTANT:"
    assert published.prompt(other, item, 0) == f"{SYSTEM} USER: What?\nA. x ASSISTANT:"
    assert published.prompt(other, item, 8).count("<image>") == 8
    assert (published.guidance(other, item), PROTOCOLS["bare"].guidance(other, item)) == ("What?\nA. x", "What?")
    assert PROTOCOLS["chat"].prompt(other, item, 1) is None
    assert PROTOCOLS["bare"].question(other, item) == "What?"
    with pytest.raises(TrimError, match="--protocol bare sends the question alone"):
        PROTOCOLS["chat"].question(speaker, item)
    with pytest.raises(TrimError, match="knows no word of LLaVA's system sentence"):
        published.prompt(speaker, item, 1)
    with pytest.raises(TrimError, match=r"there is no protocol 'x': choose chat, llava-1\.5, bare"):
        protocol("x")
    with pytest.raises(TrimError, match="--guide 'x': choose prompt or question"):
        protocol("chat", guide="x")
    assert protocol("chat", pad=None, suffix=True) is not None
    assert protocol("llava-1.5", pad=False).name == "llava-1.5, changed"


def test_a_square_as_llava_pads():
    picture = Image.new("RGB", (5, 2), "red")
    found = np.asarray(square(picture, (0.481, 0.457, 0.408)))
    assert found.shape == (5, 5, 3)
    assert (found[0] == (122, 116, 104)).all(), "int(255 x mean)"
    assert (found[1:3] == (255, 0, 0)).all()
    assert (found[3:] == (122, 116, 104)).all()
    assert square(picture.crop((0, 0, 2, 2)), (0, 0, 0)).size == (2, 2)


def test_other_files_of_questions(tmp_path):
    """VQA pairs, logs of lmms-eval, VLMEvalKit's tables and a folder of them, each scored by its own rule."""
    official.vqav2(tmp_path)
    home, pictures = tmp_path / "vqav2", tmp_path / "vqav2" / "val2014"
    pairs = load_suite(str(home / "v2_OpenEnded_mscoco_val2014_questions.json"), images=pictures)
    check_pictures(pairs.items)
    assert pairs.labelled == len(pairs.items) == 6
    assert pairs.metric.right(pairs.items[0], f"The {pairs.items[0].answers[1]}.") == 1.0
    assert pairs.metric.right(pairs.items[0], "what") == 0.0

    official.gqa(tmp_path)
    llava = load_suite(str(tmp_path / "gqa" / "llava_gqa_testdev_balanced.jsonl"), images=tmp_path / "gqa/data/images")
    check_pictures(llava.items)
    assert llava.items[0].id == "000000000"
    assert llava.items[0].bare in llava.items[0].question

    official.mmbench(tmp_path)
    table = load_suite(str(tmp_path / "mmbench" / "mmbench_dev_20230712.tsv"))
    assert table.items[0].pictures()[0].size == (192, 192)
    assert table.metric.right(table.items[0], "(B)") == 1.0
    assert table.metric.right(table.items[0], table.items[0].facts["options"]["B"]) == 1.0
    assert table.metric.right(table.items[0], "A") == 0.0

    folder = tmp_path / "folder"
    official.lines(
        folder / "samples.jsonl",
        [{"doc_id": 0, "doc": {"image_source": "a", "question": "who?"}, "target": "me", "resps": [["me"]]}],
    )
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    (folder / "t.tsv").write_text("index\timage_path\tquestion\tanswer\n7\ta.png\twhat?\t['x', 'x', 'x', 'x']\n")
    both = load_suite(str(folder))
    check_pictures(both.items)
    assert [(item.id, item.type, item.answers[0]) for item in both.items] == [
        ("samples.jsonl/0", "samples", "me"),
        ("t.tsv/7", "t", "x"),
    ]
    assert [both.metric.right(item, "x") for item in both.items] == [0.0, 1.0]
    (folder / "a.png").unlink()
    with pytest.raises(TrimError, match=r"its picture is not in .*lmms-eval logs none"):
        load_suite(str(folder))


@pytest.mark.parametrize("name", list_benchmarks())
def test_a_benchmark_from_its_files_to_its_uploads(name, cli, tmp_path, monkeypatch, speaker):
    """Plain, VisionTrim and controls; the answers are written and scored again, and so are the uploads."""
    monkeypatch.setattr("visiontrim.commands.evaluate.load_speaker", lambda *_: speaker)
    for drawn in ("frontier", "examples"):
        monkeypatch.setattr(f"visiontrim.evaluate.output.{drawn}", lambda *_: [])
    official.WRITERS[name](tmp_path)
    out, suite = tmp_path / "out", f"{name}:{tmp_path}"
    command = ("eval", "--suite", suite, "--keep", 64, "--scenes", 1, "--seeds", 1, "--frames", 1, "--answer", 3)
    code, said, err = cli(*command, "--protocol", "bare", "--batch", 8, "--out", out, "--json")
    assert code == 0, err
    told = json.loads(said)
    assert [score["method"] for score in told["scores"]] == ["random", "uniform", "downsampled", "visiontrim"]
    benchmark, files = open_benchmark(suite)
    items = benchmark.read(files)
    for method in ("plain", "random-64", "visiontrim-64"):
        (upload,) = (out / "uploads").glob(f"{method}*")
        answers = out / "answers" / f"{method}.jsonl"
        again = tmp_path / f"again{upload.suffix}"
        code, said, err = cli("score", suite, answers, "--partial", "--upload", again, "--json")
        assert code == 0, err
        (first, *_), scored = json.loads(said).get("scores", [None]), told["plain"]
        if method != "plain":
            scored = told["scores"][0 if method == "random-64" else 3]
        if name in ("vqav2", "vizwiz"):
            assert first is None, "only a server has the labels"
        else:
            assert first["score"] == pytest.approx(scored["score"])
        if upload.is_dir():
            pairs = [(path.read_bytes(), (again / path.name).read_bytes()) for path in upload.iterdir()]
            assert pairs
            assert all(one == other for one, other in pairs)
        elif upload.suffix != ".xlsx":  # a spreadsheet holds the time of its making
            assert again.read_bytes() == upload.read_bytes()
        # Read back, the upload holds every answer in the form that is compared, and nothing else
        wanted = join(benchmark, items, read_given(answers), answers, partial=True)
        found = join(benchmark, items, read_given(upload), upload, partial=True)
        assert wanted.texts
        asked = [item for item in found.items if name != "vqav2" or item in wanted.items]
        assert asked == list(wanted.items)
        texts = dict(zip(found.items, found.texts, strict=True))
        assert [benchmark.parse(item, texts[item]) for item in asked] == [
            benchmark.parse(item, text) for item, text in zip(asked, wanted.texts, strict=True)
        ]
        code, said, err = cli("score", suite, upload, "--partial", "--json")
        if first is None:
            assert code == 2
        else:
            assert code == 0, err
            assert json.loads(said)["scores"][0]["score"] == pytest.approx(scored["score"])
    if name == "scienceqa":
        rows = [json.loads(line) for line in (out / NAME).read_text().splitlines()]
        assert sum(not row["per_layer"] for row in rows) in (0, 1), "without a picture only the plain model is asked"


def test_the_default_protocol_says_what_the_bundled_model_needs(cli, tmp_path):
    official.pope(tmp_path)
    code, _, err = cli("eval", "--suite", f"pope:{tmp_path}", "--out", tmp_path / "o", "--device", "cpu")
    assert code == 2
    assert err.strip().endswith("--protocol bare sends the question alone")
    assert len(err.strip().splitlines()) == 1


def test_reproduce_prints_published_beside_measured(cli, tmp_path):
    official.pope(tmp_path)
    official.scienceqa(tmp_path)
    official.vqav2(tmp_path)
    command = (
        "reproduce",
        "visionzip",
        "--root",
        tmp_path,
        "--benchmarks",
        "pope,scienceqa-img,vqav2,gqa",
        "--tokens",
        64,
    )
    code, said, err = cli(*command, "--limit", 1, "--out", tmp_path / "r", "--device", "cpu", "--json")
    assert code == 0, err
    assert "answers, about" in err
    told = json.loads(said)
    assert "the bundled model is none of the published models" in told["excuse"]
    rows = {(row["benchmark"], row["method"]): row for row in told["rows"]}
    assert rows["pope", "visionzip"]["published"] == 77.0
    assert rows["pope", "visionzip"]["published_retention"] == pytest.approx(77.0 / 85.9)
    assert rows["pope", "visionzip"]["difference"] is None
    assert rows["pope", "none"]["measured"] is not None
    assert "server" in rows["vqav2", "none"]["reason"]
    assert "GQA lacks" in rows["gqa", "none"]["reason"]
    report = (tmp_path / "r" / "reproduce.md").read_text()
    assert "| pope | 77 |" in report
    assert "not comparable" in report
    code, _, err = cli(*command, "--limit", 1, "--out", tmp_path / "r", "--device", "cpu", "--json")
    assert "answers, about" not in err, "nothing is asked twice"
    code, _, err = cli("reproduce", "nothing", "--root", tmp_path, "--benchmarks", "pope", "--out", tmp_path / "r")
    assert code == 2
    assert "nothing is printed for 'nothing' on llava-1.5-7b: choose sparsevlm, visionzip" in err


def test_what_is_comparable(monkeypatch):
    """SEED image beside image + video, MME's halves, TextVQA without tokens, a strange ScienceQA, a part of one."""
    from visiontrim.evaluate import reproduce
    from visiontrim.evaluate.published import budgets, cells, model_of, setting, usual

    assert budgets("llava-1.5-7b", "visiontrim") == [192, 128, 64, 32, 16, 8, 4, 1]
    assert usual("llava-1.5-7b", "visiontrim") == [192, 128, 64]
    assert [cell.value for cell in cells("llava-1.5-7b", "visiontrim", 64) if cell.column == "POPE"] == [86.2]
    assert setting("llava-1.5-7b", "sparsevlm", 128).call == "sparsevlm:keep=[303,110,36]"
    next_ = setting("llava-next-7b", "visiontrim", 640)
    assert (next_.per, next_.call[:23]) == ("tile", "visiontrim:keep=128,spl")
    config = type("C", (), {"model_type": "llava", "hidden_size": 4096, "num_hidden_layers": 32})
    assert model_of(config) == "llava-1.5-7b"
    config.hidden_size = 1
    assert model_of(config) is None
    for cell in cells("llava-1.5-7b", "none", 576):
        assert cell.source
        assert (cell.needs == "server") == (cell.benchmark in ("vqav2", "vizwiz"))

    def row(name: str, score: float, asked: int = 10, plain: float = 66.9) -> reproduce.Compared:
        class Found:
            labelled = 10
            items = [0] * asked
            whole = type("S", (), {"score": plain})

            def score(self, cell: Cell) -> object:
                return type(
                    "S",
                    (),
                    {"error": "", "score": score, "interval": None, "retention": 0.9, "retention_interval": None},
                )

        measured = {name: reproduce.Measured(Found(), 10)}
        return reproduce.compare("llava-1.5-7b", [setting("llava-1.5-7b", "visiontrim", 64)], measured)[1]

    assert row("gqa", 58.0).difference == pytest.approx(-0.8)
    assert row("gqa", 58.0).published_retention == pytest.approx(58.8 / 61.9)
    assert row("scienceqa-img", 70.0).difference == pytest.approx(-1.0)
    assert "neither 66.8 nor 69.5" in row("scienceqa-img", 70.0, plain=60.0).reason
    assert row("scienceqa-img", 70.0, plain=60.0).difference is None
    for name, words in (
        ("seed-image", "of image \\+ video"),
        ("mme-perception", "of perception \\+ cognition"),
        ("textvqa-no-ocr", "of val, with OCR tokens"),
        ("scienceqa", "of IMG"),
    ):
        assert row(name, 50.0).difference is None
        assert row(name, 50.0).reason == f"the published number is {words}".replace("\\", "")
    assert row("gqa", 58.0, asked=5).reason == "5 of 10 questions"
    assert row("mm-vet", 30.0).measured is None
    means = reproduce.average([row("gqa", 58.0), row("pope", 80.0)])
    assert means["visiontrim", 64][1:] == (0.9, 2)


def test_a_judge_grades_and_goes_on(cli, tmp_path):
    """A server on this machine that speaks as OpenAI's does; grades are kept, and asked for once."""
    import http.server
    import threading

    replies = []

    class Judge(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            replies.append(body)
            text = "0.5 I think" if "ground truth" in body["messages"][0]["content"] else "{'pred': 'yes', 'score': 4}"
            answer = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments: object) -> None: ...

    server = http.server.HTTPServer(("127.0.0.1", 0), Judge)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        for name, count in (("mm-vet", 6), ("msvd-qa", 6)):
            official.WRITERS[name](tmp_path)
            rows = [{"question_id": n if name == "mm-vet" else f"q{n}", "text": "a"} for n in range(count)]
            official.lines(tmp_path / "a.jsonl", rows)
            command = [
                "score",
                f"{name}:{tmp_path}",
                tmp_path / "a.jsonl",
                "--grades",
                tmp_path / f"{name}.json",
                "--json",
            ]
            code, said, err = cli(
                *command, "--judge", f"http://127.0.0.1:{server.server_port}/v1", "--judge-model", "made"
            )
            assert code == 0, err
            graded = json.loads(said)["graded"]["tables"]
            before = len(replies)
            code, again, _ = cli(*command)
            assert json.loads(again)["graded"]["tables"] == graded
            assert len(replies) == before
            code, alone, _ = cli("score", f"{name}:{tmp_path}", "--grades", tmp_path / f"{name}.json", "--json")
            assert json.loads(alone)["graded"]["tables"] == graded, "the grades of a file need no answers"
            if name == "mm-vet":
                assert graded["all"]["total"]["total"] == 50.0
            else:
                assert graded["judged"]["all"] == {"accuracy": 100.0, "score": 4.0, "questions": 6.0}
        assert {reply["model"] for reply in replies} == {"made"}
        code, _, err = cli("score", f"mm-vet:{tmp_path}", tmp_path / "a.jsonl", "--judge", "http://127.0.0.1:9")
        assert code == 2
    finally:
        server.shutdown()
        server.server_close()


def test_one_answer_sheet_beside_another(cli, tmp_path):
    official.gqa(tmp_path)
    labels = json.loads((tmp_path / "gqa/data/testdev_balanced_questions.json").read_text())
    for name, wrong in (("plain", 0), ("ours", 3)):
        rows = [
            {"question_id": id, "text": "wrong" if number < wrong else label["answer"]}
            for number, (id, label) in enumerate(labels.items())
        ]
        official.lines(tmp_path / f"{name}.jsonl", rows)
    code, said, err = cli("score", f"gqa:{tmp_path}", tmp_path / "plain.jsonl", tmp_path / "ours.jsonl")
    assert code == 0, err
    assert "-50.00, retention 50.0 %" in said
    code, said, _ = cli("score", f"gqa:{tmp_path}")
    assert "6 to be asked about 2 pictures; 6 have a label" in said
    code, said, _ = cli("eval", "--list", "--json")
    assert json.loads(said)["pope"]["metric"] == "mean F1"


def test_answers_know_what_a_type_is_worth(speaker, tmp_path):
    official.pope(tmp_path)
    suite = load_suite(f"pope:{tmp_path}")
    rows = Examiner(speaker, suite, Log(tmp_path / NAME), 64, PROTOCOLS["bare"])
    found: Answers = evaluate(rows, [])
    assert set(found.whole.by_type) == {"adversarial", "popular", "random"}
    assert found.whole.by_type["random"] == pytest.approx(found.whole.score)


def test_the_likelihood_of_an_answer(speaker):
    """With all tokens it is the model's own loss; the right answer is likelier than another, also compressed."""
    from visiontrim.core.registry import load_method
    from visiontrim.evaluate.asking import encode
    from visiontrim.evaluate.likelihood import likelihood

    seed, question, answer = official.pairs(("color",))[0]
    item = Item("1", "1", (official.scene(seed),), question, (answer,), "color")
    whole, greedy = likelihood(speaker, item, answer, load_method("random:keep=1.0"))
    assert greedy
    inputs = encode(speaker, [item])
    ids = speaker.processor.tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
    inputs["attention_mask"] = torch.ones(1, inputs["input_ids"].shape[1] + ids.shape[1], dtype=torch.long)
    length = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
    labels = inputs["input_ids"].clone()
    labels[:, :length] = -100
    with torch.inference_mode():
        expected = speaker.model(**{k: v for k, v in inputs.items() if k != "mm_token_type_ids"}, labels=labels).loss
    assert whole == pytest.approx(float(expected), abs=1e-5)
    ours = likelihood(speaker, item, answer, load_method("visiontrim:keep=64,variant=lean"))
    other = likelihood(speaker, item, "star", load_method("visiontrim:keep=64,variant=lean"))
    assert ours[0] < other[0]
    assert ours[1]
    assert not other[1]
    text = Item("2", "2", (), question, (answer,), "color")
    assert likelihood(speaker, text, answer, load_method("visiontrim:keep=64,variant=lean"))[0] > 0
