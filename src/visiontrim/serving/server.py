"""Chat completions of OpenAI over one model with a method: routes, limits, streams and numbers for a monitor.

Knows HTTP; it does not know how batches are made and answered.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import ValidationError

from visiontrim.core.errors import TrimError
from visiontrim.core.method import Method
from visiontrim.core.registry import load_method
from visiontrim.serving.batching import Batcher, Done, Failed, FullError, Job
from visiontrim.serving.requests import ChatRequest, Limits, Trim, conversation


class RefusedError(Exception):
    """A request that is not answered, with its status."""

    def __init__(self, status: int, text: str, **headers: str) -> None:
        super().__init__(text)
        self.status, self.headers = status, headers


class Numbers:
    """What a monitor reads at ``/metrics``."""

    def __init__(self, batcher: Batcher) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("visiontrim_requests", "Requests by status", ["status"], registry=registry)
        self.tokens = Counter("visiontrim_answer_tokens", "Tokens of answers", registry=registry)
        self.vision = Counter("visiontrim_vision_tokens", "Vision tokens before compression", registry=registry)
        self.kept = Counter("visiontrim_vision_tokens_kept", "Vision tokens after it", registry=registry)
        self.seconds = Histogram("visiontrim_seconds", "Of whole requests", registry=registry)
        self.batch = Histogram(
            "visiontrim_batch_rows", "Rows of a batch", buckets=(1, 2, 4, 8, 16, 32), registry=registry
        )
        Gauge("visiontrim_waiting", "Requests that wait", registry=registry).set_function(lambda: batcher.waiting)
        batcher.on_batch = self.batch.observe

    def answered(self, done: Done) -> None:
        self.tokens.inc(done.answer_tokens)
        for image in (done.report or {}).get("images", ()):
            self.vision.inc(image["tokens"])
            self.kept.inc(image["kept"])


@dataclass(frozen=True)
class Settings:
    """What a server is asked for beside its model."""

    name: str
    """Of the model, to clients."""
    method: Method
    """For requests that say nothing else."""
    limits: Limits = field(default_factory=Limits)
    api_key: str | None = None


def build(batcher: Batcher, settings: Settings) -> FastAPI:
    """The application; it closes ``batcher`` when it ends."""
    numbers = Numbers(batcher)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close)

    app = FastAPI(title="visiontrim", lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> JSONResponse:
        return JSONResponse(_error(str(error), error.status), error.status, headers=error.headers)

    @app.middleware("http")
    async def counted(request: Request, follow: Any) -> Any:
        response = await follow(request)
        if request.url.path.startswith("/v1/"):
            numbers.requests.labels(response.status_code).inc()
        return response

    @app.get("/health")
    async def health() -> JSONResponse:
        status = 200 if batcher.alive else 503
        return JSONResponse({"status": "ok" if batcher.alive else "stopped", "waiting": batcher.waiting}, status)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(numbers.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        _check_key(request, settings.api_key)
        return {"object": "list", "data": [{"id": settings.name, "object": "model", "owned_by": "visiontrim"}]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        begun = time.monotonic()
        _check_key(request, settings.api_key)
        body = await _body(request, settings.limits.body_bytes)
        asked, job, events = await asyncio.to_thread(_job, body, batcher, settings, asyncio.get_running_loop())
        try:
            batcher.submit(job)
        except FullError:
            raise RefusedError(429, "too many requests wait: try again", **{"Retry-After": "1"}) from None
        made, ident = int(time.time()), f"chatcmpl-{uuid.uuid4().hex}"
        head = {"id": ident, "created": made, "model": settings.name}
        try:
            first = await _next(events, request)  # an error has a status only before the first byte
        except BaseException:
            job.cancelled.set()
            raise
        if asked.stream:
            return StreamingResponse(
                _stream(job, events, first, head, asked, numbers, begun), media_type="text/event-stream"
            )
        text = ""
        try:
            event = first
            while isinstance(event, str):
                text += event
                event = await _next(events, request)
        finally:
            job.cancelled.set()
        numbers.answered(event)
        numbers.seconds.observe(time.monotonic() - begun)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": event.reason}
        return JSONResponse(
            {
                **head,
                "object": "chat.completion",
                "choices": [choice],
                "usage": _usage(event),
                "visiontrim": event.report,
            }
        )

    return app


def _job(
    body: bytes, batcher: Batcher, settings: Settings, loop: asyncio.AbstractEventLoop
) -> tuple[ChatRequest, Job, asyncio.Queue]:
    try:
        asked = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the body"
        raise RefusedError(400, f"{where}: {first['msg']}") from None
    if asked.model not in (None, settings.name):
        raise RefusedError(404, f"there is no model {asked.model!r}: this server has {settings.name!r}")
    try:
        read = conversation(batcher.speaker, asked, settings.limits)
        method = _method(asked.visiontrim, settings.method)
        stops = asked.stops()
    except TrimError as error:
        raise RefusedError(400, str(error)) from None
    events: asyncio.Queue = asyncio.Queue()

    def tell(event: str | Done | Failed) -> None:
        with suppress(RuntimeError):  # the server has ended
            loop.call_soon_threadsafe(events.put_nowait, event)

    limits = settings.limits
    wanted = asked.max_completion_tokens or asked.max_tokens or limits.default_new_tokens
    job = Job(
        read.prompt,
        read.images,
        read.question if asked.visiontrim.question is None else asked.visiontrim.question,
        method if read.images else None,
        min(wanted, limits.new_tokens),
        tell,
        asked.temperature or 0.0,
        1.0 if asked.top_p is None else asked.top_p,
        asked.seed,
        stops,
    )
    return asked, job, events


def _method(trim: Trim, default: Method) -> Method:
    budget = {} if trim.keep is None else {"keep": trim.keep}
    if trim.method is None:
        return load_method(default, **budget)
    if trim.method.endswith((".json", ".yaml", ".yml")):
        raise TrimError("recipe files are not read for clients: write the method as name:option=value")
    return load_method(trim.method, **budget)


async def _next(events: asyncio.Queue, request: Request) -> str | Done:
    """The next event, unless the client is gone. Raises :class:`RefusedError` for a failure."""
    while True:
        try:
            event = await asyncio.wait_for(events.get(), timeout=1.0)
        except TimeoutError:
            if await request.is_disconnected():
                raise RefusedError(499, "the client is gone") from None
            continue
        if isinstance(event, Failed):
            raise RefusedError(500 if event.fault else 400, event.text)
        return event


async def _stream(
    job: Job, events: asyncio.Queue, event: Any, head: dict, asked: ChatRequest, numbers: Numbers, begun: float
) -> AsyncIterator[str]:
    def chunk(choices: list[dict], **more: Any) -> str:
        return f"data: {json.dumps({**head, 'object': 'chat.completion.chunk', 'choices': choices, **more})}\n\n"

    def choice(delta: dict, reason: str | None = None) -> list[dict]:
        return [{"index": 0, "delta": delta, "finish_reason": reason}]

    try:
        yield chunk(choice({"role": "assistant", "content": ""}))
        while isinstance(event, str):
            yield chunk(choice({"content": event}))
            event = await events.get()
        if isinstance(event, Failed):
            yield f"data: {json.dumps(_error(event.text, 500 if event.fault else 400))}\n\n"
        else:
            yield chunk(choice({}, event.reason), visiontrim=event.report)
            if asked.stream_options and asked.stream_options.include_usage:
                yield chunk([], usage=_usage(event))
            numbers.answered(event)
            numbers.seconds.observe(time.monotonic() - begun)
        yield "data: [DONE]\n\n"
    finally:  # also where the client is gone
        job.cancelled.set()


async def _body(request: Request, limit: int) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise RefusedError(413, f"the request has more than {limit:,} bytes: send a smaller one")
        parts.append(part)
    return b"".join(parts)


def _check_key(request: Request, key: str | None) -> None:
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if key is not None and not hmac.compare_digest(given.encode(), key.encode()):
        raise RefusedError(401, "the API key is wrong, or missing: send Authorization: Bearer KEY")


def _usage(done: Done) -> dict[str, int]:
    total = done.prompt_tokens + done.answer_tokens
    return {"prompt_tokens": done.prompt_tokens, "completion_tokens": done.answer_tokens, "total_tokens": total}


def _error(text: str, status: int) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": text, "type": kind, "code": status}}
