"""Where autocast lowers the precision at the moment. Knows devices, and nothing of models."""

from __future__ import annotations

import torch


def lowered(device: torch.device) -> list[str]:
    """Types of devices on which autocast is on, of ``device``, the CPU and the accelerator.

    Weights that are offloaded lie on no device that computes ("meta"), so that ``device`` alone would not tell.
    """
    kinds = {"cpu", device.type}
    if (accelerator := torch.accelerator.current_accelerator()) is not None:
        kinds.add(accelerator.type)
    return [kind for kind in sorted(kinds) if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)]
