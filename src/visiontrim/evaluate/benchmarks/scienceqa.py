"""ScienceQA, test split (arXiv 2209.09513; data CC BY-NC-SA 4.0): multiple choice, half of it with a picture.

Papers print the accuracy on the questions with a picture, called IMG. LLaVA's file alone has all that the scores need;
``problems.json`` adds the breakdowns of the benchmark's own tool.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from visiontrim.core.errors import TrimError
from visiontrim.evaluate.benchmarks.base import (
    LETTER,
    LETTERS,
    LONG_ANSWER,
    Benchmark,
    Breakdown,
    Files,
    save_json,
    share,
    shares,
    with_options,
)
from visiontrim.evaluate.items import Item
from visiontrim.evaluate.records import Record, entries, read_list, read_object

QUESTIONS = "llava_test_CQM-A.json"
PROBLEMS, SPLITS = "problems.json", "pid_splits.json"
SAYS = re.compile(r"The answer is ([A-Z]).")
OPTION = re.compile(r"^[A-E]\. ", re.MULTILINE)


class ScienceQA(Benchmark):
    folders = ("scienceqa", "sqa")
    where = (
        f"{QUESTIONS} comes with LLaVA's eval.zip; {PROBLEMS}, {SPLITS} and the pictures images/test/ID/image.png with "
        "data/scienceqa of github.com/lupantech/ScienceQA"
    )
    unit = "problems"
    checked = "74.4 and IMG 71.6 of LLaVA-1.5-13B's published answers, restated independently"
    licence = "CC BY-NC-SA 4.0"
    max_new_tokens = LONG_ANSWER
    upload = "_result.json"
    missing_is_wrong = True

    def __init__(self, images_only: bool = False) -> None:
        self.images_only = images_only
        self.name = "scienceqa-img" if images_only else "scienceqa"
        self.title = "ScienceQA-IMG" if images_only else "ScienceQA"
        self.metric = "IMG accuracy" if images_only else "accuracy"
        self.papers = (
            "accuracy in % on the 2,017 questions with a picture; 66.8 (LLaVA) and 69.5 (compression) are of one "
            "checkpoint"
            if images_only
            else "accuracy in % on all 4,241 questions; tables of compression papers print scienceqa-img"
        )

    def read(self, files: Files) -> list[Item]:
        folder = files.pictures("images/test", "test", "images")
        asked = files.find(QUESTIONS)
        path = files.find(PROBLEMS) if asked is not None else files.need(PROBLEMS)
        problems = {} if path is None else dict(entries(path))
        if asked is not None:
            items = [_asked(row, problems, folder) for row in read_list(asked)]
        else:
            splits = files.need(SPLITS)
            ids = Record(read_object(splits), str(splits)).texts("test")
            if absent := [id for id in ids if id not in problems]:
                raise TrimError(f"problem {absent[0]} of {splits} is not in {path}: take both files from one release")
            items = [_built(id, problems[id], folder) for id in ids]
        return [item for item in items if item.sources] if self.images_only else items

    def notes(self, items: Sequence[Item]) -> list[str]:
        if any("subject" in item.facts for item in items):
            return []
        return [f"subjects, grades and topics need {PROBLEMS}"]

    def parse(self, item: Item, text: str) -> str:
        """The letter that is answered, "" where there is none."""
        if len(text) == 1 and text in LETTERS:
            return text
        if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
            return text[0]
        said = SAYS.findall(text)
        return said[0] if len(said) == 1 and said[0] in LETTERS[: item.facts["choices"]] else ""

    def breakdown(self, items: Sequence[Item], texts: Sequence[str]) -> Breakdown:
        right = [self.right(item, text) for item, text in zip(items, texts, strict=True)]
        seen = [bool(item.sources) for item in items]
        tables = {
            "all": {
                "accuracy": share(right),
                "IMG accuracy": share(value for value, has in zip(right, seen, strict=True) if has),
                "without a picture": share(value for value, has in zip(right, seen, strict=True) if not has),
            }
        }
        if all("subject" in item.facts for item in items):
            facts = [item.facts for item in items]
            context = ["no context" if not (f["hint"] or has) else None for f, has in zip(facts, seen, strict=True)]
            tables |= {
                "subject": shares([f["subject"] for f in facts], right),
                "context": shares(["text" if f["hint"] else None for f in facts], right)
                | shares(["image" if has else None for has in seen], right)
                | shares(context, right),
                "grades": shares(["1-6" if f["grade"] <= 6 else "7-12" for f in facts], right),
                "topic": shares([f["topic"] for f in facts], right),
            }
        return Breakdown(tables)

    def write(self, items: Sequence[Item], texts: Sequence[str], path: Path) -> list[str]:
        letters = [self.parse(item, text) for item, text in zip(items, texts, strict=True)]
        correct = sum(letter in item.answers for item, letter in zip(items, letters, strict=True))
        known = [item.facts["choices"] for item in items]
        index = [LETTERS[:count].find(letter) if letter else -1 for letter, count in zip(letters, known, strict=True)]
        value = {
            "acc": 100 * correct / max(len(items), 1),
            "correct": correct,
            "count": len(items),
            "results": {str(item.id): number for item, number in zip(items, index, strict=True)},
            "outputs": {str(item.id): text for item, text in zip(items, texts, strict=True)},
        }
        save_json(value, path, indent=2)
        return ["the benchmark's own tool reads its results"]


def _asked(row: Record, problems: dict[str, Record], folder: Path) -> Item:
    turns = row.many("conversations")
    if len(turns) < 2:
        raise row.error(f"it has {len(turns)} turns, where a question and its answer are expected")
    id, text, answer = row.text("id"), turns[0].text("value"), turns[1].text("value")
    if problems and id not in problems:
        raise row.error(f"problem {id} is not in {PROBLEMS}: take both files from one release")
    text = text.replace("<image>", "").strip()
    choices = len(OPTION.findall(text))
    if len(answer) != 1 or answer not in LETTERS[:choices]:
        raise row.error(f"the answer {answer!r} is no letter of its {choices} choices")
    image = row.text("image") if "image" in row else None
    return _item(id, text, answer, choices, image, problems.get(id), folder)


def _built(id: str, problem: Record, folder: Path) -> Item:
    choices, hint = problem.texts("choices"), problem.text("hint", default="")
    text = with_options((f"Context: {hint}\n" if hint else "") + problem.text("question"), choices)
    image = f"{id}/{problem.text('image')}" if "image" in problem else None
    answer = problem.whole("answer")
    if not 0 <= answer < len(choices):
        raise problem.error(f"answer {answer} is none of its {len(choices)} choices")
    return _item(id, text, LETTERS[answer], len(choices), image, problem, folder)


def _item(
    id: str, text: str, answer: str, choices: int, image: str | None, problem: Record | None, folder: Path
) -> Item:
    facts: dict[str, object] = {"choices": choices}
    if problem is not None:
        facts |= {name: problem.text(name) for name in ("subject", "topic")}
        facts |= {"hint": problem.text("hint", default=""), "grade": _grade(problem)}
    bare = OPTION.split(text)[0].strip().removeprefix("Context: ")
    return Item(
        id=id,
        group=str(id),
        sources=() if image is None else (str(folder / image),),
        question=f"{text}\n{LETTER}",
        bare=bare.split("\n")[-1],
        answers=(answer,),
        type="without a picture" if image is None else "IMG",
        facts=facts,
    )


def _grade(problem: Record) -> int:
    try:
        return int(problem.text("grade").removeprefix("grade"))
    except ValueError:
        raise problem.error(f"the grade {problem.text('grade')!r} is no number") from None
