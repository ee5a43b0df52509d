"""What the vision encoder gave for earlier images, kept on the host, so that a later turn can select anew."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Seen:
    inputs: list[Tensor]
    output: Any
    heard: dict[Any, list[Tensor]]


class Memory:
    """The latest ``size`` calls of an encoder. A call with equal inputs gets its output and signals back."""

    def __init__(self, size: int) -> None:
        self._seen: deque[_Seen] = deque(maxlen=size)

    def encode(self, encode: Callable, heard: dict[Any, list[Tensor]], args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """``encode(*args, **kwargs)``, which fills ``heard``, or what was remembered of it."""
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        for seen in self._seen:
            if len(seen.inputs) == len(inputs) and all(map(_equal, seen.inputs, inputs)):
                back = inputs[0].device
                heard.update(_moved(seen.heard, back))
                return _moved(seen.output, back)
        output = encode(*args, **kwargs)
        self._seen.append(_Seen(_moved(inputs, "cpu"), _moved(output, "cpu"), _moved(heard, "cpu")))
        return output


def _equal(seen: Tensor, now: Tensor) -> bool:
    return seen.shape == now.shape and seen.dtype == now.dtype and torch.equal(seen, now.to(seen.device))


def _moved(value: Any, device: torch.device | str) -> Any:
    """A copy of nested containers with all tensors on ``device``; tensors that are there already are copied too."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, Mapping):  # ModelOutput takes its fields by name
        moved = {key: _moved(part, device) for key, part in value.items()}
        return moved if type(value) is dict else type(value)(**moved)
    if isinstance(value, tuple | list):
        return type(value)(_moved(part, device) for part in value)
    return value
