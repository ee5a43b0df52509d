"""matplotlib, which is an extra."""

from __future__ import annotations

from typing import Any

from visiontrim.core.errors import TrimError


def pyplot() -> Any:
    """matplotlib without a screen. Raises :class:`TrimError` where it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise TrimError("pictures need matplotlib: pip install 'visiontrim[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return pyplot
