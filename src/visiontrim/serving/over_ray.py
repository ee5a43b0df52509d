"""Batches answered by actors of Ray Data, on one machine or a cluster. Knows no files and no methods."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from visiontrim.core.errors import TrimError
from visiontrim.serving.answerer import Settings
from visiontrim.serving.answers import Answers
from visiontrim.serving.rows import Row

BLOCKS = 4096
"""Most blocks that the batches of a run are split into; a crash loses the blocks in the works."""
STORE = 512 * 2**20
"""Bytes of the object store of a Ray that is started here: questions and answers are small."""


class _Actor:
    def __init__(self, settings: Settings) -> None:
        self._answerer = settings.make()

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        import pickle

        said = [
            self._answerer(pickle.loads(rows), int(number))
            for number, rows in zip(block["batch"], block["rows"], strict=True)
        ]
        return {"batch": block["batch"], "rows": [pickle.dumps(rows) for rows in said]}


def answered(
    settings: Settings,
    batches: Sequence[Sequence[Row]],
    todo: Sequence[int],
    workers: int = 1,
    *,
    fewest: int | None = None,
    gpus: float = 0.0,
    address: str | None = None,
) -> Iterator[tuple[int, Answers]]:
    """The answers to the batches ``todo``, as they come, by ``workers`` actors with ``gpus`` each.

    With ``fewest``, Ray starts with so many and adds actors up to ``workers`` while batches wait. ``address`` is that
    of a running cluster, whose machines must see the pictures under the same paths; without it one is started here.
    """
    try:
        import ray.data  # pyright: ignore[reportMissingImports]

        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise TrimError("--runner ray needs Ray: pip install 'visiontrim[ray]', or take --runner local") from error
    import pickle

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address is None:
        # two more than the actors: if they held every CPU, reading and writing would wait for ever
        ray.init(num_cpus=workers + 2, include_dashboard=False, object_store_memory=STORE, **quiet)
    else:
        ray.init(address=address, **quiet)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        rows = [{"batch": number, "rows": pickle.dumps(list(batches[number]))} for number in todo]
        said = ray.data.from_items(rows, override_num_blocks=min(len(rows), BLOCKS)).map_batches(
            _Actor,
            fn_constructor_args=(settings,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                min_size=fewest or workers, max_size=workers, max_tasks_in_flight_per_actor=2
            ),
            num_cpus=1,
            num_gpus=gpus,
        )
        for row in said.iter_rows():
            yield int(row["batch"]), pickle.loads(row["rows"])
    except ray.exceptions.RayError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise TrimError(f"Ray stopped ({' '.join(str(cause).split())[-300:]}): the batches before are safe") from error
    finally:
        ray.shutdown()
