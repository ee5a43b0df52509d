"""Files of questions: of all kinds, right and wrong, and how a question is put."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import official
from visiontrim.ask import Speaker, load
from visiontrim.core.errors import TrimError
from visiontrim.evaluate.asking import Examiner
from visiontrim.evaluate.evaluation import evaluate
from visiontrim.evaluate.files import read_items
from visiontrim.evaluate.items import Item
from visiontrim.evaluate.log import NAME, Log
from visiontrim.evaluate.protocol import PROTOCOLS, SYSTEM, protocol, square
from visiontrim.evaluate.suites import check_pictures, load_suite


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    return load(device="cpu")


@pytest.fixture
def questions(tmp_path) -> Path:
    return official.two_questions(tmp_path)


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


def test_a_question_without_an_answer_has_no_label(speaker, questions, tmp_path):
    suite = load_suite(str(questions))
    assert [item.answers for item in suite.items][1] == (), "null is no answer 'None'"
    found = evaluate(Examiner(speaker, suite, Log(tmp_path / NAME), 8), [])
    assert (found.labelled, len(found.items)) == (1, 2), "one line without an answer costs no other its label"
    assert found.whole.score == 100.0


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
