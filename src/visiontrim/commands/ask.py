"""``visiontrim ask`` and ``visiontrim map``: a question about a picture, and what is kept of it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visiontrim.commands.options import (
    Device,
    Dtype,
    DtypeName,
    Json,
    Model,
    TextTower,
    amount_of,
    console,
    load_speaker,
    methods_of,
    status,
)
from visiontrim.images import check_output, load_image, save_image

if TYPE_CHECKING:  # torch and transformers take seconds to import: --help must not wait for them
    from PIL.Image import Image

    from visiontrim.ask import Answer
    from visiontrim.core.method import Method

ASK_EPILOG = (
    "Examples:  visiontrim ask photo.png 'is there a red star?' --keep 0.1 --compare\n\n"
    "visiontrim ask photo.jpg 'What is on the table?' --model llava-hf/llava-1.5-7b-hf "
    "--text-tower openai/clip-vit-large-patch14-336 --map kept.png\n\n"
    "curl -s https://example.org/a.jpg | visiontrim ask - 'how many objects?' --json"
)
MAP_EPILOG = "Example:  visiontrim map photo.png 'where is the 7?' -o kept.png --method visiontrim"

Picture = Annotated[str, typer.Argument(metavar="IMAGE", help="Path or URL of a picture, or - for standard input.")]
Pictures = Annotated[
    list[str],
    typer.Argument(
        metavar="IMAGE...", help="Path or URL of a picture, or - for standard input; several make one prompt."
    ),
]
Question = Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask about it.")]
MethodSpec = Annotated[
    str, typer.Option(metavar="NAME[:K=V,...]", help="Method, several joined by |, or a recipe file (YAML, JSON).")
]
Keep = Annotated[
    Any,
    typer.Option(
        metavar="N|F",
        parser=amount_of,
        help="Vision tokens to keep per image: a number (64) or a fraction (0.25). Default: the method's.",
    ),
]
NewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]


def ask(
    images: Pictures,
    question: Question,
    model: Model = None,
    text_tower: TextTower = None,
    method: MethodSpec = "visiontrim",
    keep: Keep = None,
    map_file: Annotated[Path | None, typer.Option("--map", metavar="FILE", help="Draw into it what was kept.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Ask the plain model as well, and show both.")] = False,
    max_new_tokens: NewTokens = 64,
    device: Device = "auto",
    dtype: Dtype = DtypeName.auto,
    as_json: Json = False,
) -> None:
    """Answer a question about a picture with fewer vision tokens."""
    from visiontrim.picture import captioned

    pictures, chosen, run = _prepare(
        images, method, keep, map_file, model=model, text_tower=text_tower, device=device, dtype=dtype
    )
    plain = None
    if compare:
        with status("asking the plain model"):
            run(pictures, question, chosen, max_new_tokens=1)  # the first call of a process is slow, whatever it is
            plain = run(pictures, question, "none", max_new_tokens=max_new_tokens)
    with status("asking"):
        answer = run(pictures, question, chosen, max_new_tokens=max_new_tokens)
    if map_file is not None:
        save_image(captioned(_maps(answer, images, pictures), f"{answer.run.method}, asked {question!r}"), map_file)
    if as_json:
        extra = {"model": model or "bundled"}
        extra |= {"map": str(map_file)} if map_file is not None else {}
        extra |= {"plain": plain.to_dict()} if plain is not None else {}
        print(json.dumps(answer.to_dict() | extra))
        return
    if plain is not None:
        console().print(answer.beside(plain))
    else:
        print(answer.text)
    console().print(str(answer.run.report), style="dim", soft_wrap=True)
    if map_file is not None:
        print(map_file)


def draw(
    image: Picture,
    question: Question,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Picture to write (PNG, JPEG, ...).")],
    model: Model = None,
    text_tower: TextTower = None,
    method: MethodSpec = "visiontrim",
    methods: Annotated[
        str | None, typer.Option(metavar="A,B[:K=V],...", help="Several methods side by side, instead of --method.")
    ] = None,
    keep: Keep = None,
    device: Device = "auto",
    dtype: Dtype = DtypeName.auto,
) -> None:
    """Draw which vision tokens stay clear, which are merged (tinted) and which are dropped (dark)."""
    from visiontrim.core.registry import load_method
    from visiontrim.picture import captioned, side_by_side

    names = [method] if methods is None else methods_of(methods)
    budget = {} if keep is None else {"keep": keep}
    chosen = [load_method(name, **budget if name != "none" else {}) for name in names]
    pictures, _, run = _prepare(
        [image], names[0], None, output, model=model, text_tower=text_tower, device=device, dtype=dtype
    )
    with status("asking"):
        maps = [_maps(run(pictures, question, one, max_new_tokens=1), [image], pictures) for one in chosen]
    if len(maps) == 1:
        drawn = captioned(maps[0], f"{chosen[0]}, asked {question!r}")
    else:
        drawn = captioned(side_by_side(maps, list(map(str, chosen))), f"asked {question!r}")
    save_image(drawn, output)
    print(output)


def _prepare(
    images: list[str], method: str, keep: int | float | None, output: Path | None, **model: Any
) -> tuple[list[Image], Method, Callable[..., Answer]]:
    """The pictures, the method, and what answers questions. Cheap mistakes are told before the model is loaded."""
    from visiontrim.core.registry import load_method

    chosen = load_method(method, **({} if keep is None else {"keep": keep}))
    if output is not None:
        check_output(output)
    pictures = [load_image(image) for image in images]
    with status(f"loading {model['model'] or 'the bundled model'}"):
        from visiontrim.ask import answer

        return pictures, chosen, functools.partial(answer, load_speaker(**model))


def _maps(answer: Answer, names: list[str], pictures: list[Image]) -> Image:
    """The token maps of all pictures, side by side under their names."""
    from visiontrim.picture import side_by_side

    maps = [answer.run.picture(picture, number) for number, picture in enumerate(pictures)]
    return maps[0] if len(maps) == 1 else side_by_side(maps, names)
