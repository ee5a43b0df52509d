"""The command line: ``visiontrim ask | map | methods | models | cost | bench | zoo``."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from visiontrim.analyze.commands import app as analyze_app
from visiontrim.commands import bench, cost
from visiontrim.core.errors import TrimError
from visiontrim.evaluate.commands import app as evaluate_app
from visiontrim.evaluate.commands import split_methods
from visiontrim.images import check_output, load_image, save_image
from visiontrim.zoo.commands import app as zoo_app

if TYPE_CHECKING:  # torch and transformers take seconds to import: --help must not wait for them
    from PIL.Image import Image

    from visiontrim.ask import Answer
    from visiontrim.core.method import Method

app = typer.Typer(
    help="Faster vision-language models: remove vision tokens at inference, keep the answers.",
    epilog="Example:  visiontrim ask photo.png 'what color is the star?' --keep 64 --compare --map kept.png",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def _amount(text: str) -> int | float:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    raise typer.BadParameter(f"{text!r} is neither a number of tokens (64) nor a fraction (0.25)")


Picture = Annotated[str, typer.Argument(metavar="IMAGE", help="Path or URL of a picture, or - for standard input.")]
Pictures = Annotated[
    list[str],
    typer.Argument(
        metavar="IMAGE...", help="Path or URL of a picture, or - for standard input; several make one prompt."
    ),
]
Question = Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask about it.")]
Model = Annotated[
    str | None, typer.Option(metavar="ID_OR_DIR", help="Hub name or directory. Default: this package's small model.")
]
TextTower = Annotated[
    str | None,
    typer.Option(
        metavar="ID_OR_DIR",
        help="CLIP model that reads the question for methods that want it. Default: the small model's own; for other "
        "models the embeddings of their language model.",
    ),
]
MethodSpec = Annotated[
    str, typer.Option(metavar="NAME[:K=V,...]", help="Method, several joined by |, or a recipe file (YAML, JSON).")
]
Keep = Annotated[
    Any,
    typer.Option(
        metavar="N|F",
        parser=_amount,
        help="Vision tokens to keep per image: a number (64) or a fraction (0.25). Default: the method's.",
    ),
]
NewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ...; auto: an accelerator if there is one.")]
DtypeChoice = Annotated[Dtype, typer.Option(help="Of the weights; auto: the checkpoint's, float32 on the CPU.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"visiontrim {version('visiontrim')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


@app.command(
    epilog="Examples:  visiontrim ask photo.png 'is there a red star?' --keep 0.1 --compare\n\n"
    "visiontrim ask photo.jpg 'What is on the table?' --model llava-hf/llava-1.5-7b-hf "
    "--text-tower openai/clip-vit-large-patch14-336 --map kept.png\n\n"
    "curl -s https://example.org/a.jpg | visiontrim ask - 'how many objects?' --json"
)
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
    dtype: DtypeChoice = Dtype.auto,
    as_json: Json = False,
) -> None:
    """Answer a question about a picture with fewer vision tokens."""
    pictures, chosen, run = _prepare(
        images, method, keep, map_file, name=model, text_tower=text_tower, device=device, dtype=dtype.value
    )
    plain = None
    if compare:
        with _status("asking the plain model"):
            run(pictures, question, chosen, max_new_tokens=1)  # the first call of a process is slow, whatever it is
            plain = run(pictures, question, "none", max_new_tokens=max_new_tokens)
    with _status("asking"):
        answer = run(pictures, question, chosen, max_new_tokens=max_new_tokens)
    if map_file is not None:
        save_image(_maps(answer, images, pictures), map_file)
    if as_json:
        extra = {"model": model or "bundled"}
        extra |= {"map": str(map_file)} if map_file is not None else {}
        extra |= {"plain": plain.to_dict()} if plain is not None else {}
        print(json.dumps(answer.to_dict() | extra))
        return
    if plain is not None:
        _console().print(answer.beside(plain))
    else:
        print(answer.text)
    _console().print(str(answer.run.report), style="dim", soft_wrap=True)
    if map_file is not None:
        print(map_file)


@app.command("map", epilog="Example:  visiontrim map photo.png 'where is the 7?' -o kept.png --method visiontrim")
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
    dtype: DtypeChoice = Dtype.auto,
) -> None:
    """Draw which vision tokens stay clear, which are merged (tinted) and which are dropped (dark)."""
    from visiontrim.core.registry import load_method
    from visiontrim.picture import side_by_side

    names = [method] if methods is None else split_methods(methods)
    budget = {} if keep is None else {"keep": keep}
    chosen = [load_method(name, **budget if name != "none" else {}) for name in names]
    pictures, _, run = _prepare(
        [image], names[0], None, output, name=model, text_tower=text_tower, device=device, dtype=dtype.value
    )
    with _status("asking"):
        maps = [_maps(run(pictures, question, one, max_new_tokens=1), [image], pictures) for one in chosen]
    save_image(maps[0] if len(maps) == 1 else side_by_side(maps, list(map(str, chosen))), output)
    print(output)


@app.command("methods", epilog="Example:  visiontrim methods --json | jq '.[].name'")
def show_methods(as_json: Json = False) -> None:
    """List the methods with their papers and options."""
    from visiontrim.core.method import Layers
    from visiontrim.core.registry import list_methods

    rows = []
    for name, cls in list_methods().items():
        fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]  # methods are dataclasses
        rows.append(
            {
                "name": name,
                "stages": [str(step.site) for step in cls().steps_for(Layers(encoder=23, decoder=32))],
                "text_aware": cls.text_aware,
                "merges": cls.merges,
                "paper": cls.paper,
                "summary": cls.summary,
                "options": {field.name: field.default for field in fields},
            }
        )
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("method", "stages", "reads the question", "merges", "options", "summary", "paper")
    for row in rows:
        options = ", ".join(f"{option}={default}" for option, default in row["options"].items())
        flags = ["yes" if row[flag] else "" for flag in ("text_aware", "merges")]
        stages = row["stages"] if len(row["stages"]) <= 4 else [row["stages"][0], "...", row["stages"][-1]]
        table.add_row(row["name"], ", ".join(stages), *flags, options, row["summary"], row["paper"])
    _console().print(table)


@app.command("models", epilog="Example:  visiontrim models --json | jq '.[].model_type'")
def show_models(
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of docs/models.md.")] = False,
) -> None:
    """List the families of models, and what works with each."""
    from visiontrim.models import list_families

    rows = [{"model_type": name} | family.supports() for name, family in list_families().items()]
    if as_json:
        print(json.dumps(rows))
        return
    titles = {key: key.replace("_", " ") for key in rows[0]}
    cells = [[_cell(row[key]) for key in titles] for row in rows]
    if markdown:
        for line in ([*titles.values()], ["---"] * len(titles), *cells):
            print(f"| {' | '.join(line)} |")
        return
    table = Table(*titles.values())
    for line in cells:
        table.add_row(*line)
    _console().print(table)


app.add_typer(evaluate_app)
app.command(epilog=cost.EPILOG)(cost.cost)
app.command(epilog=bench.EPILOG)(bench.bench)
app.add_typer(analyze_app, name="analyze")
app.add_typer(zoo_app, name="zoo")


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list) else str(value)


def _prepare(
    images: list[str], method: str, keep: int | float | None, output: Path | None, **model: Any
) -> tuple[list[Image], Method, Callable[..., Answer]]:
    """The pictures, the method, and what answers questions. Cheap mistakes are told before the model is loaded."""
    from visiontrim.core.registry import load_method

    chosen = load_method(method, **({} if keep is None else {"keep": keep}))
    if output is not None:
        check_output(output)
    pictures = [load_image(image) for image in images]
    with _status(f"loading {model['name'] or 'the bundled model'}"):
        from huggingface_hub.utils import logging as hub_logging
        from transformers.utils import logging

        from visiontrim.ask import answer, load

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        hub_logging.set_verbosity_error()
        return pictures, chosen, functools.partial(answer, load(**model))


def _maps(answer: Answer, names: list[str], pictures: list[Image]) -> Image:
    """The token maps of all pictures, side by side under their names."""
    from visiontrim.picture import side_by_side

    maps = [answer.run.picture(picture, number) for number, picture in enumerate(pictures)]
    return maps[0] if len(maps) == 1 else side_by_side(maps, names)


def _console() -> Console:
    # A pipe has no width: rich would wrap tables at 80 columns.
    return Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)


@contextmanager
def _status(text: str) -> Iterator[None]:
    """A spinner on standard error while something takes its time; nothing where that is no terminal."""
    console = Console(stderr=True)
    with console.status(f"{escape(text)} ...") if console.is_terminal else nullcontext():
        yield


def main() -> None:
    """Entry point of the ``visiontrim`` command: mistakes of the user end in one sentence and exit code 2."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of libraries; what a user must know is said by this program
    try:
        app()
    except TrimError as error:
        print(f"visiontrim: {error}", file=sys.stderr)
        sys.exit(2)
