"""visiontrim: faster vision-language models without training.

Vision tokens are removed or merged at inference, so prefill, key-value cache and decoding shrink::

    import visiontrim as vt

    with vt.trim(model, "visiontrim", keep=64) as run:
        out = model.generate(**inputs, max_new_tokens=64)
    print(run.report)

Names are listed in ``__init__.pyi`` and loaded when they are first used, so that ``import visiontrim`` costs nothing.
"""

import ast
import importlib
from pathlib import Path
from typing import Any

_HOMES = {
    name.name: str(node.module)
    for node in ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    if isinstance(node, ast.ImportFrom)
    for name in node.names
}

__all__ = sorted(_HOMES)  # noqa: PLE0605 # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("visiontrim")
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'visiontrim' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
