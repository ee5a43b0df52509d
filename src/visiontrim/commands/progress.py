"""How far something long is, and how it ends when it is stopped."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

import typer

QUIET = 60.0
"""Seconds between two lines where standard error is no terminal."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


class Progress:
    """Tells on standard error how many steps are done and how long the others will take.

    On a terminal it rewrites a line, elsewhere it writes one a minute. Steps that were no work (answers from a log) do
    not count for the estimate.
    """

    def __init__(
        self, what: str, file: TextIO | None = None, clock: Callable[[], float] = time.monotonic, quiet: float = QUIET
    ) -> None:
        self._what, self._file, self._clock, self._quiet = what, file or sys.stderr, clock, quiet
        self._start = self._last = clock()
        self._begun: float | None = None
        self._fresh = 0
        self._width = 0

    def __call__(self, done: int, total: int, fresh: bool = True) -> None:
        now = self._clock()
        if self._begun is None or (not fresh and not self._fresh):
            self._begun = self._start if fresh else now
        self._fresh += fresh
        terminal = self._file.isatty()
        if not terminal and (now - self._last < self._quiet or done == total):
            return
        self._last = now
        left = (now - self._begun) / self._fresh * (total - done) if self._fresh else None
        estimate = "" if left is None or done == total else f", about {duration(left)} left"
        text = f"{self._what}: {done:,} of {total:,}{estimate}"
        if terminal:
            print(f"\r{text:<{self._width}}", end="\n" if done == total else "", file=self._file, flush=True)
            self._width = len(text)
        else:
            print(text, file=self._file, flush=True)


def duration(seconds: float) -> str:
    """Seconds in the unit that a person would choose."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


@contextmanager
def stoppable(kept: str) -> Iterator[None]:
    """Ctrl-C inside ends with one line, which says what is ``kept``, and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nvisiontrim: stopped; {kept}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
