"""The file that answers grow in: ``OUT.partial``, a header and a line for every batch, and at the end ``OUT`` in order.

A batch is one line, written at once: whatever a kill tears is a whole batch, which is asked again as it was. So the
answers do not depend on how often a run was stopped. Knows no model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from visiontrim.core.errors import TrimError

Answers = list[dict[str, Any]]


class Partial:
    """Answers on the way to ``out``, for this process alone.

    Args:
        out: the file of answers in the end.
        header: all that changes answers; another run's are never mixed in.
        sizes: rows of each batch.

    Raises:
        TrimError: where ``out`` is there already, or cannot be written, or is being written by another process, or
            ``OUT.partial`` is of another run.
    """

    def __init__(self, out: Path, header: Mapping[str, Any], sizes: Sequence[int]) -> None:
        self.out, self.path = out, out.with_name(f"{out.name}.partial")
        self._header, self._sizes = dict(header), sizes
        if out.exists() and not self.path.exists():
            raise TrimError(f"{out} is there already: move it away, or give another --out")
        try:
            self._file = self.path.open("a+b")
        except OSError as error:
            raise TrimError(f"--out {out} cannot be written ({error.strerror or error}): write elsewhere") from error
        _lock(self._file, self.path)
        self._done = self._read()

    def todo(self) -> list[int]:
        """Batches to be asked: those without answers, and those in which a row failed."""
        whole = {number for number, rows in self._done.items() if all(row["error"] is None for row in rows)}
        return [number for number in range(len(self._sizes)) if number not in whole]

    def add(self, number: int, rows: Answers) -> None:
        """Keep a batch. Raises :class:`TrimError` where it cannot be written."""
        self._append({"batch": number, "rows": rows})
        self._done[number] = rows

    def finish(self) -> Answers:
        """All answers in the order of the input, renamed into place; the rows that failed.

        ``OUT.partial`` stays if there are any: the same command then asks them again.
        """
        rows = [row for number in range(len(self._sizes)) for row in self._done[number]]
        failed = [row for row in rows if row["error"] is not None]
        made = self.out.with_name(f"{self.out.name}.new")
        try:
            with made.open("w", encoding="utf-8") as file:
                file.writelines(_line(row) for row in rows)
                file.flush()
                os.fsync(file.fileno())
            made.replace(self.out)
        except OSError as error:
            raise TrimError(
                f"{self.out} cannot be written ({error.strerror or error}); {self.path} holds it"
            ) from error
        if not failed:
            self.path.unlink()
        return failed

    def close(self) -> None:
        self._file.close()

    def _append(self, value: Any) -> None:
        try:
            self._file.write(_line(value).encode())
            self._file.flush()
        except OSError as error:
            raise TrimError(
                f"{self.path} cannot be written ({error.strerror or error}): the batches before are safe; make room, "
                "and the same command goes on"
            ) from error

    def _read(self) -> dict[int, Answers]:
        self._file.seek(0)
        content = self._file.read()
        whole, newline, _ = content.rpartition(b"\n")
        if len(whole) + len(newline) < len(content):  # torn by a kill
            self._file.truncate(len(whole) + len(newline))
        first, *others = whole.splitlines() if newline else [b""]
        if not first:
            self._append(self._header)
            return {}
        try:
            header = json.loads(first)
            lines = [json.loads(line) for line in others]
            done = {line["batch"]: line["rows"] for line in lines}
            changed = [name for name in self._header if header.get(name) != self._header[name]]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise TrimError(f"{self.path} is no file of answers on their way: move it away") from error
        if changed:
            name = changed[0]
            raise TrimError(
                f"{self.path} is of another run, with {name} {header.get(name)!r} where this one has "
                f"{self._header[name]!r}: finish that one, or remove the file"
            )
        return {number: rows for number, rows in done.items() if len(rows) == self._sizes[number]}


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _lock(file: IO[bytes], path: Path) -> None:
    """The lock ends with the process, however that ends."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # a system without such locks
        pass
    except BlockingIOError:
        file.close()
        raise TrimError(f"another process is writing {path}: wait for it, or give another --out") from None
