"""The log that a stopped evaluation goes on from, and the folder that belongs to one evaluation at a time.

Rows are lines of JSON. A line that was torn by a kill or a full disk is dropped, lines of something else are passed
over, and both are told. Knows no model.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visiontrim.core.budget import Amount
from visiontrim.core.errors import TrimError

NAME = "log.jsonl"
LOCK = "log.lock"
Key = tuple[str, str, Amount | None, str]
"""Who answers, method, budget and questions: all that can change an answer."""


@dataclass(frozen=True, slots=True)
class Row:
    """What a method at a budget answered to a batch."""

    speaker: str
    """Digests of the weights, and of processor, text tower and releases."""
    method: str
    """With every option, as JSON: a row must not outlive a change of a default."""
    keep: Amount | None
    questions: str
    """Digest of the batch: what was asked, about which pictures, in which way."""
    ids: tuple[str | int, ...]
    predictions: tuple[str, ...]
    """() where the method cannot work at this budget."""
    lengths: tuple[int, ...]
    """Tokens of each answer, without the end."""
    error: str
    """Why it cannot, else ""."""
    per_layer: tuple[float, ...]
    """Mean vision tokens of an image that each decoder layer processed; () for questions without pictures."""
    seconds: Mapping[str, float]
    """Of ``vision``, ``method``, ``prefill`` and ``decode``."""

    @property
    def key(self) -> Key:
        return self.speaker, self.method, self.keep, self.questions


class Log:
    """Rows in a file of JSON lines, which is read when it is opened and grows with every row.

    A row with an error is kept for the reader and never used again: what it speaks of may be mended.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.notes: list[str] = []
        """What was wrong with the file, in sentences."""
        self._rows: dict[Key, Row] = {}
        for row in self._read():
            self._rows[row.key] = row

    def __len__(self) -> int:
        """Batches that are answered."""
        return sum(not row.error for row in self._rows.values())

    def get(self, key: Key) -> Row | None:
        row = self._rows.get(key)
        return None if row is None or row.error else row

    def add(self, row: Row) -> None:
        """Raises :class:`TrimError` where it cannot be written; what was there stays."""
        line = json.dumps(dataclasses.asdict(row)) + "\n"
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise TrimError(
                f"{self._path} cannot be written ({error.strerror or error}): the {len(self)} batches of answers "
                "before are safe; make room, and the same command goes on"
            ) from error
        self._rows[row.key] = row

    def _read(self) -> Iterator[Row]:
        try:
            content = self._path.read_bytes() if self._path.exists() else b""
        except OSError as error:
            raise TrimError(f"the log {self._path} cannot be read ({error.strerror or error})") from error
        whole, _, torn = content.rpartition(b"\n")
        strange = 0
        for line in whole.splitlines():
            row = _row(line)
            strange += row is None and bool(line.strip())
            if row is not None:
                yield row
        if strange:
            self.notes.append(f"{strange} lines of {self._path} are no rows of this release: they are passed over")
        if torn.strip():
            self.notes.append(f"the last line of {self._path} is torn: it is dropped, and its batch is asked again")
            self._cut(len(content) - len(torn))

    def _cut(self, length: int) -> None:
        try:
            os.truncate(self._path, length)
        except OSError as error:
            raise TrimError(f"the torn end of {self._path} cannot be cut off ({error.strerror or error})") from error


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """A folder that can be written, made where it is missing, for this process alone while the context is open.

    Raises :class:`TrimError` for what is no folder, cannot be written, or is in use.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder / LOCK)
    except FileExistsError as error:
        raise TrimError(f"--out {folder} is a file: give a folder") from error
    except OSError as error:
        raise TrimError(f"--out {folder} cannot be written ({error.strerror or error}): give another folder") from error
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK).unlink()
        os.close(lock)


def _locked(path: Path) -> int:
    """A file that this process holds and that tells its id; the lock ends with the process, however that ends."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # a system without such locks
            pass
        except BlockingIOError:
            holder = os.read(file, 20).decode(errors="replace").strip() or "another"
            os.close(file)
            raise TrimError(
                f"process {holder} is writing to {path.parent}: wait for it, or give another --out"
            ) from None
        if path.exists() and os.path.samestat(os.fstat(file), path.stat()):  # not one that its holder has just removed
            os.ftruncate(file, 0)
            os.write(file, str(os.getpid()).encode())
            return file
        os.close(file)


def _row(line: bytes) -> Row | None:
    """The row of a line; None for anything else."""
    try:
        fields: dict[str, Any] = json.loads(line)
        fields.update({name: tuple(fields[name]) for name in ("ids", "predictions", "lengths", "per_layer")})
        row = Row(**fields)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    texts = all(
        isinstance(value, str) for value in (row.speaker, row.method, row.questions, row.error, *row.predictions)
    )
    fits = isinstance(row.seconds, dict) and (
        bool(row.error) or len(row.predictions) == len(row.ids) == len(row.lengths)
    )
    return row if texts and fits and isinstance(row.keep, int | float | None) else None
