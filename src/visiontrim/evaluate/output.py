"""What an evaluation leaves in its folder: tables, a page, answers in LLaVA's lines, and upload files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visiontrim.core.errors import TrimError
from visiontrim.evaluate.asking import PLAIN, Cell, Examiner
from visiontrim.evaluate.benchmarks.base import Benchmark, save_json, save_lines, save_text
from visiontrim.evaluate.evaluation import CONTROLS, Block, preamble
from visiontrim.evaluate.evidence import evidence
from visiontrim.evaluate.examples import examples
from visiontrim.evaluate.frontier import frontier
from visiontrim.evaluate.report import Section, markdown, page, sections
from visiontrim.evaluate.scores import Answers

ANSWERS, UPLOADS, SCORES = "answers", "uploads", "scores.json"


@dataclass(frozen=True, slots=True)
class Written:
    """What was written, and what a command tells of it."""

    brief: str
    """The first table, as Markdown."""
    numbers: dict[str, Any]
    """All scores, ready for JSON."""
    files: tuple[Path, ...]


def write(
    folder: Path, command: str, examiner: Examiner, answers: Answers, blocks: Sequence[Block], illustrated: bool
) -> Written:
    """Write the report of an evaluation, and the answers of each of its cells.

    ``illustrated`` adds token maps of wins and losses of VisionTrim or, without it, of the first method. Raises
    :class:`TrimError` where a file cannot be written.
    """
    scored = [(block, block.scores(answers)) for block in blocks]
    found = []
    for block, scores in scored:
        found += [*sections(block, answers, scores), *frontier(block, scores), *evidence(block, answers)]
    block = blocks[0]
    if illustrated and block.main not in CONTROLS:
        found += examples(examiner, answers, Cell(block.main, block.keeps[-1]), Cell("random", block.keeps[-1]))
    _save_pictures(folder, found)
    title = f"{examiner.suite.name}, answered by {examiner.speaker.name}"
    text = preamble(answers, examiner, command)
    tables = folder / "table.md", folder / "report.html"
    save_text(markdown(title, text, found), tables[0])
    save_text(page(title, text, found), tables[1])
    left = [cell for cell in answers.rows if not answers.error(cell)]
    notes = [note for cell in left for note in save_answers(folder, examiner, answers, cell)]
    rows = [score.to_dict() for _, scores in scored for score in scores]
    numbers = {
        "suite": examiner.suite.name,
        "metric": answers.metric.metric,
        "protocol": str(examiner.protocol),
        "questions": len(answers.items),
        "labelled": answers.labelled,
        "groups": answers.groups,
        "notes": [*examiner.suite.notes, *dict.fromkeys(notes)],
        "plain": answers.whole.to_dict(),
        "scores": rows,
        "draws": [
            answers.score(cell).to_dict() for block in blocks for keep in block.keeps for cell in block.draws(keep)
        ],
    }
    save_json(numbers, folder / SCORES, indent=1)
    return Written(markdown(title, text, found[:1] if illustrated else found), numbers, (*tables, folder / ANSWERS))


def _save_pictures(folder: Path, found: Sequence[Section]) -> None:
    for section in found:
        if section.picture is not None:
            try:
                section.picture.save(folder / section.file)
            except OSError as error:
                raise TrimError(f"{folder / section.file} cannot be written ({error.strerror or error})") from error


def save_answers(folder: Path, examiner: Examiner, answers: Answers, cell: Cell) -> list[str]:
    """The answers of a cell in the order of the suite, as LLaVA writes them and as the benchmark wants them."""
    place = {item: number for number, item in enumerate(examiner.suite.items)}
    triples = sorted(
        zip(answers.items, answers.texts(cell), answers.lengths(cell), strict=True), key=lambda found: place[found[0]]
    )
    name = file_name(cell)
    rows = []
    for item, text, length in triples:
        asked = item.prompt or examiner.protocol.question(examiner.speaker, item)
        number = hashlib.sha256(f"{name}|{item.id}|{asked}|{text}".encode()).hexdigest()[:22]
        rows.append(
            {
                "question_id": item.id,
                "prompt": asked,
                "text": text,
                "answer_id": number,
                "model_id": f"{examiner.speaker.name}, {name}",
                "metadata": {"tokens": length},
            }
        )
    _made(folder / ANSWERS)
    save_lines(rows, folder / ANSWERS / f"{name}.jsonl")
    benchmark = examiner.suite.metric
    if not isinstance(benchmark, Benchmark):
        return []
    _made(folder / UPLOADS)
    items, texts = [item for item, _, _ in triples], [text for _, text, _ in triples]
    return benchmark.write(items, texts, folder / UPLOADS / f"{name}{benchmark.upload}")


def file_name(cell: Cell) -> str:
    """A name of a file that is this cell's alone."""
    text = "plain" if cell == Cell(PLAIN, None) else f"{cell.method}-{cell.keep}"
    plain = re.sub(r"[^A-Za-z0-9._=-]+", "-", text)
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:4]}"


def _made(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise TrimError(f"{folder} cannot be made ({error.strerror or error})") from error
