"""Tables that spreadsheets read: .xlsx by openpyxl, which is an extra, and .csv."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from visiontrim.core.errors import TrimError
from visiontrim.evaluate.benchmarks.base import save_text
from visiontrim.evaluate.records import Record, read_table

EXTRA = "pip install 'visiontrim[benchmarks]'"
KEPT = "\t\n"
"""Control characters that a cell may hold."""


def write_sheet(path: Path, names: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Write one sheet, as ``path`` ends; without openpyxl .csv instead of .xlsx. Returns what a user has to know."""
    cleaned = [[_clean(cell) for cell in row] for row in rows]
    pairs = zip(rows, cleaned, strict=True)
    lost = sum(
        len(a) - len(b) for before, after in pairs for a, b in zip(before, after, strict=True) if isinstance(a, str)
    )
    notes = [f"{lost} control characters, which no cell may hold, were removed"] if lost else []
    book = _openpyxl() if path.suffix == ".xlsx" else None
    if path.suffix == ".xlsx" and book is None:
        path = path.with_suffix(".csv")
        notes.append(f"{path.name} instead of .xlsx, which needs openpyxl: {EXTRA}")
    if book is None:
        text = io.StringIO()
        csv.writer(text).writerows([names, *cleaned])
        save_text(text.getvalue(), path)
        return notes
    sheet = book.Workbook(write_only=True)
    page = sheet.create_sheet("Sheet1")
    for row in (names, *cleaned):
        cells = [book.cell.WriteOnlyCell(page, value) for value in row]
        for cell in cells:
            if cell.data_type == "f":  # an answer that begins with "=" is no formula
                cell.data_type = "s"
        page.append(cells)
    try:
        sheet.save(path)
    except OSError as error:
        raise TrimError(f"{path} cannot be written ({error.strerror or error}): write somewhere else") from error
    return notes


def read_sheet(path: Path) -> Iterator[Record]:
    """The rows of the first sheet, with its header as names."""
    if path.suffix != ".xlsx":
        yield from (row.record for row in read_table(path, "," if path.suffix == ".csv" else "\t"))
        return
    book = _openpyxl()
    if book is None:
        raise TrimError(f"{path} needs openpyxl: {EXTRA}, or save it as .csv")
    try:
        sheet = book.load_workbook(path, read_only=True, data_only=True)
        rows = list(sheet.worksheets[0].iter_rows(values_only=True))
        sheet.close()
    except OSError as error:
        raise TrimError(f"{path} cannot be read ({error.strerror or error})") from error
    except (zipfile.BadZipFile, KeyError, ValueError, IndexError, book.utils.exceptions.InvalidFileException) as error:
        raise TrimError(f"{path} is no spreadsheet that can be read ({error}): get a new copy of it") from error
    names = [str(name) for name in rows[0]] if rows else []
    for number, row in enumerate(rows[1:], 1):
        yield Record(dict(zip(names, row, strict=False)), f"{path}, row {number}")


def _clean(cell: Any) -> Any:
    return "".join(sign for sign in cell if sign >= " " or sign in KEPT) if isinstance(cell, str) else cell


def _openpyxl() -> Any:
    try:
        import openpyxl
        import openpyxl.cell
        import openpyxl.utils.exceptions
    except ImportError:
        return None
    return openpyxl
