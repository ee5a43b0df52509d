"""What the stages of a run share: the call and the pass in progress in this thread, the clock, and where traces go.

It knows who is inside the model at the moment; it knows nothing of hooks and methods.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NoReturn

import torch
from torch import Tensor

from visiontrim.core.autocast import lowered
from visiontrim.core.errors import TrimError
from visiontrim.core.trace import Trace
from visiontrim.core.view import Keep
from visiontrim.engine.call import Call
from visiontrim.engine.forward import Forward
from visiontrim.engine.ranks import Ranks

Clock = Callable[[str], AbstractContextManager]
"""Gives a context that times what runs in it under a name."""

Exact = Callable[[Tensor], Tensor]
"""Brings features into the precision in which a method looks at them."""


class Context:
    """State of a run that is open. That of a call lives in context variables, so threads do not mix.

    Args:
        model: the model of transformers.
        finish: called with the trace of every prefill that held images.
        clock: times the method's own work under the name "method".
        ranks: the processes that share the encoder; None: it is in this one.
    """

    def __init__(
        self,
        model: Any,
        finish: Callable[[Trace], None],
        clock: Clock | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._model = model
        self._ranks = ranks
        self.finish = finish
        self._clock: Clock = clock if clock is not None else lambda name: nullcontext()
        self._call: ContextVar[Call | None] = ContextVar("visiontrim_call", default=None)
        self._forward: ContextVar[Forward | None] = ContextVar("visiontrim_forward", default=None)
        self._idle = threading.Condition()
        self._inside = 0
        """Calls in progress in all threads."""

    @property
    def call(self) -> Call | None:
        """The call in progress in this thread."""
        return self._call.get()

    @property
    def forward(self) -> Forward | None:
        """The pass through the language model in progress in this thread."""
        return self._forward.get()

    @forward.setter
    def forward(self, forward: Forward | None) -> None:
        self._forward.set(forward)

    def begin(self, call: Call) -> None:
        """``call`` is in progress in this thread from now on."""
        call.outer = self.call
        self._call.set(call)
        with self._idle:
            self._inside += 1

    def end(self) -> None:
        """The call in progress in this thread is over, and goes on with the one around it."""
        call = self.call
        self._call.set(None if call is None else call.outer)
        with self._idle:
            self._inside -= 1
            self._idle.notify_all()

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Wait until no call is in progress in any thread; none begins inside.

        Raises :class:`TrimError` within a call, which would wait for itself.
        """
        while (call := self.call) is not None:
            if _runs(call):
                raise TrimError(
                    "the run cannot be left from within a call of its model (by a streamer, a stopping criterion, a "
                    "hook), whose next step would not know what its cache lacks: leave it when the call has returned"
                )
            self.end()  # Ctrl-C left it no time to say that it is over
        with self._idle:
            self._idle.wait_for(lambda: not self._inside)
            yield

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TrimError(
            f"a {type(self._model).__name__} with an open run cannot be copied or pickled, for its copy would have the "
            "hooks of the run: leave the run first, or take its state_dict() or save_pretrained()"
        )

    @contextmanager
    def choosing(self) -> Iterator[Exact]:
        """The method's own work: timed, and in the precision of the model's weights.

        Sums of what it merges have gradients where the model has. Gives a function that brings features into that
        precision, from a lower one under autocast, which is off here.
        """
        kinds = lowered(self._model.device)
        with ExitStack() as stack:
            stack.enter_context(self._clock("method"))
            for kind in kinds:
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield self._as_weights if kinds else _as_it_is

    @contextmanager
    def hearing(self) -> Iterator[None]:
        """What is computed for the method to choose by: timed with its work, and without gradients."""
        with self.choosing(), torch.no_grad():
            yield

    def heads(self, own: Tensor) -> Tensor:
        """Queries or keys of all heads of the encoder, of those that this process has."""
        return own if self._ranks is None else self._ranks.heads(own)

    def agreed(self, keep: Keep) -> Keep:
        """What all processes that share the encoder keep."""
        return keep if self._ranks is None else self._ranks.agreed(keep)

    def _as_weights(self, features: Tensor) -> Tensor:
        return features.to(self._model.dtype)


def _runs(call: Call) -> bool:
    """Whether ``call`` is in progress in this thread: generate() always says when it is over, a forward may not."""
    if call.owner is None:
        return True
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_locals.get("self") is call.owner:
            return True
        frame = frame.f_back
    return False


def _as_it_is(features: Tensor) -> Tensor:
    return features
