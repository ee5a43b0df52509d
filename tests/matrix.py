"""The tests of families under several releases of transformers, and those of optional packages: ``make matrix``.

Each runs in an environment of its own under ``.matrix``, which is kept for the next time. Names of environments as
arguments run these alone.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
FAMILIES = [
    f"tests/test_{name}.py"
    for name in (
        *("engine", "families", "generic", "generate", "turns", "trim", "wrapped"),
        *("encoder_families", "pixelprune", "decoding", "unmerging", "contract", "promises", "runs"),
    )
]
TOOLS = ["pytest", "pytest-xdist", "beartype", "hypothesis"]
OPTIONAL = ["accelerate", "bitsandbytes", "peft", "torchao"]
ENVIRONMENTS = {
    "5.16.1": (["transformers==5.16.1"], FAMILIES),
    "5.19": (["transformers==5.19.0"], FAMILIES),
    "5.23": (["transformers==5.23.0"], FAMILIES),
    "newest": (["transformers>=5.16.1,<6"], FAMILIES),
    "optional": ([*OPTIONAL, "transformers>=5.16.1,<6"], ["tests/optional"]),
    "timm": (["timm==1.0.31", "torchvision==0.28.0", "transformers>=5.16.1,<6"], ["tests/timm"]),
    "lmms-eval": ([], ["tests/lmms"]),
    "ray": (["ray[data]==2.60.0"], ["tests/ray"]),
    "demo": (["gradio>=6,<7", "playwright"], ["tests/demo"]),  # Chromium must be there
}
PINNED = {"lmms-eval": ROOT / "constraints" / "lmms-eval.txt"}
"""Packages that are put over the others without asking for what they ask for, which would be another torch."""
LOOSE = {"demo": ("pillow", "typer", "pydantic", "huggingface_hub", "starlette", "fastapi", "python-dateutil")}
"""What an environment needs in other versions: gradio wants an older pillow."""
FREE = ("transformers", "huggingface_hub", "tokenizers", "hf-xet")
"""What every release of transformers asks for anew; all else is as in constraints/tested.txt."""


def install(python: Path, constraints: Path, packages: list[str], loose: tuple[str, ...] = ()) -> None:
    pins = (ROOT / "constraints" / "tested.txt").read_text().splitlines()
    constraints.write_text("\n".join(pin for pin in pins if not pin.startswith((*FREE, *loose))))
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade"]
    subprocess.run([*pip, "-c", constraints, "-e", str(ROOT), *TOOLS, *packages], check=True)


def run(name: str) -> bool:
    """Whether the tests of an environment pass."""
    packages, tests = ENVIRONMENTS[name]
    home = ROOT / ".matrix" / name
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
    install(python, home / "constraints.txt", packages, LOOSE.get(name, ()))
    if name in PINNED:
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "-r", PINNED[name]], check=True)
    shown = subprocess.run([python, "-m", "pip", "list"], check=True, capture_output=True, text=True).stdout
    versions = dict(
        re.findall(
            r"^(transformers|torch|accelerate|bitsandbytes|gradio|lmms_eval|peft|ray|timm|torchao) +(\S+)",
            shown,
            re.MULTILINE,
        )
    )
    start = time.monotonic()
    done = subprocess.run([python, "-m", "pytest", "-n", "auto", *tests], cwd=ROOT)
    minutes = (time.monotonic() - start) / 60
    print(f"{name}: {'passed' if done.returncode == 0 else 'FAILED'} in {minutes:.1f} min with {versions}", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    names = sys.argv[1:] or list(ENVIRONMENTS)
    if unknown := set(names) - ENVIRONMENTS.keys():
        sys.exit(f"no environments {', '.join(unknown)}: choose from {', '.join(ENVIRONMENTS)}")
    results = [run(name) for name in names]
    sys.exit(not all(results))
