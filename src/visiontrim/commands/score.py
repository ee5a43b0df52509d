"""``visiontrim score``: answers that are there already, by the official rules, without a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from visiontrim.commands.options import Json, check_file, console
from visiontrim.core.errors import TrimError

if TYPE_CHECKING:  # numpy and Pillow take their time to import: --help must not wait for them
    from visiontrim.evaluate.benchmarks.base import Benchmark

EPILOG = "Example:  visiontrim score pope:playground/data/eval answers.jsonl"

Upload = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the upload file of the first answers.")]
Grades = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A judge's grades (MM-Vet, open questions about videos); --judge adds to them."),
]
Judge = Annotated[
    str | None,
    typer.Option(metavar="URL", help="OpenAI-compatible server that grades, as http://host:8000/v1; needs --grades."),
]


def score(
    benchmark: Annotated[
        str, typer.Argument(metavar="BENCHMARK:ROOT", help="Its name, and the folder that eval.zip was unpacked into.")
    ],
    answers: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="ANSWERS",
            help="Answers in LLaVA's lines, or upload files; the others are compared with the first one. None: tells "
            "what is there.",
        ),
    ] = None,
    upload: Upload = None,
    grades: Grades = None,
    judge: Judge = None,
    judge_model: Annotated[str | None, typer.Option(metavar="NAME", help="Model of the judge.")] = None,
    judge_key: Annotated[Path | None, typer.Option(metavar="FILE", help="File that holds the judge's key.")] = None,
    judge_runs: Annotated[int, typer.Option(min=1, help="How often the judge grades an answer.")] = 1,
    partial: Annotated[bool, typer.Option("--partial", help="Score the questions that have an answer alone.")] = False,
    as_json: Json = False,
) -> None:
    """Score answers of any program by the rules of a benchmark, without a model."""
    from visiontrim.evaluate import judging, scoring
    from visiontrim.evaluate.benchmarks import open_benchmark

    chosen, files = open_benchmark(benchmark)
    if upload is not None:
        check_file(upload, "--upload", folder=not chosen.upload)  # MME's upload is a folder
    if grades is not None and judge is not None:
        check_file(grades, "--grades")
    paths = answers or []
    items = scoring.read_questions(chosen, files, paths)
    said: dict[str, Any] = {"benchmark": chosen.name, "papers": chosen.papers, "notes": chosen.notes(items)}
    if not paths and grades is not None and judge is None:  # grades are of answers that need not be here
        said["graded"] = {"file": str(grades), "tables": judging.tables(chosen, items, grades).tables}
        print(json.dumps(said)) if as_json else _shown(chosen, said)
        return
    if not paths:
        said |= {"questions": len(items), "groups": len({item.group for item in items}), "lacking": files.lacking}
        said |= {"labelled": sum(bool(item.answers) for item in items)}
        _told(chosen, said, as_json)
        return
    joined = [scoring.joined(chosen, items, path, partial) for path in paths]
    if upload is not None:
        notes = chosen.write(joined[0].items, joined[0].texts, upload)
        said["upload"] = {"file": str(upload), "notes": notes}
    if grades is not None or judge is not None:
        if grades is None:
            raise TrimError("--judge needs --grades FILE, where its grades are kept")
        if judge is not None:
            server = judging.Server(judge, judge_model, judge_key)
            judging.grade(chosen, joined[0], server, grades, judge_runs)
        said["graded"] = {"file": str(grades), "tables": judging.tables(chosen, joined[0].items, grades).tables}
    if any(item.answers for item in items) or not {"upload", "graded"} & said.keys():
        found = [scoring.score(chosen, files, one) for one in joined]
        said["scores"] = [one.to_dict(chosen, None if one is found[0] else found[0]) for one in found]
    if as_json:
        print(json.dumps(said))
        return
    _shown(chosen, said)


def _told(chosen: Benchmark, said: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(said))
        return
    about = f"{said['groups']:,} {chosen.unit}"
    print(f"{chosen.title}: {said['questions']:,} to be asked about {about}; {said['labelled']:,} have a label")
    print(f"papers print: {chosen.papers}\nrules checked on: {chosen.checked}\nlicence: {chosen.licence}")
    for line in (*said["notes"], *said["lacking"]):
        print(f"note: {line}")


def _shown(chosen: Benchmark, said: Mapping[str, Any]) -> None:
    scores = said.get("scores", [])
    for one in scores:
        asked = f"{one['questions']:,} answers to {one['groups']:,} {chosen.unit}"
        print(f"{chosen.title}, {chosen.metric}: {one['score']:.2f}{_ends(one['interval'])}; {asked}; {one['answers']}")
        if "difference" in one:
            share = "-" if one["retention"] is None else f"{100 * one['retention']:.1f} %"
            spread = _ends(one["retention_interval"], 100)
            change = f"{one['difference']:+.2f}{_ends(one['difference_interval'], sign='+')}"
            print(f"  beside {scores[0]['answers']}: {change}, retention {share}{spread}")
        for note in one["notes"]:
            print(f"  note: {note}")
    print(f"papers print: {chosen.papers}")
    for note in said["notes"]:
        print(f"note: {note}")
    if scores:
        show_tables(scores[0]["breakdown"])
    if "graded" in said:
        show_tables(said["graded"]["tables"])
    if "upload" in said:
        print("; ".join([said["upload"]["file"], *said["upload"]["notes"]]))


def show_tables(tables: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """A table for each way of cutting a score up."""
    for title, rows in tables.items():
        names = list(dict.fromkeys(name for row in rows.values() for name in row))
        table = Table("", title=title, title_justify="left")
        for name in names:
            table.add_column(name, justify="right")
        for name, row in rows.items():
            table.add_row(name, *(_number(column, row.get(column)) for column in names))
        console().print(table)


def _number(column: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if column in ("questions", "runs") else f"{value:.2f}"


def _ends(interval: list[float] | None, scale: float = 1.0, sign: str = "") -> str:
    if interval is None:
        return ""
    low, high = (format(scale * end, f"{sign}.2f") for end in interval)
    return f" ({low} to {high})"
