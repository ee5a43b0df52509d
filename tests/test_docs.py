"""What README and CONTRIBUTING show is what happens."""

from __future__ import annotations

import importlib
import re
import shlex
import textwrap
from pathlib import Path

import torch
import typer
import yaml
from PIL import Image

import families
import visiontrim as vt
from tiny import Masked, close, generate
from visiontrim import zoo
from visiontrim.cli import app
from visiontrim.commands.listing import show_methods
from visiontrim.core import registry
from visiontrim.models import family

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    """Code blocks, without the indentation of a list around them."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


def test_the_six_lines_of_the_readme(tmp_path, monkeypatch, capsys):
    (code,) = blocks(README, "python")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    names: dict = {}
    exec(code, names)
    imports, _, lines = code.rpartition("\n\n")
    assert imports.splitlines()[-1] == 'image = Image.open("examples/shapes.png")'
    assert len(lines.splitlines()) == 6
    line = capsys.readouterr().out.strip()
    assert line in README
    answer = names["processor"].decode(
        names["out"][0, names["inputs"]["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert answer.strip() == "star"
    assert (tmp_path / "kept.png").exists()


def test_the_recipe_of_the_readme():
    (recipe,) = blocks(README, "yaml")
    assert vt.load_method(yaml.safe_load(recipe)) == vt.VisionTrim(keep=128) | vt.Random(keep=0.5, layer=2)


def test_the_table_of_methods_in_the_readme_is_the_printed_one(capsys):
    """`visiontrim methods --markdown` prints it."""
    show_methods(markdown=True)
    table = capsys.readouterr().out
    assert table in README
    assert set(re.findall(r"^\| `([a-z0-9-]+)` \|", table, re.MULTILINE)) == set(vt.list_methods())


def test_the_method_of_the_contributing_guide(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    monkeypatch.syspath_prepend(tmp_path)
    choose, code, _ = blocks(CONTRIBUTING, "python")
    assert textwrap.indent(choose, "    ") in code
    (tmp_path / "contributed_method.py").write_text(code)
    importlib.import_module("contributed_method")
    bundle = zoo.load()
    image = Image.open(ROOT / "examples" / "shapes.png")
    inputs = bundle.processor(
        images=image, text=zoo.PROMPT.format(question="what shape is blue ?"), return_tensors="pt"
    )
    with torch.inference_mode(), vt.trim(bundle.model, "largest-norm", keep=32) as run:
        bundle.model(**inputs)
    assert run.report.kept_tokens == 32


def test_the_family_of_the_contributing_guide(tmp_path, monkeypatch):
    """It does on a tiny DeepSeek-VL what the generic facts cannot: attention ranks patches, which stand on a grid."""
    monkeypatch.setattr(family, "_registered", dict(family.list_families()))
    monkeypatch.syspath_prepend(tmp_path)
    *_, code = blocks(CONTRIBUTING, "python")
    assert len(code.splitlines()) < 40
    (tmp_path / "contributed_family.py").write_text(code)
    importlib.import_module("contributed_family")
    model, inputs = families.build("deepseek_vl"), families.Prompts("deepseek_vl", (3, "image", 5), (6,)).batch()
    with torch.inference_mode():
        with vt.trim(model, vt.VisionTrim(keep=8, guidance="none") | vt.Random(keep=4, layer=2)) as run:
            ours = generate(model, inputs)
        with Masked(model, inputs["attention_mask"], families.hidden_places("deepseek_vl", inputs, run.trace)):
            reference = generate(model, inputs)
    assert [image.grid for image in run.trace.images] == [(1, 4, 4)]
    assert [len(stage.index) for stage in run.trace.images[0].stages] == [8, 4]
    close(torch.stack(ours.logits), torch.stack(reference.logits), 2e-5)


def test_links_lead_somewhere():
    for name, text in (("README.md", README), ("CONTRIBUTING.md", CONTRIBUTING)):
        for target in re.findall(r'(?:\]\(|src=")(?!https?:)([^)#"]+)', text):
            assert (ROOT / target).exists(), f"{name} links to {target}"


def test_the_commands_of_the_docs_have_the_options_that_they_show():
    """Every ``visiontrim ...`` of an indented block or a shell block: its command, and each of its options, exist."""
    found, program = [], typer.main.get_command(app)
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = re.sub(r"\\\n\s*", "", path.read_text())
        for line in re.findall(r"^(?:    |\$ )?visiontrim (.+)$", text, re.MULTILINE):
            words = shlex.split(line.partition("  #")[0], comments=True)
            command, names = program, []
            while isinstance(command, typer.core.TyperGroup) and words and not words[0].startswith("-"):
                names.append(words.pop(0))
                assert names[-1] in command.commands, f"{path.name}: {line}"
                command = command.commands[names[-1]]
            known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)} | {"--help"}
            used = {word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)}
            assert used <= known, f"{path.name}: {line}: {used - known}"
            found.append((path.name, *names))
    assert sum(name == "troubleshooting.md" for name, *_ in found) >= 4
    assert len(found) > 30
