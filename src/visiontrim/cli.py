"""The command line: ``visiontrim --help`` lists its commands, each a module of :mod:`visiontrim.commands`."""

from __future__ import annotations

import shlex
import sys
import warnings
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from visiontrim.commands import analyze, ask, bench, cost, evaluate, listing, reproduce, score, zoo
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


app.command(epilog=ask.ASK_EPILOG)(ask.ask)
app.command("map", epilog=ask.MAP_EPILOG)(ask.draw)
app.command("methods", epilog=listing.METHODS_EPILOG)(listing.show_methods)
app.command("models", epilog=listing.MODELS_EPILOG)(listing.show_models)
app.command("eval", epilog=evaluate.EVAL_EPILOG)(evaluate.evaluate)
app.command(epilog=score.EPILOG)(score.score)
app.command(epilog=reproduce.EPILOG)(reproduce.reproduce)
app.command(epilog=evaluate.TUNE_EPILOG)(evaluate.tune)
app.command(epilog=cost.EPILOG)(cost.cost)
app.command(epilog=bench.EPILOG)(bench.bench)
app.command(epilog=analyze.EPILOG)(analyze.analyze)
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
