"""The command line: ``visiontrim --help`` lists its commands, each a module of :mod:`visiontrim.commands`."""

from __future__ import annotations

import shlex
import sys
import warnings
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from visiontrim.commands import (
    analyze,
    ask,
    batch,
    bench,
    cost,
    demo,
    doctor,
    evaluate,
    listing,
    reproduce,
    score,
    serve,
    zoo,
)
from visiontrim.commands.options import Command
from visiontrim.commands.progress import stoppable
from visiontrim.core.errors import TrimError


class _Stoppable(TyperGroup):
    """Ctrl-C ends every command with one line; those that keep something say what."""

    def invoke(self, ctx: Any) -> Any:
        with stoppable("nothing was kept, and the same command starts anew"):
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Stoppable,
    help="Faster vision-language models: remove vision tokens at inference, keep the answers.",
    epilog="Example:  visiontrim ask photo.png 'what color is the star?' --keep 64 --compare --map kept.png",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


TRACEBACK = "--traceback"


def _version(wanted: bool) -> None:
    if wanted:
        print(f"visiontrim {version('visiontrim')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    traceback: Annotated[bool, typer.Option(TRACEBACK, help="Show where an error came from: for reports.")] = False,
) -> None: ...


app.command(cls=Command, epilog=ask.ASK_EPILOG)(ask.ask)
app.command("map", cls=Command, epilog=ask.MAP_EPILOG)(ask.draw)
app.command("methods", cls=Command, epilog=listing.METHODS_EPILOG)(listing.show_methods)
app.command("models", cls=Command, epilog=listing.MODELS_EPILOG)(listing.show_models)
app.command("eval", cls=Command, epilog=evaluate.EVAL_EPILOG)(evaluate.evaluate)
app.command(cls=Command, epilog=score.EPILOG)(score.score)
app.command(cls=Command, epilog=reproduce.EPILOG)(reproduce.reproduce)
app.command(cls=Command, epilog=evaluate.TUNE_EPILOG)(evaluate.tune)
app.command(cls=Command, epilog=batch.EPILOG)(batch.batch)
app.command(cls=Command, epilog=serve.EPILOG)(serve.serve)
app.command(cls=Command, epilog=demo.EPILOG)(demo.demo)
app.command(cls=Command, epilog=cost.EPILOG)(cost.cost)
app.command(cls=Command, epilog=bench.EPILOG)(bench.bench)
app.command(cls=Command, epilog=analyze.EPILOG)(analyze.analyze)
app.command(cls=Command, epilog=doctor.EPILOG)(doctor.doctor)
app.add_typer(zoo.app, name="zoo")


def main() -> None:
    """The command ``visiontrim``. Exit codes: 2 for what a user can mend, 1 for a fault of its own, 130 for Ctrl-C."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of libraries; what a user must know is said by this program
    try:
        app()
    except Exception as error:
        if TRACEBACK in sys.argv[1:2]:
            raise
        known = isinstance(error, TrimError)
        print(f"visiontrim: {error if known else _fault(error)}", file=sys.stderr)
        sys.exit(2 if known else 1)


def _fault(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    about = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    command = shlex.join(["visiontrim", TRACEBACK, *sys.argv[1:]])
    return f"a fault of this program, not of yours ({about}): please report what `{command}` prints"
