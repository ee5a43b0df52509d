"""``visiontrim serve``: a model with a method behind an address that OpenAI's clients can use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from visiontrim.commands.ask import Keep, MethodSpec
from visiontrim.commands.options import Device, Dtype, DtypeName, Model, TextTower, Threads, load_speaker, status
from visiontrim.core.errors import TrimError

EPILOG = (
    "Example:  visiontrim serve --keep 64, then base_url='http://127.0.0.1:8000/v1' in a client of OpenAI's; "
    '"visiontrim": {"keep": 32} in a request changes the budget. For real load take the plug-in for vLLM.'
)


def serve(
    model: Model = None,
    text_tower: TextTower = None,
    method: MethodSpec = "visiontrim",
    keep: Keep = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="Of the model, to clients. Default: as it was loaded.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Requests that are answered at once.")] = 8,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are refused.")] = 64,
    max_prompt: Annotated[int, typer.Option(min=1, help="Longest prompt, in tokens before compression.")] = 8192,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 1024,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Its first line is the key that clients must send.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = DtypeName.auto,
    threads: Threads = None,
) -> None:
    """Serve a model with a method over HTTP, as OpenAI's chat completions."""
    try:
        import uvicorn

        from visiontrim.serving.server import Settings, build
    except ImportError as error:
        raise TrimError(f"serve needs {error.name}: pip install 'visiontrim[serve]'") from error
    from visiontrim.core.registry import load_method
    from visiontrim.run import trim
    from visiontrim.serving.batching import Batcher
    from visiontrim.serving.requests import Limits

    chosen = load_method(method, **({} if keep is None else {"keep": keep}))
    key = None if api_key_file is None else _key(api_key_file)
    with status(f"loading {model or 'the bundled model'}"):
        speaker = load_speaker(model, text_tower, device, dtype, threads)
        trim(speaker.model, chosen, text_tower=speaker.text_tower, processor=speaker.processor)  # refuses at once
    batcher = Batcher(speaker, max_batch, max_waiting, max_prompt)
    limits = Limits(new_tokens=max_new_tokens, default_new_tokens=min(256, max_new_tokens))
    app = build(batcher, Settings(name or speaker.name, chosen, limits, key))
    uvicorn.run(app, host=host, port=port, log_level="info", access_log=False, timeout_graceful_shutdown=60)


def _key(path: Path) -> str:
    """A key in a file is seen neither in a list of processes nor in a shell's history."""
    try:
        key = path.read_text(encoding="utf-8").partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise TrimError(f"--api-key-file {path} cannot be read ({error})") from error
    if not key:
        raise TrimError(f"--api-key-file {path} is empty: write the key into it")
    return key
