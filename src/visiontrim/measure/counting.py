"""Operations of a piece of code by kind, counted and not timed: the same number on every machine and under any load.

On a GPU a kernel costs its launch, and a stop waits until everything launched before has run. Counting sees both
without one. It knows PyTorch; it knows nothing of models and methods.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = {
    getattr(Tensor, name): name for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy")
}
"""Functions that give the host values of a tensor."""
SIZED = {"nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim", "repeat_interleave.Tensor"}
"""Operations whose result has a size that only the device knows."""


@dataclass
class Counting:
    """Counts within ``with``: kernels, views, stops, copies of the host's values, and allocations left empty."""

    kernels: int = 0
    """Operations that compute or copy."""
    views: int = 0
    """Operations that only look at memory in another way."""
    stops: Counter[str] = field(default_factory=Counter)
    """Waits of the host for values or sizes, by what waits."""
    copies: int = 0
    """Python values that become tensors: on a GPU a copy that blocks."""
    empty: int = 0
    """Tensors without elements that are made."""

    def __enter__(self) -> Counting:
        self._functions, self._operations = _Functions(self), _Operations(self)
        self._functions.__enter__()
        self._operations.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._operations.__exit__(kind, error, traceback)
        self._functions.__exit__(kind, error, traceback)

    @property
    def waits(self) -> int:
        """Stops of all kinds."""
        return self.stops.total()


class _Functions(TorchFunctionMode):
    def __init__(self, counts: Counting) -> None:
        super().__init__()
        self._counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in READS:
            self._counts.stops[READS[func]] += 1
        elif func in (torch.tensor, torch.as_tensor) and args and _values(args[0]):
            self._counts.copies += 1
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    def __init__(self, counts: Counting) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        counts, name = self._counts, func.name().removeprefix("aten::")
        result = func(*args, **(kwargs or {}))
        plain = name.split(".")[0]
        if plain in ("_local_scalar_dense", "detach", "lift_fresh", "empty"):
            pass
        elif func.is_view:
            counts.views += 1
        else:
            counts.kernels += 1
        if plain in SIZED or name in SIZED or (name.startswith("index.") and _by_mask(args)):
            counts.stops[name] += 1
        made = isinstance(result, Tensor) and plain in ("empty", "zeros", "tensor")
        counts.empty += made and not result.numel()
        return result


def _values(given: Any) -> bool:
    """Whether there are values of the host in what becomes a tensor; an empty list has none."""
    return not isinstance(given, Tensor) and not (isinstance(given, Sequence) and not given)


def _by_mask(args: Any) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in args[1])
