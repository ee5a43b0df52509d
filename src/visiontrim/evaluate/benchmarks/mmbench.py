"""MMBench 1.0 dev, in English and Chinese (arXiv 2307.06281; Apache-2.0): multiple choice, asked in every rotation.

The rotations are rows of the file, each with its own right letter, and are asked as they stand: none is made here,
since 53 questions are no plain rotations. A question counts if all of its rows are right (circular accuracy). Answers
are read by the official tool's rules as far as they need no judge; an answer that they cannot read is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from visiontrim.core.errors import TrimError
from visiontrim.evaluate.benchmarks.base import (
    LETTER,
    LETTER_CN,
    LONG_ANSWER,
    Benchmark,
    Breakdown,
    Files,
    Table,
    share,
    shares,
    with_options,
)
from visiontrim.evaluate.benchmarks.sheets import write_sheet
from visiontrim.evaluate.items import Embedded, Item, ratio
from visiontrim.evaluate.records import Record, Row, columns, read_table

ROTATION = 1_000_000
"""Rows with the same index modulo this are one question."""
REFERENCE = 64
"""A picture field of at most so many characters is the index of the row whose picture it shares."""
COLUMNS = ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
"""Of the upload, in this order."""
SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
REFUSALS = (
    "Failed to obtain answer via API",
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
"""Sentences that the official tool knows as refusals."""
IDEOGRAPH = re.compile("[\u4e00-\u9fff]")
SAYS = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([A-D])\**", re.IGNORECASE)


class MMBench(Benchmark):
    metric = "circular accuracy"
    unit = "questions, each with its rotations"
    papers = "circular accuracy in % on dev 20230712 (CN: 20231003)"
    licence = "Apache-2.0"
    max_new_tokens = LONG_ANSWER
    upload = ".xlsx"

    def __init__(self, chinese: bool = False) -> None:
        self.chinese = chinese
        self.suffix = LETTER_CN if chinese else LETTER
        self.name = "mmbench-cn" if chinese else "mmbench"
        self.title = "MMBench-CN" if chinese else "MMBench"
        self.folders = ("mmbench_cn", "mmbench") if chinese else ("mmbench",)
        self.tables = (
            ("mmbench_dev_cn_20231003.tsv", "MMBench_DEV_CN.tsv")
            if chinese
            else ("mmbench_dev_20230712.tsv", "mmbench_dev_en_20231003.tsv", "MMBench_DEV_EN.tsv")
        )
        self.where = f"{self.tables[0]} is on the download page of MMBench (opencompass.org.cn)"
        self.checked = (
            "nothing official but the prompt; the rule is that of MMBench"
            if chinese
            else "the circular rule on LLaVA-1.5-13B's published answers, single letters throughout"
        )

    def read(self, files: Files) -> list[Item]:
        path = files.need(*self.tables)
        place = columns(path).index("image") if "image" in columns(path) else None
        if place is None:
            raise TrimError(f"{path} has no column 'image': take {self.tables[0]} of the download page")
        rows = [_lightened(row) for row in read_table(path)]
        pictures = _pictures(path, rows, place)
        return [self._item(row.record, pictures[row.record.whole("index")]) for row, _ in rows]

    def from_upload(self, rows: Iterable[Record]) -> tuple[list[Item], list[str]]:
        """Questions and answers of an upload file, which holds options and right letters too."""
        found = [(self._item(row, None), row.text("prediction", default="")) for row in rows]
        return [item for item, _ in found], [text for _, text in found]

    def _item(self, row: Record, picture: Embedded | None) -> Item:
        index, options = row.whole("index"), _options(row)
        answer, hint, question = _cell(row, "answer"), _cell(row, "hint"), row.text("question")
        if answer and answer not in options:
            raise row.error(f"the answer {answer!r} is none of its options {', '.join(options)}")
        text = with_options(f"{hint}\n{question}" if hint else question, list(options.values()))
        number = index % ROTATION
        return Item(
            id=index,
            group=str(number),
            sources=() if picture is None else (picture,),
            question=f"{text}\n{self.suffix}",
            bare=question,
            answers=(answer,) if answer else (),
            type=_cell(row, "category") or "question",
            facts={
                "options": options,
                "rotated": index >= ROTATION,
                "l2": _cell(row, "l2-category"),
                "row": {name: row.fields.get(name) for name in COLUMNS if name in row},
            },
        )

    def notes(self, items: Sequence[Item]) -> list[str]:
        chinese = sum(IDEOGRAPH.search(item.bare or "") is not None for item in items)
        if self.chinese == (chinese > len(items) / 2):
            return []
        other = "mmbench" if self.chinese else "mmbench-cn"
        return [f"{chinese:,} of {len(items):,} questions are in Chinese: these look like the rows of {other}"]

    def parse(self, item: Item, text: str) -> str:
        return parse_choice(text, item.facts["options"])

    def counts(self, items: Sequence[Item], texts: Sequence[str]) -> Float[np.ndarray, "items 2"]:
        """Each question counts at its first row."""
        first: dict[str, int] = {}
        found = np.zeros((len(items), 2))
        for number, (item, text) in enumerate(zip(items, texts, strict=True)):
            if item.answers:
                place = first.setdefault(item.group, number)
                right = self.right(item, text)
                found[place] = (right if place == number else min(found[place, 0], right), 1)
        return found

    def value(self, sums: Float[np.ndarray, "*draws 2"]) -> Float[np.ndarray, "*draws"]:
        return self.top * ratio(sums[..., 0], sums[..., 1])

    def breakdown(self, items: Sequence[Item], texts: Sequence[str]) -> Breakdown:
        pairs = [(item, text) for item, text in zip(items, texts, strict=True) if item.answers]
        right = [self.right(item, text) for item, text in pairs]
        leaders = {item.group: item for item, _ in reversed(pairs)}
        leaders |= {item.group: item for item, _ in pairs if not item.facts["rotated"]}
        whole = dict.fromkeys(leaders, 1.0)
        for (item, _), value in zip(pairs, right, strict=True):
            whole[item.group] = min(whole[item.group], value)
        plain = [value for (item, _), value in zip(pairs, right, strict=True) if not item.facts["rotated"]]
        tables: dict[str, Table] = {
            "all": {
                "circular accuracy": share(whole.values()),
                "rows not rotated": share(plain),
                "all rows": share(right),
            }
        }
        if all(item.facts["l2"] for item in leaders.values()):
            tables["l2-category"] = shares([leaders[group].facts["l2"] for group in whole], list(whole.values()))
            tables["category"] = shares([leaders[group].type for group in whole], list(whole.values()))
        unread = sum(not self.parse(item, text) for item, text in pairs)
        note = f"{unread:,} of {len(pairs):,} answers name no option, which a judge might read: they count as wrong"
        return Breakdown(tables, (note,) if unread else ())

    def write(self, items: Sequence[Item], texts: Sequence[str], path: Path) -> list[str]:
        rows = [
            item.facts["row"] | {"index": item.id, "prediction": text} for item, text in zip(items, texts, strict=True)
        ]
        names = [name for name in COLUMNS if name in "ABCD" or any(name in row for row in rows)]
        return write_sheet(path, names, [[row.get(name) for name in names] for row in rows])


def parse_choice(text: str, options: Mapping[str, str]) -> str:
    """The letter that an answer names, "Z" for a refusal, "" for what only a judge could read."""
    return _letter(text, options) or _by_text(text, options)


def _lightened(row: Row) -> tuple[Row, str | None]:
    """The row without its picture, and the index in the place of the picture, if there is one."""
    image = row.record.text("image", default="")
    fields = {name: value for name, value in row.record.fields.items() if name != "image"}
    return Row(Record(fields, row.record.where), row.start, row.end), image if len(image) <= REFERENCE else None


def _pictures(path: Path, rows: Sequence[tuple[Row, str | None]], column: int) -> dict[int, Embedded]:
    """The picture of each index, its own or that of the row that it names."""
    own, shared = {}, {}
    for row, reference in rows:
        index = row.record.whole("index")
        if index in own or index in shared:
            raise row.record.error(f"the index {index} is there twice")
        if reference is None:
            own[index] = Embedded(path, row.start, row.end, column)
        else:
            shared[index] = Record({"image": reference or None}, row.record.where).whole("image")
    for index, other in shared.items():
        if other not in own:
            raise TrimError(
                f"{path}: row {index} shares the picture of row {other}, which has none: get a new copy of it"
            )
    return own | {index: own[other] for index, other in shared.items()}


def _options(row: Record) -> dict[str, str]:
    """Letters and texts, up to the first that is missing."""
    found: dict[str, str] = {}
    for letter in "ABCD":
        text = _cell(row, letter)
        if not text or text.lower() in ("nan", "none"):
            break
        found[letter] = text
    return found


def _cell(row: Record, name: str) -> str:
    """A field, "" where it is missing or says so (nan, none)."""
    text = row.text(name, default="")
    return "" if name == "hint" and text.lower() in ("nan", "none") else text


def _letter(text: str, options: Mapping[str, str]) -> str:
    if any(refusal in text for refusal in REFUSALS):
        return "Z"
    words = text.translate(SEPARATORS).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) >= len(words) - 4:
        return named[0]
    if not named and "Z" in words:
        return "Z"
    said = SAYS.search(text)
    return said[1].upper() if said and said[1].upper() in options else ""


def _by_text(text: str, options: Mapping[str, str]) -> str:
    text = text.lower()
    if len(text) > 2 * sum(map(len, options.values())):
        return ""
    named = [letter for letter, option in options.items() if option.lower() in text]
    return named[0] if len(named) == 1 else ""
