"""The official rules on made files: worked examples, scores by hand, uploads, and mistakes in one sentence."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

import official
from visiontrim.core.errors import TrimError
from visiontrim.evaluate.benchmarks import list_benchmarks, open_benchmark
from visiontrim.evaluate.benchmarks.base import LETTER, LETTER_CN, SHORT, UNANSWERABLE, bare_of
from visiontrim.evaluate.benchmarks.mmvet import read_grades
from visiontrim.evaluate.benchmarks.sheets import read_sheet, write_sheet
from visiontrim.evaluate.benchmarks.vqa_text import CONTRACTIONS, MARKS, accuracy, vqa_script_text, vqa_text
from visiontrim.evaluate.given import join, read_given
from visiontrim.evaluate.items import Item
from visiontrim.evaluate.scoring import read_questions, score


@pytest.fixture
def read(tmp_path):
    """A benchmark, its files and its questions, from made files."""

    def run(name: str):
        official.WRITERS[name](tmp_path)
        benchmark, files = open_benchmark(f"{name}:{tmp_path}")
        return benchmark, files, benchmark.read(files)

    return run


def given(path: Path, items: list[Item], texts: list[str]) -> Path:
    """Answers in LLaVA's lines."""
    pairs = zip(items, texts, strict=True)
    official.lines(path, [{"question_id": i.id, "prompt": i.question, "text": t, "metadata": {}} for i, t in pairs])
    return path


def parse(name: str, text: str, **facts: object) -> str:
    benchmark = list_benchmarks()[name]
    return benchmark.parse(Item("1", "1", (), "", (), "question", facts=facts), text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("08/13/2011", "08 13 2011"),
        ("Macy's", "macy 's"),
        ("A Fine, Fine School", "fine fine school"),
        ("Yes.", "yes"),
        ("3.5 m", "3.5 m"),
        ("No. 5.", "no 5"),
        ("ten - four", "10 4"),
        ("blue-green", "blue green"),
        ("what?no", "whatno"),
        ("dont\tthe", "don't"),
        ("none", "0"),
        ("an", ""),
    ],
)
def test_the_text_rule(text, expected):
    assert vqa_text(text) == expected


def test_the_tables_of_the_text_rule():
    assert len(MARKS) == len(set(MARKS)) == 21
    assert len(CONTRACTIONS) == 120
    assert CONTRACTIONS["somebody'd"] == "somebodyd"
    assert vqa_script_text("1,000 / 2") == "1000  2".replace("  ", " "), "a comma between digits deletes all marks"
    assert vqa_text("." * 40) == "." * 8, "32 full stops go: a flag stands where a count belongs"
    assert [round(accuracy("a", ["a"] * k + ["b"] * (10 - k)), 9) for k in range(5)] == [0, 0.3, 0.6, 0.9, 1]
    assert accuracy("a", []) == 0.0


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("gqa", "Yes..", "yes"),
        ("gqa", "the cat", "the cat"),
        ("pope", "No, there is none. Yes", "no"),
        ("pope", "It is not there", "no"),
        ("pope", "nothing", "yes"),
        ("pope", "", "yes"),
        ("pope", "Yes. No", "yes"),
        ("pope", "NO", "yes"),
        ("mme", "Yes", "yes"),
        ("mme", "No, it", "no"),
        ("mme", "I'd say yes", "other"),
        ("mme", "a no", "no"),
    ],
)
def test_what_answers_say(name, text, expected):
    assert parse(name, text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        ("b", ""),
        ("B.", ""),
        ("B. green", "B"),
        ("The answer is C.", "C"),
        ("The answer is C", ""),
        ("The answer is E.", ""),
        ("The answer is A. The answer is B.", ""),
        ("E", "E"),
    ],
)
def test_what_answers_to_scienceqa_say(text, expected):
    assert parse("scienceqa", text, choices=3) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A", "A"),
        ("(B)", "B"),
        ("C.", "C"),
        ("A cat sat on the mat", ""),
        ("A or B", ""),
        ("Z", "Z"),
        ("Sorry, I can't help with images of people yet.", "Z"),
        ("It is a green hill", "B"),
        ("It is a green hill and a blue sky", ""),
        ("I believe after a very long look at all of it that it must be a green hill", ""),
        ("A: I think that the answer is C and no other one", "C"),
        ("D", ""),
        ("I would choose B", "B"),
    ],
)
def test_what_answers_to_mmbench_say(text, expected):
    assert parse("mmbench", text, options={"A": "red", "B": "green hill", "C": "blue sky"}) == expected


def test_gqa(read, tmp_path):
    benchmark, files, items = read("gqa")
    assert items[0].question.endswith(f"\n{SHORT}")
    assert items[0].sources == (str(tmp_path / "gqa" / "data" / "images" / f"{items[0].group}.jpg"),)
    texts = [item.answers[0].title() + "." for item in items]
    texts[0] = "wrong"
    assert benchmark.score(items, texts) == pytest.approx(100 * (1 - 1 / len(items)))
    tables = benchmark.breakdown(items, texts).tables
    assert set(tables["kind of answer"]) == {"open", "binary"}
    assert tables["steps of reasoning"]["1"] == pytest.approx(
        {"accuracy": 100 * (1 - 1 / len(items)), "questions": len(items)}
    )
    grouped = [i.answers[0] for i in items if i.facts["group"]]
    assert tables["distribution, lower is better"]["distribution"]["value"] == 0.0, len(grouped)
    lost = grouped[0]
    swapped = ["wrong" if i.facts["group"] and i.answers[0] == lost else i.answers[0] for i in items]
    expected = grouped.count(lost) / 100  # (0 - n)^2 / n, one group
    tables = benchmark.breakdown(items, swapped).tables
    assert tables["distribution, lower is better"]["distribution"]["value"] == pytest.approx(expected)
    benchmark.write(items, texts, tmp_path / "up.json")
    assert json.loads((tmp_path / "up.json").read_text())[0] == {"questionId": items[0].id, "prediction": "wrong"}
    (tmp_path / "gqa" / "llava_gqa_testdev_balanced.jsonl").unlink()
    built = benchmark.read(files)
    assert [(i.id, i.question, i.sources, i.answers) for i in built] == [
        (i.id, i.question, i.sources, i.answers) for i in items
    ]


def test_scienceqa_has_two_columns(read, tmp_path):
    benchmark, files, items = read("scienceqa")
    assert items[0].question.startswith("Context: It is a drawing.\nwhat")
    assert items[0].question.endswith(f"\nC. blue sky\n{LETTER}")
    assert not items[1].sources
    assert not benchmark.notes(items)
    texts = ["B" if item.sources else "D" for item in items]
    assert benchmark.score(items, texts) == pytest.approx(50.0)
    tables = benchmark.breakdown(items, texts).tables
    assert tables["all"]["IMG accuracy"]["accuracy"] == 100.0
    assert tables["context"]["text"]["questions"] == 1
    assert tables["grades"]["1-6"]["questions"] == 2
    only, _ = open_benchmark(f"scienceqa-img:{tmp_path}")
    seen = only.read(files)
    assert len(seen) * 2 == len(items)
    assert only.score(seen, ["B"] * len(seen)) == 100.0
    benchmark.write(items, texts, tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["correct"], result["count"], result["results"]["1"], result["results"]["2"]) == (3, 6, 1, -1)
    again = join(benchmark, items, read_given(tmp_path / "result.json"), tmp_path / "result.json")
    assert again.texts == tuple(texts), "the result file reads as answers, too"
    (tmp_path / "scienceqa" / "llava_test_CQM-A.json").unlink()
    assert [i.question for i in benchmark.read(files)] == [i.question for i in items]
    (tmp_path / "scienceqa" / "problems.json").unlink()
    with pytest.raises(TrimError, match=r"ScienceQA lacks problems.json \(looked for in .*github.com/lupantech"):
        benchmark.read(files)


def test_textvqa_with_and_without_ocr_tokens(read, tmp_path):
    benchmark, files, items = read("textvqa")
    lines = items[0].question.split("\n")
    assert lines[1:] == ["Reference OCR token: ", SHORT]
    assert items[1].question.split("\n")[1] == "Reference OCR token: STOP, 2"
    assert "1 of 4 questions have no OCR tokens" in benchmark.notes(items)[0]
    assert benchmark.score(items, [f"The {item.answers[0]}!" for item in items]) == 100.0
    without, _ = open_benchmark(f"textvqa-no-ocr:{tmp_path}")
    assert [i.question for i in without.read(files)] == [f"{i.bare}\n{SHORT}" for i in items]
    assert "without OCR" in without.metric
    twin = items[0].group
    assert sum(item.group == twin for item in items) == 2, "question ids are those of pictures, and repeat"
    path = given(tmp_path / "a.jsonl", items, [item.answers[0] for item in items])
    assert score(benchmark, files, join(benchmark, items, read_given(path), path)).sample.value == 100.0


def test_pope_joins_by_picture_and_question(read, tmp_path):
    benchmark, files, items = read("pope")
    texts = ["Yes"] * len(items)
    number = len(items) // 3
    yes = sum(i.answers[0] == "yes" for i in items) // 3
    f1 = 2 * yes / (2 * yes + number - yes)
    assert benchmark.score(items, texts) == pytest.approx(100 * f1)
    row = benchmark.breakdown(items, texts).tables["category"]["random"]
    assert row["recall"] == row["yes ratio"] == 100.0
    assert row["accuracy"] == row["precision"] == pytest.approx(100 * yes / number)
    nothing = benchmark.breakdown(items, ["no"] * len(items)).tables["category"]["mean"]
    assert (nothing["F1"], nothing["precision"], nothing["yes ratio"]) == (0, 0, 0), "zero denominators give 0"
    (tmp_path / "pope" / "llava_pope_test.jsonl").unlink()
    assert [(i.id, i.answers) for i in benchmark.read(files)] == [(i.id, i.answers) for i in items]
    official.pope(tmp_path, later=True)
    with pytest.raises(TrimError, match=f"1 of {number} random questions .* two versions of POPE; .* e3e3926"):
        benchmark.read(files)


def test_mmbench_asks_every_row_as_it_stands(read, tmp_path):
    benchmark, files, items = read("mmbench")
    assert items[0].question == (
        f'Two "lines"\nof a hint\n{items[0].bare}\nA. hills\nB. {items[0].facts["options"]["B"]}\nC. sky\n{LETTER}'
    )
    assert len(items) == 3 * 6 - 1, "one question has no third rotation, and none is made"
    assert items[1].pictures()[0].size == items[0].pictures()[0].size == (192, 192)
    right = [item.answers[0] for item in items]
    assert benchmark.score(items, right) == 100.0
    texts = list(right)
    texts[1] = "Z"  # one row of a question wrong: the question is
    tables = benchmark.breakdown(items, texts).tables
    assert tables["all"]["circular accuracy"] == {"accuracy": pytest.approx(100 * 5 / 6), "questions": 6}
    assert tables["all"]["rows not rotated"] == {"accuracy": 100.0, "questions": 6}
    assert tables["all"]["all rows"]["accuracy"] == pytest.approx(100 * 16 / 17)
    assert benchmark.score(items, texts) == pytest.approx(100 * 5 / 6)
    texts[0] = "=1+\x0b1"
    notes = benchmark.write(items, texts, tmp_path / "up.xlsx")
    assert notes == ["1 control characters, which no cell may hold, were removed"]
    rows = list(read_sheet(tmp_path / "up.xlsx"))
    assert list(rows[0].fields) == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert rows[0].fields["prediction"] == "=1+1", "an answer is no formula"
    assert rows[0].fields["index"] == items[0].id
    (tmp_path / "mmbench" / "mmbench_dev_20230712.tsv").unlink()
    uploaded = read_questions(benchmark, files, [tmp_path / "up.xlsx"])
    joined = join(benchmark, uploaded, read_given(tmp_path / "up.xlsx"), tmp_path / "up.xlsx")
    assert score(benchmark, files, joined).sample.value == pytest.approx(100 * 5 / 6), "an upload file is enough"


def test_mmbench_cn_ends_in_chinese_and_takes_its_own_table(tmp_path):
    official.mmbench(tmp_path)
    benchmark, files = open_benchmark(f"mmbench-cn:{tmp_path}")
    with pytest.raises(TrimError, match="mmbench_dev_cn_20231003"):
        benchmark.read(files)
    official.mmbench(tmp_path, chinese=True)
    benchmark, files = open_benchmark(f"mmbench-cn:{tmp_path}")
    items = benchmark.read(files)
    assert items[0].question.endswith(f"\n{LETTER_CN}")
    assert benchmark.notes(items) == ["0 of 17 questions are in Chinese: these look like the rows of mmbench"]
    assert benchmark.notes([dataclasses.replace(item, bare="图中有什么?") for item in items]) == []
    english = list_benchmarks()["mmbench"]
    assert english.notes(items) == []
    assert "rows of mmbench-cn" in english.notes([dataclasses.replace(item, bare="图中有什么?") for item in items])[0]


def test_seed_image_is_not_seed(read, tmp_path):
    benchmark, files, items = read("seed")
    assert [item.id for item in items] == [1, 1, 2, 3, 4, "v1"], "one id occurs twice"
    texts = ["B", "B", "B", "B", "b", "A"]
    assert benchmark.score(items, texts) == pytest.approx(100 * 4 / 6), "nothing is parsed"
    tables = benchmark.breakdown(items, texts).tables
    assert tables["all"]["image"]["accuracy"] == 80.0
    assert tables["all"]["video"]["accuracy"] == 0.0
    only, _ = open_benchmark(f"seed-image:{tmp_path}")
    assert only.score(only.read(files), texts[:5]) == 80.0
    assert only.metric == "image accuracy"
    benchmark.write(items, texts, tmp_path / "up.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "up.jsonl").read_text().splitlines()]
    assert rows[0] == {"question_id": "1", "prediction": "B"}
    path = given(tmp_path / "a.jsonl", items[1:], texts[1:])
    joined = join(benchmark, items, read_given(path), path)
    assert score(benchmark, files, joined).sample.value == pytest.approx(50.0)
    assert "count as wrong" in joined.notes[0]
    (tmp_path / "seed_bench" / "llava-seed-bench.jsonl").unlink()
    assert [i.question for i in benchmark.read(files)] == [i.question for i in items]
    assert [i.sources for i in benchmark.read(files)] == [i.sources for i in items]


def test_mm_vet_has_no_score_without_grades(read, tmp_path):
    benchmark, _, items = read("mm-vet")
    assert "not MM-Vet's score" in benchmark.metric
    first = items[0]
    answer = vqa_text(first.answers[0].split(" <AND>")[0])
    assert benchmark.right(first, f"I see {answer} there") == 1.0
    assert benchmark.right(first, "nothing") == 1.0, "any alternative suffices"
    other = Item(0, "0", (), "", ("apple <AND> pear",), "question")
    assert benchmark.right(other, "An apple.") == 0.5
    benchmark.write(items, ["a"] * len(items), tmp_path / "r.json")
    assert (tmp_path / "r.json").read_text().startswith('{\n  "v1_0": "a",')
    grades = {f"v1_{n}": {"model": ["m"] * 2, "content": ["1", "0"], "score": [1.0, n % 2]} for n in range(len(items))}
    official.save(tmp_path / "g.json", grades)
    tables = benchmark.grades(items, read_grades(tmp_path / "g.json")).tables
    assert tables["all"]["total"] == {"total": 75.0, "std": 25.0, "runs": 2, "questions": len(items)}
    assert tables["capability"]["math"]["total"] == 50.0
    assert tables["combination"]["rec_ocr"] == {"total": 100.0, "std": 0.0, "runs": 2, "questions": 3}
    swapped = [dataclasses.replace(i, facts=i.facts | {"capability": i.facts["capability"][::-1]}) for i in items[::-1]]
    tables = benchmark.grades([*items, *swapped], read_grades(tmp_path / "g.json")).tables
    assert tables["combination"]["rec_ocr"]["questions"] == 6, "a set of capabilities has no order"
    assert "ocr_rec" not in tables["combination"]
    del grades["v1_0"]
    official.save(tmp_path / "g.json", grades)
    with pytest.raises(TrimError, match="1 of 6 questions have no grade, the first is v1_0"):
        benchmark.grades(items, read_grades(tmp_path / "g.json"))


def test_vqav2_and_vizwiz_uploads(read, tmp_path):
    benchmark, _, items = read("vqav2")
    assert benchmark.score(items, ["x"] * len(items)) is None
    benchmark.write(items, ["The 08/13"] * len(items), tmp_path / "up.json")
    rows = json.loads((tmp_path / "up.json").read_text())
    assert rows[:2] == [{"question_id": 1, "answer": ""}, {"question_id": items[0].id, "answer": "08 13"}]
    benchmark, _, items = read("vizwiz")
    assert items[0].question == f"{items[0].bare}\n{UNANSWERABLE}\n{SHORT}"
    texts = ["Macy's", *map(str, range(1, len(items)))]
    benchmark.write(items, texts, tmp_path / "up.json")
    assert json.loads((tmp_path / "up.json").read_text())[0] == {
        "image": "VizWiz_test_00000000.jpg",
        "answer": "macy 's",
    }
    joined = join(benchmark, items, read_given(tmp_path / "up.json"), tmp_path / "up.json")
    assert joined.texts == tuple(benchmark.parse(item, text) for item, text in zip(items, texts, strict=True))


def test_the_val_splits_of_vqav2_and_vizwiz(read):
    benchmark, _, items = read("vqav2-val")
    assert benchmark.score(items, [item.answers[1] for item in items]) == 100.0
    same = Item(1, "1", (), "", ("the one",) * 10, "other")
    assert benchmark.right(same, "1") == 0.0, "where all references are equal nothing is normalised"
    assert benchmark.right(Item(1, "1", (), "", ("the one",) * 9 + ("x",), "other"), "1") == 1.0
    benchmark, _, items = read("vizwiz-val")
    assert benchmark.score(items, [f"the {item.answers[0]}" for item in items]) == 100.0


def test_mme_scores_questions_and_pictures(read, tmp_path):
    benchmark, files, items = read("mme")
    assert len({item.group for item in items}) == 4
    texts = [item.answers[0] for item in items]
    assert benchmark.score(items, texts) == 2 * 200.0
    wrong = {"yes": "no", "no": "yes"}
    texts[0] = wrong[texts[0]]
    assert benchmark.score(items, texts) == pytest.approx(200 + 75 + 50)
    tables = benchmark.breakdown(items, texts).tables
    assert tables["category"]["existence"] == {"score": 125.0, "accuracy": 75.0, "accuracy+": 50.0, "questions": 4}
    assert set(tables["all"]) == {"perception"}
    only, _ = open_benchmark(f"mme-perception:{tmp_path}")
    assert (only.top, benchmark.top) == (2000.0, 2800.0)
    benchmark.write(items, ["Yes\tsir"] * len(items), tmp_path / "up")
    line = (tmp_path / "up" / "artwork.txt").read_text().splitlines()[0].split("\t")
    assert line[0].endswith(".jpg")
    assert line[1].endswith("?  Please answer yes or no.")
    assert line[2] in ("Yes", "No")
    assert line[3] == "Yes sir"
    first, second = [items[k] for k in range(len(items)) if items[k].type == "artwork"][::2]
    mixed = [first, second, *(i for i in items if i.type == "artwork" and i not in (first, second))]
    benchmark.write(mixed, ["a"] * len(mixed), tmp_path / "mixed")
    names = [line.split("\t")[0] for line in (tmp_path / "mixed" / "artwork.txt").read_text().splitlines()]
    assert names[::2] == names[1::2], "the official tool takes two lines in a row for one picture"
    (tmp_path / "up" / "artwork.txt").write_text("a.jpg\tWhat?\tYes\n")
    with pytest.raises(
        TrimError, match=r"artwork\.txt, line 1: it has 3 fields, where picture, question, right answer"
    ):
        read_given(tmp_path / "up")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrimError, match=r"empty holds no answers: .* a CATEGORY\.txt for each"):
        read_given(tmp_path / "empty")
    (tmp_path / "MME" / "llava_mme.jsonl").unlink()
    built = benchmark.read(files)
    assert {(i.group, i.question, i.answers) for i in built} == {(i.group, i.question, i.answers) for i in items}


def test_videos(read, tmp_path):
    benchmark, _, items = read("msvd-qa")
    assert len(items[0].pictures()) == 8, "two frames, each four times"
    assert benchmark.score(items, [f"the {item.answers[0]}" for item in items]) == 100.0
    held = benchmark.breakdown(items, [f"it is {item.answers[0]} now" for item in items]).tables["all"]
    assert (held["exact match"]["accuracy"], held["containment"]["accuracy"]) == (0.0, 100.0)
    grades = {item.id: (number % 2 == 0, 4.0) for number, item in enumerate(items)}
    assert benchmark.grades(items, grades).tables["judged"]["all"] == {"accuracy": 50.0, "score": 4.0, "questions": 6}
    benchmark, files, items = open_and_read(f"mvbench:{tmp_path}")
    assert (
        items[0].question
        == f"Question:{items[0].bare}\nOption:\n(A) hills\n(B) {answer_of(items[0])}\nOnly give the best option."
    )
    assert benchmark.score(items, ["(B)"] * 3 + ["A"] * 3) == 50.0, "the mean of two tasks"
    assert "action_antonym" in files.lacking[0]
    benchmark, _, items = open_and_read(f"videomme-subtitles:{tmp_path}")
    assert items[0].question.startswith("This video's subtitles are listed below:\nLook!\nSelect the best answer")
    assert benchmark.score(items, ["The best answer is: B."] * 6) == 100.0
    assert benchmark.score(items, ["no idea"] * 6) == 0.0


def open_and_read(text: str):
    benchmark, files = open_benchmark(text)
    return benchmark, files, benchmark.read(files)


def answer_of(item: Item) -> str:
    return item.question.split("(B) ")[1].split("\n")[0]


@pytest.mark.parametrize("name", official.WRITERS)
def test_answers_in_llavas_lines_come_back(name, read, tmp_path):
    """Written, read and joined again they are the same answers; without their labels all benchmarks still read."""
    benchmark, _files, items = read(name)
    assert len(items) >= 3
    assert all((item.bare or item.question) in item.question for item in items)
    texts = [f"answer {number}" for number in range(len(items))]
    path = given(tmp_path / "answers.jsonl", items, texts)
    joined = join(benchmark, items, read_given(path), path)
    assert joined.texts == tuple(texts)
    assert all(Path(str(getattr(s, "path", s))).exists() for i in items for s in i.sources)


def test_answers_to_other_questions_are_no_score(read, tmp_path):
    benchmark, _, items = read("gqa")
    path = given(tmp_path / "a.jsonl", items, ["x"] * len(items))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["prompt"] = "who is it?"
    official.lines(path, rows)
    with pytest.raises(
        TrimError, match=r"1 of 6 answers .* other questions than GQA asks: to 000000001 it was asked 'who"
    ):
        join(benchmark, items, read_given(path), path)
    official.lines(path, rows[:1])
    with pytest.raises(TrimError, match="answers 1 of 6 questions; 000000001 is the first that it lacks: --partial"):
        join(benchmark, items, read_given(path), path)
    assert len(join(benchmark, items, read_given(path), path, partial=True).items) == 1
    official.lines(path, [{"question_id": "no", "text": "x"}])
    with pytest.raises(TrimError, match="none of the 1 answers"):
        join(benchmark, items, read_given(path), path)


def test_a_question_that_is_part_of_another_has_its_own_answer(read, tmp_path):
    """Two questions share an id; the answer to the longer one comes first and holds the words of the shorter."""
    benchmark, _, items = read("textvqa")
    short, long = (
        dataclasses.replace(items[0], bare=text, question=f"{text}\n{SHORT}")
        for text in ("what is it", "what is it in")
    )
    path = given(tmp_path / "a.jsonl", [long, short], ["long", "short"])
    assert join(benchmark, [short, long], read_given(path), path).texts == ("short", "long")


def test_the_right_answer_in_an_upload_is_no_answer(read, tmp_path):
    """Uploads of Video-MME hold both; read back they score what was answered."""
    benchmark, files, items = read("videomme")
    benchmark.write(items, ["A"] * len(items), tmp_path / "up.json")
    joined = join(benchmark, items, read_given(tmp_path / "up.json"), tmp_path / "up.json")
    assert score(benchmark, files, joined).sample.value == 0.0


def spoil(path: Path, how: str) -> None:
    text = path.read_bytes()
    if how == "cut off":
        path.write_bytes(text[: len(text) * 2 // 3])
    elif how == "not UTF-8":
        path.write_bytes(text.replace(b'"', b"\xff", 1))
    elif how == "numbers":
        path.write_text("[1, 2]")
    elif how == "null":
        path.write_text("null")
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


@pytest.mark.parametrize("name", sorted(set(official.WRITERS) - {"scienceqa-img", "textvqa-no-ocr", "seed-image"}))
def test_wrong_files_are_one_sentence(name, tmp_path):
    """Every file of every benchmark, spoilt in every way: an error that names a file, or questions as before."""
    official.WRITERS[name](tmp_path)
    files = [path for path in tmp_path.rglob("*.[jt]s*") if path.suffix in (".json", ".jsonl", ".tsv")]
    benchmark, opened = open_benchmark(f"{name}:{tmp_path}")
    whole = len(benchmark.read(opened))
    for path, how in itertools.product(files, ("cut off", "not UTF-8", "numbers", "null", "empty", "missing")):
        text, told = path.read_bytes(), ""
        spoil(path, how)
        benchmark, opened = open_benchmark(f"{name}:{tmp_path}")
        try:
            read = len(benchmark.read(opened))
        except TrimError as error:
            read, told = whole, str(error)
        assert read in (0, whole) or how in ("cut off", "missing"), (path, how)
        assert "\n" not in told
        assert not told or path.name in told or how == "missing", told
        path.write_bytes(text)


def test_sheets_without_openpyxl_are_csv(tmp_path, monkeypatch):
    monkeypatch.setattr("visiontrim.evaluate.benchmarks.sheets._openpyxl", lambda: None)
    notes = write_sheet(tmp_path / "up.xlsx", ["index", "text"], [[1, "two\nlines"]])
    assert "up.csv instead of .xlsx, which needs openpyxl" in notes[0]
    with (tmp_path / "up.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["index", "text"], ["1", "two\nlines"]]
    assert [dict(row.fields) for row in read_sheet(tmp_path / "up.csv")] == [{"index": "1", "text": "two\nlines"}]


def test_intervals_of_what_is_no_mean(read, tmp_path):
    """F1, circular accuracy and MME's sum are computed of each draw of groups: against a plain loop."""
    from visiontrim.evaluate.bootstrap import resample

    random = np.random.default_rng(1)
    for name in ("pope", "mmbench", "mme"):
        benchmark, _, items = read(name)
        items = [
            Item(f"{k}/{i.id}", f"{k}/{i.group}", i.sources, i.question, i.answers, i.type, facts=i.facts)
            for k in range(8)
            for i in items
        ]
        texts = [item.answers[0] if random.random() < 0.7 else "no" for item in items]
        names = list(dict.fromkeys(item.group for item in items))
        groups = np.array([names.index(item.group) for item in items])
        sample = resample(benchmark, benchmark.counts(items, texts), groups)
        drawn = np.random.default_rng(0).integers(0, len(names), (100, len(names)))[:5]
        for number, draw in enumerate(drawn):
            chosen, said = [], []
            for copy, group in enumerate(draw):
                for item, text in zip(items, texts, strict=True):
                    if item.group == names[group]:
                        chosen.append(Item(item.id, f"{copy}", (), "", item.answers, item.type, facts=item.facts))
                        said.append(text)
            assert sample.draws[number] == pytest.approx(benchmark.score(chosen, said)), name


def test_the_question_alone():
    assert bare_of(f"What is it?\n{SHORT}") == "What is it?"
    assert bare_of(f"What is it?\nA. one\nB. two\n{LETTER}") == "What is it?"
    assert bare_of(f"What?\nReference OCR token: a, b\n{SHORT}") == "What?"
    assert bare_of(SHORT) == SHORT
