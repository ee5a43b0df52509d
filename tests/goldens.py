"""What the authors' code answered (tests/golden/peers): reading the files, and views of what is in them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from views import grouped
from visiontrim.core.view import View

PEERS = Path(__file__).parent / "golden" / "peers"


def load(name: str, case: str = "") -> dict[str, Tensor]:
    """The arrays of a file, or those whose names begin with ``case``; indices are int64, float16 is float32."""
    with np.load(PEERS / f"{name}.npz") as arrays:
        chosen = {key.removeprefix(f"{case}_"): arrays[key] for key in arrays if key.startswith(case)}
    tensors = {key: torch.from_numpy(np.asarray(array)) for key, array in chosen.items() if array.dtype.kind != "U"}
    wider = {torch.float16: torch.float32, torch.int32: torch.int64}
    return {key: value.to(wider.get(value.dtype, value.dtype)) for key, value in tensors.items()}


def setting(name: str) -> dict[str, Any]:
    with np.load(PEERS / f"{name}.npz") as arrays:
        return json.loads(str(arrays["setting"]))


def view_of(features: Tensor, grid: Any = None, **signals: Any) -> View:
    """A view of [batch, tokens, dim] on ``grid``, by default a single row; signals as ``encoder_keys=...``."""
    batch, tokens = features.shape[:2]
    frames, rows, columns = (int(side) for side in (grid if grid is not None else (1, 1, tokens)))
    whole = math.prod((frames, rows, columns))
    places = torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(columns))
    named: dict[Any, Any] = {}
    for name, value in signals.items():
        group, _, rest = name.partition("_")
        rest, _, layer = rest.partition("__")
        named[(f"{group}.{rest}", int(layer)) if layer else f"{group}.{rest}"] = value
    return View(
        features=features,
        coordinates=places.expand(batch, -1, -1),
        grid=(frames, rows, columns),
        entered=whole,
        num_layers=32,
        **grouped(named),
    )


def close(ours: Tensor, golden: Tensor) -> None:
    torch.testing.assert_close(ours.to(golden.dtype), golden, rtol=1e-4, atol=2e-5)
