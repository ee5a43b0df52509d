"""A method here beside what one would pick instead, each divided by the plain model of its own environment.

    python benchmarks/peers.py --out benchmarks/results/peers-cpu.json --page   # prints what is stored there ...
    python benchmarks/peers.py --out benchmarks/results/peers-cpu.json --again  # ... or measures it anew

The same slice of LLaVA-1.5-7B with random weights answers up to its first token:

- in transformers 4.37, hooked as their authors hook them (``official_style.py``, in an environment of its own under
  ``.peers``, which is made once): VisionZip, and FastV with one attention map or with eager attention throughout;
- here: the same two methods, VisionTrim, the ideal (the model alone fed as many tokens), a smaller picture of as many
  tokens, and the whole prefill with a cache that is cut afterwards.

With ``--page`` the table goes between two marks of ``docs/results/bench.md``.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import platform
import subprocess
import venv
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from turns import Way, compare, deepen

import visiontrim as vt
from visiontrim.engine.replaced import Replaced
from visiontrim.engine.upstream import given_cache
from visiontrim.measure.bench import QUESTION, noise_tower
from visiontrim.measure.ideal import Ideal
from visiontrim.measure.noise import noise_prompt
from visiontrim.measure.shapes import Shape
from visiontrim.models.family import Family, Picture, family_of

ROOT = Path(__file__).parent.parent
HOME, PINS = ROOT / ".peers", ROOT / "constraints" / "peers.txt"
PAGE = ROOT / "docs" / "results" / "bench.md"
MARKS = "<!-- peers: begin, written by benchmarks/peers.py -->", "<!-- peers: end -->"
LAYERS, WORDS, KEEP, CUT = 4, 60, 64, 2
"""Decoder layers of the slice, text tokens, tokens kept, and the decoder layer before which FastV cuts."""


def slice_of(small: bool) -> Shape:
    """Of LLaVA-1.5-7B; to try the program a narrow one that sees 100 patches."""
    shape = Shape.load("llava-1.5-7b").sliced(LAYERS)
    if not small:
        return shape
    shape = shape.narrow()
    shape.config.vision_config.image_size = 140
    return shape.seeing(140, 140, 0)


def task_of(shape: Shape, rounds: int) -> dict[str, Any]:
    """What the other environment is to do, without anything that only this one knows."""
    vision, text = shape.config.vision_config, shape.config.text_config
    of_vision = "hidden_size intermediate_size num_hidden_layers num_attention_heads image_size patch_size"
    of_text = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size"
    return {
        "vision": {key: getattr(vision, key) for key in of_vision.split()},
        "text": {key: getattr(text, key) for key in of_text.split()} | {"max_position_embeddings": 4096},
        "words": WORDS,
        "keep": KEEP,
        "layer": CUT,
        "rounds": rounds,
    }


def ours(shape: Shape, rounds: int, small: bool) -> dict[str, Any]:
    """Rows of this environment."""
    torch.manual_seed(0)
    model = model_of(shape)
    rows = compare(ways(model, shape.picture, noise_tower(family_of(model), 1 if small else 12)), rounds)
    told = {"transformers": transformers.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return told | {"rows": rows}


def model_of(shape: Shape) -> Any:
    """With random weights, the same in all decoder layers."""
    text = copy.deepcopy(shape.config)
    text.text_config.num_hidden_layers = 1
    model: Any = replace(shape, config=text).build("cpu", torch.float32)
    decoder = family_of(model).language_model
    deepen(decoder.layers, shape.config.text_config.num_hidden_layers)
    for config in (model.config.text_config, decoder.config):
        config.num_hidden_layers = len(decoder.layers)
    model.generation_config.pad_token_id = 0
    return model


def ways(model: Any, picture: Picture, reader: tuple[Any, Any]) -> list[Way]:
    """``reader``: a text tower and a tokenizer for what is guided by the question."""
    family, (tower, processor) = family_of(model), reader
    whole = noise_prompt(family, picture, WORDS, 1)
    ideal = Ideal(family, whole, KEEP)
    image = family.placeholders(whole["input_ids"])[0].nonzero()[:, 0]
    span = int(image[0]), int(image[-1]) + 1

    def way(name: str, inputs: dict[str, Tensor], opened: Any) -> Way:
        return Way(name, functools.partial(answer, model, inputs, opened))

    def trimmed(method: vt.Method) -> AbstractContextManager:
        if tower is not None:
            tower.forget()  # every call reads the question anew
        return vt.trim(model, method, question=QUESTION, text_tower=tower, processor=processor)

    methods = {
        "`visionzip`": vt.VisionZip(keep=KEEP),
        "`visiontrim`": vt.VisionTrim(keep=KEEP),
        "`fastv`": vt.FastV(keep=(KEEP,), layer=CUT),
    }
    return [
        way("plain", whole, nullcontext),
        *(way(name, whole, functools.partial(trimmed, method)) for name, method in methods.items()),
        way("ideal", ideal.inputs, lambda: ideal),
        way("a smaller picture", smaller(family, whole), functools.partial(any_size, family)),
        way("prefill, then evict", whole, functools.partial(evicted, family, *span)),
    ]


@torch.no_grad()  # unlike in inference mode, composite operations are counted as what they consist of
def answer(model: Any, inputs: dict[str, Tensor], opened: Any) -> Any:
    with opened():
        output = model.generate(**inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
    return given_cache(output)


def smaller(family: Family, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The prompt with a picture of KEEP tokens, to which the encoder's position embeddings are interpolated."""
    ids, side = inputs["input_ids"], math.isqrt(KEEP) * family.model.config.vision_config.patch_size
    image = family.placeholders(ids)
    ids = ids[~image | (image.cumsum(1) <= KEEP)][None]
    pixels = torch.nn.functional.interpolate(inputs["pixel_values"], (side, side), mode="bicubic", antialias=True)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def any_size(family: Family) -> AbstractContextManager:
    """The encoder takes pictures of any size."""

    def encode(forward: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs, interpolate_pos_encoding=True)

    return removed([Replaced(family.encoder("image"), "forward", encode)])


def evicted(family: Family, first: int, last: int) -> AbstractContextManager:
    """After the attention of every decoder layer has seen everything, its cache gives up all but KEEP vision tokens.

    Those with the smallest keys stay, in each head, which is the cheapest of published rankings.
    """

    def after(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        layer = given_cache(kwargs).layers[module.layer_idx]
        seen = layer.keys[:, :, first:last]
        stays = seen.norm(dim=-1).topk(KEEP, largest=False).indices.sort(-1).values[..., None]
        layer.keys, layer.values = (
            torch.cat(
                [
                    held[:, :, :first],
                    held[:, :, first:last].gather(2, stays.expand(-1, -1, -1, held.shape[-1])),
                    held[:, :, last:],
                ],
                2,
            )
            for held in (layer.keys, layer.values)
        )

    layers = family.language_model.layers
    return removed([layer.self_attn.register_forward_hook(after, with_kwargs=True) for layer in layers])


@contextmanager
def removed(removers: list[Any]) -> Iterator[None]:
    """Undoes ``removers`` at the end."""
    try:
        yield
    finally:
        for remover in removers:
            remover.remove()


def theirs(task: dict[str, Any]) -> dict[str, Any]:
    """Rows of transformers 4.37, from its own environment."""
    python = HOME / "bin" / "python"
    stamp, pins = HOME / "installed.txt", PINS.read_text(encoding="utf-8")
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != pins:
        if not python.exists():
            venv.create(HOME, with_pip=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "-r", PINS], check=True)
        stamp.write_text(pins, encoding="utf-8")
    program = Path(__file__).with_name("official_style.py")
    done = subprocess.run([python, program, json.dumps(task)], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def measured(rounds: int, small: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    shape = slice_of(small)
    return {
        "model": shape.name,
        "text": WORDS,
        "keep": KEEP,
        "cut_before": CUT,
        "rounds": rounds,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "environments": [theirs(task_of(shape, rounds)), ours(shape, rounds, small)],
    }


def table(told: dict[str, Any]) -> str:
    """Markdown: a row for each way."""
    lines = [
        "| | transformers | FLOPs | CPU time | peak memory | cache | kernels | stops |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for environment in told["environments"]:
        rows = {row["name"]: row for row in environment["rows"]}
        for row in rows.values():
            plain, of = rows[row["beside"]], row["of_plain"]
            if row is plain:
                time = "1" if "cpu_seconds" in row else "-"
                shares = [f"{row['flops'] / 1e9:,.0f} G", time]
                shares += [f"{row[key] / 1e6:.0f} MB" for key in ("peak_bytes", "cache_bytes")]
                more = [str(row[key]) for key in ("kernels", "stops")]
            else:
                time = "{1:.3f} ({0:.3f} to {2:.3f})".format(*of["cpu"]) if "cpu" in of else "-"
                shares = [f"{of['flops']:.3f}", time, *(f"{of[key]:.2f}" for key in ("peak_bytes", "cache_bytes"))]
                more = [f"{row[key] - plain[key]:+}" for key in ("kernels", "stops")]
            cells = [row["name"], environment["transformers"], *shares, *more]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def between(text: str, new: str) -> str:
    """``text`` with ``new`` between the two marks."""
    begin, end = MARKS
    head, _, rest = text.partition(begin)
    _, mark, tail = rest.partition(end)
    if not mark:
        raise SystemExit(f"the marks {begin} and {end} are missing")
    return "\n\n".join([f"{head}{begin}", *([new] if new else []), f"{end}{tail}"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="in which all ways of an environment take turns")
    parser.add_argument("--small", action="store_true", help="a narrow model, to try the program itself")
    parser.add_argument("--out", type=Path, help="JSON; what is stored there is only printed")
    parser.add_argument("--again", action="store_true", help="measure although there is a stored result")
    parser.add_argument("--page", action="store_true", help=f"write the table into {PAGE.relative_to(ROOT)}, too")
    options = parser.parse_args(arguments)
    if options.out and options.out.exists() and not options.again:
        told = json.loads(options.out.read_text(encoding="utf-8"))
    else:
        told = measured(options.rounds, options.small)
        if options.out:
            options.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    if options.page:
        PAGE.write_text(between(PAGE.read_text(encoding="utf-8"), table(told)), encoding="utf-8")
    print(table(told))


if __name__ == "__main__":
    main()
