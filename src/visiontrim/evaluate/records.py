"""Records of files that others wrote: JSON lines, JSON, tab-separated tables; each remembers where it stands.

Whatever is wrong with a file (missing, cut off, another encoding, another type than expected) is a :class:`TrimError`
of one sentence with the file and the line. Knows no benchmark.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visiontrim.core.errors import TrimError

LARGEST_FIELD = 2**30
"""Of a table, in characters: pictures are fields."""
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


@dataclass(frozen=True, slots=True)
class Record:
    """The fields of one entry, and where it stands: ``FILE, line 3``."""

    fields: Mapping[str, Any]
    where: str

    def __contains__(self, name: str) -> bool:
        return self.fields.get(name) is not None

    def text(self, *names: str, default: str | None = None) -> str:
        """The first of ``names`` that is there: text, or a number as text. Raises :class:`TrimError` for all else."""
        value = self._first(names, default)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise self.error(f"{names[0]!r} is {_kind(value)}, where text is expected")
        if any("\ud800" <= sign <= "\udfff" for sign in str(value)):
            raise self.error(f"{names[0]!r} holds half a sign of UTF-16, which is no text")
        return str(value)

    def id(self, *names: str) -> str | int:
        """The first of ``names`` that is there, a number or text, as it is written."""
        value = self._first(names, None)
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise self.error(f"{names[0]!r} is {_kind(value)}, where a number or text is expected")
        return value

    def whole(self, *names: str) -> int:
        """The first of ``names`` that is there, as a whole number."""
        try:
            return int(self.text(*names))
        except ValueError:
            raise self.error(f"{names[0]!r} is {self.text(*names)!r}, where a whole number is expected") from None

    def texts(self, *names: str, default: Sequence[str] | None = None) -> tuple[str, ...]:
        """A list of texts (or numbers, as text); one alone is a list of one."""
        value = self._first(names, default)
        parts = value if isinstance(value, list | tuple) else [value]
        return tuple(Record({names[0]: part}, self.where).text(names[0]) for part in parts)

    def many(self, name: str) -> list[Record]:
        """A list of objects."""
        value = self._first((name,), None)
        if not isinstance(value, list):
            raise self.error(f"{name!r} is {_kind(value)}, where a list is expected")
        return [_record(part, f"{self.where}, {name}, entry {n}") for n, part in enumerate(value, 1)]

    def one(self, name: str) -> Record:
        """An object."""
        return _record(self._first((name,), None), f"{self.where}, {name}")

    def error(self, problem: str) -> TrimError:
        return TrimError(f"{self.where}: {problem}")

    def _first(self, names: Sequence[str], default: Any) -> Any:
        found = next((self.fields[name] for name in names if name in self), default)
        if found is None:
            raise self.error(f"there is no {' or '.join(map(repr, names))} (it has {_some(self.fields)})")
        return found


def read_lines(path: Path) -> Iterator[Record]:
    """The records of a file of JSON lines, read as they are needed; a single JSON list is taken too."""
    lines = read_text_lines(path)
    for number, line in lines:
        if not line.strip():
            continue
        if line.lstrip().startswith("["):
            yield from read_list(path)
            return
        yield _record(_loads(line, f"{path}, line {number}"), f"{path}, line {number}")


def read_list(path: Path) -> list[Record]:
    """The records of a file that is one JSON list."""
    value = read_json(path)
    if not isinstance(value, list):
        raise TrimError(f"{path} holds {_kind(value)}, where a list is expected")
    return [_record(part, f"{path}, entry {number}") for number, part in enumerate(value, 1)]


def read_object(path: Path) -> dict[str, Any]:
    """The fields of a file that is one JSON object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise TrimError(f"{path} holds {_kind(value)}, where an object is expected")
    return value


def is_lines(path: Path, whole: str) -> bool:
    """Whether a file is JSON lines: its first line is an object by itself, and none that holds ``whole``."""
    first = next((line for _, line in read_text_lines(path) if line.strip()), "")
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return not first.lstrip().startswith("{")
    return not (isinstance(value, dict) and whole in value)


def entries(path: Path) -> Iterator[tuple[str, Record]]:
    """Names and records of a file that is one JSON object of objects."""
    for name, value in read_object(path).items():
        yield name, _record(value, f"{path}, {name}")


def read_json(path: Path) -> Any:
    return _loads("".join(line for _, line in read_text_lines(path)), str(path))


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table, and its place in the file: from byte ``start`` to ``end``."""

    record: Record
    start: int
    end: int


def read_table(path: Path, separator: str = "\t") -> Iterator[Row]:
    """The rows of a table with a header, separated by ``separator``; quoted fields may hold new lines."""
    names: list[str] | None = None
    for number, start, end, values in _rows(path, separator):
        if names is None:
            names = values
            continue
        where = f"{path}, row {number - 1}"
        if len(values) != len(names):
            raise TrimError(
                f"{where}: it has {len(values)} fields, the header {len(names)}: the file is cut off or torn"
            )
        yield Row(Record(dict(zip(names, values, strict=True)), where), start, end)


def read_field(path: Path, start: int, end: int, column: int, separator: str = "\t") -> str:
    """One field of the row that stands from byte ``start`` to ``end`` of a table."""
    with _opened(path) as file:
        file.seek(start)
        text = file.read(end - start).decode("utf-8")
    (values,) = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    return values[column]


def columns(path: Path, separator: str = "\t") -> list[str]:
    """The header of a table."""
    names = next((values for *_, values in _rows(path, separator)), None)
    if names is None:
        raise TrimError(f"{path} has no header: get a new copy of it")
    return names


def _rows(path: Path, separator: str) -> Iterator[tuple[int, int, int, list[str]]]:
    csv.field_size_limit(LARGEST_FIELD)
    end = 0

    def lines() -> Iterator[str]:
        nonlocal end
        for _, line, size in _decoded(path, "utf-8-sig"):
            end += size
            yield line

    start, number = 0, 0
    rows = csv.reader(lines(), delimiter=separator)
    try:
        for number, values in enumerate(rows, 1):
            if values:
                yield number, start, end, values
            start = end
    except csv.Error as error:
        raise TrimError(f"{path}, row {number}: it is no table ({error})") from error
    if not number:
        raise TrimError(f"{path} is empty: get a new copy of it")


def read_text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbers and texts of the lines, in UTF-8 or, where the file says so, UTF-16."""
    with _opened(path) as file:
        head = _guarded(path, lambda: file.read(4))
    encoding = next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8")
    if encoding == "utf-16":
        try:
            yield from enumerate(io.StringIO(_guarded(path, path.read_bytes).decode(encoding)), 1)
        except UnicodeDecodeError as error:
            raise TrimError(f"{path} is cut off in the middle of a sign of UTF-16: get a new copy of it") from error
        return
    for number, line, _ in _decoded(path, encoding):
        yield number, line


def _decoded(path: Path, encoding: str) -> Iterator[tuple[int, str, int]]:
    """Number, text and bytes of every line."""
    with _opened(path) as file:
        number = 0
        while line := _guarded(path, file.readline):
            number += 1
            try:
                text = line.decode(encoding if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise TrimError(
                    f"{path}, line {number} is not UTF-8 ({error.reason}): save the file as UTF-8"
                ) from error
            yield number, text, len(line)


def _opened(path: Path) -> Any:
    return _guarded(path, lambda: path.open("rb"))


def _guarded(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise TrimError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _loads(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also of a number of too many digits
        reason = "it nests too deeply" if isinstance(error, RecursionError) else str(error)
        raise TrimError(f"{where} is not valid JSON: {reason}") from error


def _record(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise TrimError(f"{where}: it is {_kind(value)}, where an object with fields is expected")
    return Record(value, where)


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _some(fields: Mapping[str, Any]) -> str:
    names = [repr(name) for name in fields]
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "no fields"
