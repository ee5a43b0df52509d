"""A batch run: rows from files, answers that a bad row or a kill does not disturb, and refusals to mix runs."""

from __future__ import annotations

import json
import os
import sys

import pytest

from echo import Echo
from visiontrim import ask
from visiontrim.cli import main
from visiontrim.core.errors import TrimError
from visiontrim.serving import local
from visiontrim.serving.answerer import Answerer
from visiontrim.serving.answers import Partial
from visiontrim.serving.rows import Row, digest, read_rows
from visiontrim.zoo import held_out

SAMPLES = list(held_out(2))[:7]
RECIPE = {"method": "visiontrim", "keep": 64, "variant": "lean"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten rows about pictures, three of them bad."""
    path = tmp_path_factory.mktemp("rows")
    rows = []
    for number, sample in enumerate(SAMPLES):
        sample.image.save(path / f"{number}.png")
        rows.append({"id": f"r{number}", "image": f"{number}.png", "question": sample.question})
    (path / "broken.png").write_bytes(b"not a png")
    rows.insert(1, {"id": "broken", "image": "broken.png", "question": "what color is the C?"})
    rows.insert(4, {"id": "missing", "image": "nowhere.png", "question": "what color is the C?"})
    rows.insert(7, {"id": "words", "image": "0.png", "question": "what is this, a zebra?"})
    (path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def speaker():
    return ask.load(device="cpu")


@pytest.fixture(scope="module")
def answerer(speaker):
    return Answerer(speaker, RECIPE, max_new_tokens=3)


def said(*errors: str | None) -> list[dict]:
    return [{"id": n, "answer": None if error else "yes", "error": error} for n, error in enumerate(errors)]


def test_a_bad_row_spoils_only_itself(folder, speaker, answerer):
    rows = read_rows(folder / "in.jsonl")
    found = answerer(rows)
    assert [row["id"] for row in found] == [row.id for row in rows]
    errors = {row["id"]: row["error"] for row in found if row["error"] is not None}
    assert set(errors) == {"broken", "missing", "words"}
    assert "broken.png" in errors["broken"]
    assert "does not exist" in errors["missing"]
    assert "zebra" in errors["words"]
    alone = [ask.answer(speaker, [s.image], s.question, RECIPE, max_new_tokens=3).text for s in SAMPLES]
    good = [row for row in found if row["error"] is None]
    assert [row["answer"] for row in good] == alone
    assert {(row["tokens"], row["kept"]) for row in good} == {(576, 64)}


def test_what_fails_as_a_batch_is_asked_one_by_one(folder, speaker, answerer, monkeypatch):
    import visiontrim.serving.answerer as module

    whole = module.answers

    def spoiled(speaker, items, *arguments):
        if any(item.id == "r2" for item in items):
            raise RuntimeError("out of memory")
        return whole(speaker, items, *arguments)

    rows = [row for row in read_rows(folder / "in.jsonl") if row.id in ("r1", "r2", "r3")]
    expected = [row["answer"] for row in answerer(rows)]
    monkeypatch.setattr(module, "answers", spoiled)
    found = answerer(rows)
    assert [row["error"] for row in found] == [None, "RuntimeError: out of memory", None]
    assert [row["answer"] for row in found] == [expected[0], None, expected[2]]


def test_a_method_that_cannot_work_is_refused_before_the_rows(speaker):
    with pytest.raises(TrimError, match="layer"):
        Answerer(speaker, {"method": "fastv", "layer": 99})


def test_lines_that_are_no_rows_stay_rows(tmp_path):
    lines = ["{", "[1]", '{"image": "a.png"}', '{"question": "what?"}', "", '{"image": "a.png", "question": "what?"}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    rows = read_rows(tmp_path / "in.jsonl")
    assert [row.id for row in rows] == [1, 2, 3, 4, 6]
    assert [bool(row.error) for row in rows] == [True, True, True, True, False]
    assert rows[-1].source == str(tmp_path / "a.png")
    asked = read_rows(tmp_path / "in.jsonl", "how many?")
    assert [row.question for row in asked] == ["", "", "how many?", "", "what?"]


def test_a_folder_is_read_in_the_order_of_names(folder):
    rows = read_rows(folder, "what?")
    assert [row.id for row in rows] == [*(f"{n}.png" for n in range(len(SAMPLES))), "broken.png"]
    assert {row.question for row in rows} == {"what?"}


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("none.jsonl", "", "holds no rows"),
        ("twice.jsonl", '{"id": 1, "image": "a", "question": "b"}\n' * 2, "the id 1 twice"),
        ("rows.csv", "image,question", "neither a folder"),
    ],
)
def test_inputs_that_are_refused(tmp_path, name, content, match):
    (tmp_path / name).write_text(content)
    with pytest.raises(TrimError, match=match):
        read_rows(tmp_path / name)


def test_refused_where_it_is_missing_or_has_no_question(tmp_path):
    with pytest.raises(TrimError, match="does not exist"):
        read_rows(tmp_path / "nowhere.jsonl")
    with pytest.raises(TrimError, match="--question"):
        read_rows(tmp_path)


def test_digests_tell_rows_apart():
    rows = [Row(1, "a.png", "what?"), Row(2, "b.png", "what?")]
    others = [rows[::-1], rows[:1], [rows[0], Row(2, "b.png", "why?")], [rows[0], Row(2, "c.png", "what?")]]
    assert len({digest(rows), *map(digest, others)}) == 5


def test_a_torn_batch_is_asked_again_and_the_file_is_the_same(tmp_path):
    answers = {n: [{"id": f"{n}/{k}", "answer": "é", "error": None} for k in range(2)] for n in range(4)}
    whole = Partial(tmp_path / "whole", {"keep": 64}, [2] * 4)
    for number in (2, 0, 3, 1):
        whole.add(number, answers[number])
    assert whole.finish() == []
    assert not whole.path.exists()
    out = tmp_path / "killed"
    first = Partial(out, {"keep": 64}, [2] * 4)
    for number in (2, 0, 3):
        first.add(number, answers[number])
    first.close()
    os.truncate(first.path, first.path.stat().st_size - 7)
    second = Partial(out, {"keep": 64}, [2] * 4)
    assert second.todo() == [1, 3]
    for number in (3, 1):
        second.add(number, answers[number])
    second.finish()
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == [
        f"{n}/{k}" for n in range(4) for k in range(2)
    ]


def test_what_failed_is_asked_again_by_the_same_command(tmp_path):
    partial = Partial(tmp_path / "out", {}, [2, 1])
    partial.add(0, said(None, "no such file"))
    partial.add(1, said(None))
    assert [row["error"] for row in partial.finish()] == ["no such file"]
    partial.close()
    again = Partial(tmp_path / "out", {}, [2, 1])
    assert again.todo() == [0]
    again.add(0, said(None, None))
    assert again.finish() == []
    assert "no such file" not in (tmp_path / "out").read_text()


def test_runs_are_not_mixed(tmp_path):
    out = tmp_path / "out"
    running = Partial(out, {"keep": 64}, [1])
    with pytest.raises(TrimError, match="another process"):
        Partial(out, {"keep": 64}, [1])
    running.close()
    with pytest.raises(TrimError, match="with keep 64 where this one has 32"):
        Partial(out, {"keep": 32}, [1])
    running.path.write_text("something else\n")
    with pytest.raises(TrimError, match="no file of answers"):
        Partial(out, {"keep": 64}, [1])
    running.path.unlink()
    out.write_text("")
    with pytest.raises(TrimError, match="is there already"):
        Partial(out, {"keep": 64}, [1])


def test_workers_answer_every_batch_and_one_that_dies_is_told():
    found = dict(local.answered(Echo(), [["a"], ["b"], ["c"], ["d"]], [3, 0, 1], workers=2))  # pyright: ignore
    assert found == {3: [3, "d"], 0: [0, "a"], 1: [1, "b"]}
    with pytest.raises(TrimError, match=r"died as it answered batch 1 \(exit code 9"):
        list(local.answered(Echo(), [["a"], ["die"]], [1], workers=2))  # pyright: ignore


def test_the_command(folder, tmp_path, monkeypatch, capsys):
    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["visiontrim", "batch", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0), capsys.readouterr().err

    out = tmp_path / "answers.jsonl"
    options = ("--out", out, "--max-new-tokens", 3, "--batch-size", 4, "--device", "cpu")
    code, err = run(folder / "in.jsonl", "--keep", 64, *options)
    assert code == 1
    assert "10 rows, 3 failed" in err
    assert "the first that failed is 'broken'" in err
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in rows] == [row.id for row in read_rows(folder / "in.jsonl")]
    assert sum(row["error"] is None for row in rows) == 7
    code, err = run(folder / "in.jsonl", "--keep", 32, *options)
    assert code == 2
    assert "of another run, with method" in err
    code, err = run(folder / "in.jsonl", "--gpus", 1, "--out", tmp_path / "other.jsonl")
    assert code == 2
    assert "--runner ray" in err
