"""Whether the host may ask what a device has found. Knows devices; not who asks what."""

from torch import Tensor


def asks_freely(values: Tensor) -> bool:
    """True on the CPU, where reading a number of ``values`` costs nothing; elsewhere it stops the host."""
    return values.device.type == "cpu"
