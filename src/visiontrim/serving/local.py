"""Batches answered by processes of this machine. Knows no files."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

from visiontrim.core.errors import TrimError

if TYPE_CHECKING:  # a worker loads torch once it makes its answerer, which need not be one with a model
    from visiontrim.serving.answerer import Settings
    from visiontrim.serving.answers import Answers
    from visiontrim.serving.rows import Row


def answered(
    settings: Settings, batches: Sequence[Sequence[Row]], todo: Sequence[int], workers: int = 1
) -> Iterator[tuple[int, Answers]]:
    """The answers to the batches ``todo`` as they come, by ``workers`` processes; one is this process itself.

    Raises :class:`TrimError` for a model that cannot be loaded, and where a worker dies.
    """
    if workers == 1:
        answerer = settings.make()
        for number in todo:
            yield number, answerer(batches[number], number)
        return
    context = multiprocessing.get_context("spawn")  # a forked torch may hang
    processes: dict[Any, Any] = {}
    busy: dict[Any, int | None] = {}
    """What each worker is on; None: it loads its model."""
    waiting: list[int] = list(reversed(todo))
    try:
        for _ in range(min(workers, len(todo))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(settings, theirs), daemon=True)
            process.start()
            theirs.close()
            processes[ours] = process
            busy[ours] = None
        while busy:
            for ready in wait(list(busy)):
                pipe: Any = ready
                number = busy.pop(pipe)
                try:
                    said = pipe.recv()
                except EOFError:
                    processes[pipe].join()
                    what = "loaded the model" if number is None else f"answered batch {number}"
                    raise TrimError(
                        f"a worker died as it {what} (exit code {processes[pipe].exitcode}; out of memory?): take "
                        "fewer --workers or a smaller --batch-size; the batches before are safe"
                    ) from None
                if isinstance(said, TrimError):
                    raise said
                if waiting:
                    busy[pipe] = following = waiting.pop()
                    pipe.send((following, batches[following]))
                if number is not None:
                    yield number, said
    finally:
        for process in processes.values():
            process.terminate()


def _work(settings: Settings, pipe: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    try:
        answerer = settings.make()
    except TrimError as error:
        pipe.send(error)
        return
    pipe.send(None)
    with suppress(EOFError, OSError):  # the parent is gone
        while True:
            number, rows = pipe.recv()
            pipe.send(answerer(rows, number))
