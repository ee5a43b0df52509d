"""The way in for a user, tried from a new environment: ``make install-check``.

The wheel is built and installed without constraints, so with the newest releases that it allows (of torch the tested
one). There, ``visiontrim ask`` must say what it says in the environment that runs this, ``visiontrim doctor`` must find
every promise kept, and README's Python must run as it stands. The environment is ``.install``, new every time.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
HOME = ROOT / ".install"
ASK = ["ask", "examples/shapes.png", "what color is the star?", "--keep", "64", "--json"]
SAME = ("answer", "tokens", "kv_bytes")
"""What must not depend on the releases that are installed."""


def python_of_readme() -> str:
    """README's blocks of Python, one after the other."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE))


def installed() -> Path:
    """Programs of a new environment with the wheel."""
    shutil.rmtree(HOME, ignore_errors=True)
    venv.create(HOME, with_pip=True)
    programs = HOME / "bin"
    pip = [programs / "python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", HOME / "wheels", ROOT], check=True)
    pins = (ROOT / "constraints" / "tested.txt").read_text().splitlines()
    torch = next(pin for pin in pins if pin.startswith("torch=="))
    subprocess.run([*pip, "install", torch, *(HOME / "wheels").glob("*.whl")], check=True)
    return programs


def asked(program: Path, folder: Path) -> dict:
    """What the command answers there."""
    done = subprocess.run([program, *ASK], cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    said = json.loads(done.stdout)
    return {key: said[key] for key in SAME}


def main() -> int:
    programs = installed()
    shown = subprocess.run([programs / "python", "-m", "pip", "list"], check=True, capture_output=True, text=True)
    print(*re.findall(r"^(?:transformers|torch) +\S+", shown.stdout, re.MULTILINE), sep=", ")
    folder = HOME / "folder"
    shutil.copytree(ROOT / "examples", folder / "examples")
    here, there = asked(Path(sys.executable).parent / "visiontrim", folder), asked(programs / "visiontrim", folder)
    print(f"ask: {there['answer']!r}, {there['tokens']['kept']:g} tokens, {there['kv_bytes']:,} bytes of cache")
    if here != there:
        print(f"but with the constraints: {here}", file=sys.stderr)
        return 1
    for what, command in (
        ("doctor", [programs / "visiontrim", "doctor"]),
        ("README", [programs / "python", "-c", python_of_readme()]),
    ):
        done = subprocess.run(command, cwd=folder)
        print(f"{what}: {'passed' if done.returncode == 0 else 'FAILED'}", flush=True)
        if done.returncode:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
