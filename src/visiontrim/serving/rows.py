"""Rows of a batch run: a folder of pictures, JSON lines, or a parquet table; pictures are read where they are needed.

Knows files, no model. A line that is no row stays one, with what is wrong with it: a bad row must not stop the others.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from visiontrim.core.errors import TrimError
from visiontrim.images import decode_image, load_image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""What counts as a picture in a folder."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A picture in a column ``image`` of a parquet table: bytes, a path, or ``{"bytes": ..., "path": ...}``."""

    path: Path
    group: int
    """Row group of the file."""
    index: int
    """Row in it."""

    def load(self) -> list[Image.Image]:
        given: Any = _group(self.path, self.group)[self.index].as_py()
        where = f"row {self.index} in group {self.group} of {self.path}"
        if isinstance(given, Mapping):  # as datasets stores pictures
            given = given.get("bytes") or given.get("path")
        if isinstance(given, bytes):
            return [decode_image(given, where)]
        if not isinstance(given, str):
            raise TrimError(f"{where} holds no picture: give bytes, or a path")
        return [load_image(_beside(self.path, given))]

    def digest(self) -> str:
        """Its place: reading every picture to tell runs apart would cost as much as answering."""
        return f"{self.group}:{self.index}"


@dataclass(frozen=True, slots=True)
class Row:
    """One question about one picture."""

    id: str | int
    source: str | Packed | None
    """Where the picture is; None for a row that cannot be asked."""
    question: str
    error: str = ""
    """Why it cannot be asked, else ""."""


def read_rows(path: Path, question: str | None = None) -> list[Row]:
    """The rows of a folder, a file of JSON lines or a parquet table, in order.

    Fields are ``image``, ``question`` and, as one likes, ``id``: without it, it is the path of a picture in a folder
    and else the number of the line or row from 1 on. Paths of pictures are relative to the file. ``question`` is
    asked where a row has none.

    Raises:
        TrimError: for what cannot be read, has no rows, or holds an id twice.
    """
    if path.is_dir():
        rows = list(_of_folder(path, question))
    elif not path.exists():
        raise TrimError(f"{path} does not exist: give a folder of pictures, a .jsonl or a .parquet file")
    elif path.suffix == ".parquet":
        rows = list(_of_table(path, question))
    elif path.suffix == ".jsonl":
        rows = list(_of_lines(path, question))
    else:
        raise TrimError(f"{path} is neither a folder of pictures nor a .jsonl or .parquet file")
    if not rows:
        raise TrimError(f"{path} holds no rows: give a folder of pictures, a .jsonl or a .parquet file")
    seen: set[str | int] = set()
    for row in rows:
        if row.id in seen:
            raise TrimError(f"{path} holds the id {row.id!r} twice: ids tell which rows are done, so each is used once")
        seen.add(row.id)
    return rows


def digest(rows: Sequence[Row]) -> str:
    """Sixteen digits that tell inputs apart: ids, questions and where pictures are."""
    total = hashlib.sha256()
    for row in rows:
        place = row.source.digest() if isinstance(row.source, Packed) else row.source
        total.update(json.dumps([row.id, place, row.question, row.error]).encode())
    return total.hexdigest()[:16]


def _of_folder(path: Path, question: str | None) -> Iterator[Row]:
    if question is None:
        raise TrimError(f"{path} is a folder of pictures, without questions: say --question TEXT")
    names = sorted(name for name in path.rglob("*") if name.suffix.lower() in SUFFIXES)
    return (Row(name.relative_to(path).as_posix(), str(name), question) for name in names)


def _of_lines(path: Path, question: str | None) -> Iterator[Row]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TrimError(f"{path} cannot be read ({error.strerror or error})") from error
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if line.strip():
            yield _of_line(path, number, line, question)


def _of_line(path: Path, number: int, line: bytes, question: str | None) -> Row:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Row(number, None, "", f"line {number} is no JSON: {error}")
    if not isinstance(fields, dict):
        return Row(number, None, "", f"line {number} is no object with image and question")
    name, image = fields.get("id", number), fields.get("image")
    if isinstance(name, bool) or not isinstance(name, str | int):
        return Row(number, None, "", f"line {number}: its id is neither text nor a whole number")
    source = _beside(path, image) if isinstance(image, str) and image else None
    return _row(name, source, fields.get("question", question), f"line {number}")


def _of_table(path: Path, question: str | None) -> Iterator[Row]:
    file = _parquet(path)
    columns = set(file.schema_arrow.names)
    if "image" not in columns:
        raise TrimError(f"{path} has no column 'image', but {', '.join(sorted(columns)) or 'none'}")
    number = 0
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=[name for name in ("id", "question") if name in columns])
        size = file.metadata.row_group(group).num_rows
        ids = table["id"].to_pylist() if "id" in columns else range(number + 1, number + size + 1)
        asked = table["question"].to_pylist() if "question" in columns else [None] * size
        for index, (name, text) in enumerate(zip(ids, asked, strict=True)):
            number += 1
            if isinstance(name, bool) or not isinstance(name, str | int):
                yield Row(number, None, "", f"row {number}: its id is neither text nor a whole number")
            else:
                yield _row(name, Packed(path, group, index), question if text is None else text, f"row {number}")


def _row(name: str | int, source: str | Packed | None, question: Any, where: str) -> Row:
    if source is None:
        return Row(name, None, "", f"{where} has no 'image': give the path of a picture")
    if not isinstance(question, str) or not question.strip():
        return Row(name, None, "", f"{where} has no question: give one, or --question for all")
    return Row(name, source, question)


def _beside(path: Path, image: str) -> str:
    return image if "://" in image else str(path.parent / image)


def _parquet(path: Path) -> Any:
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise TrimError(f"{path} is a parquet table, which needs pyarrow: pip install pyarrow") from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise TrimError(f"{path} cannot be read as a parquet table ({' '.join(str(error).split())})") from error


@functools.lru_cache(maxsize=2)
def _group(path: Path, group: int) -> Any:
    """The pictures of one row group. Rows of a batch lie together, so two of them are enough."""
    return _parquet(path).read_row_group(group, columns=["image"])["image"]
