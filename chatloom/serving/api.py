"""OpenAI-compatible HTTP server of one engine."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from typing import Any

import anyio
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from chatloom.errors import InputError
from chatloom.models.sampling import Sampling
from chatloom.serving.engine import ContextLengthError, Engine, Generation
from chatloom.serving.schema import ChatRequest, RequestError, refuse_unsupported

log = logging.getLogger(__name__)


def create_app(engine: Engine, model_name: str, lineage: Mapping[str, str], *, version: str | None = None) -> FastAPI:
    """The server's routes.

    Args:
        model_name: what requests must call the model.
        lineage: shown by /v1/models: the data, code and parameters behind the model.
        version: of the registered model; None for a plain folder.
    """
    # One thread: generation has the processor anyway, waiting requests stand in its queue, and one that is given up
    # while it waits leaves the queue without ever starting.
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generate")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        executor.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="Chatloom", lifespan=lifespan)
    _add_error_handlers(app)
    card = {
        "id": model_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "chatloom",
        "version": version,
        "lineage": dict(lineage),
    }
    fingerprint = f"{model_name}/{version}" if version is not None else model_name

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "busy": engine.busy}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _check_name(name, model_name)
        return card

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        _check_name(body.model, model_name)
        refuse_unsupported(body)
        # Tokenising a long conversation takes a while: not on the event loop.
        generation = await anyio.to_thread.run_sync(_start, engine, body)
        head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model_name,
            "system_fingerprint": fingerprint,
        }
        if body.stream:
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            return _EventStream(generation, _events(generation, executor, head, include_usage))
        return await _complete(generation, executor, head, request)

    return app


def _start(engine: Engine, body: ChatRequest) -> Generation:
    prompt_ids = engine.encode(body.to_messages())
    sampling = Sampling(
        max_new_tokens=engine.room(prompt_ids, body.asked_tokens),
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
    )
    return engine.generate(prompt_ids, sampling, seed=body.seed, stop=body.stop)


async def _deltas(generation: Generation, executor: Executor) -> AsyncGenerator[str, None]:
    """The deltas as they come from the generating thread; leaving early stops it at its next token."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[str | None] = asyncio.Queue()

    def work() -> None:
        try:
            for delta in generation:
                loop.call_soon_threadsafe(queue.put_nowait, delta)
        finally:
            loop.call_soon_threadsafe(queue.put_nowait, None)

    working = loop.run_in_executor(executor, work)
    try:
        while (delta := await queue.get()) is not None:
            yield delta
        await working  # raises what generation raised
    finally:
        generation.cancel()
        working.cancel()


async def _complete(generation: Generation, executor: Executor, head: dict[str, Any], request: Request) -> Response:
    parts: list[str] = []

    async def read() -> None:
        async with aclosing(_deltas(generation, executor)) as deltas:
            async for delta in deltas:
                parts.append(delta)

    reading = asyncio.ensure_future(read())
    leaving = asyncio.ensure_future(_until_disconnect(request))
    try:
        await asyncio.wait((reading, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            log.info("the client left: its answer is stopped after %d tokens", generation.completion_tokens)
            return Response(status_code=499)  # nobody reads it
        reading.result()
    finally:
        reading.cancel()
        leaving.cancel()
    message = {"role": "assistant", "content": "".join(parts), "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": generation.finish_reason}
    return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": _usage(generation)})


async def _until_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _EventStream(StreamingResponse):
    """Server-sent events; the generation ends with the response, however that ends."""

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, events: AsyncGenerator[str, None]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._generation, self._events = generation, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
            if self._generation.finish_reason is None:
                log.info("the client left: its answer is stopped after %d tokens", self._generation.completion_tokens)
        finally:
            self._generation.cancel()
            await self._events.aclose()


async def _events(
    generation: Generation, executor: Executor, head: dict[str, Any], include_usage: bool
) -> AsyncGenerator[str, None]:
    def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return event([choice], None)

    def event(choices: list[dict[str, Any]], usage: dict[str, int] | None) -> str:
        body = {**head, "object": "chat.completion.chunk", "choices": choices}
        if include_usage:
            body["usage"] = usage
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    yield chunk({"role": "assistant", "content": ""})
    async with aclosing(_deltas(generation, executor)) as deltas:
        async for delta in deltas:
            yield chunk({"content": delta})
    yield chunk({}, generation.finish_reason)
    if include_usage:
        yield event([], _usage(generation))
    yield "data: [DONE]\n\n"


def _usage(generation: Generation) -> dict[str, int]:
    return {
        "prompt_tokens": generation.prompt_tokens,
        "completion_tokens": generation.completion_tokens,
        "total_tokens": generation.prompt_tokens + generation.completion_tokens,
    }


def _check_name(asked: str, served: str) -> None:
    if asked != served:
        message = f"model {asked!r} is not served here: this server has {served!r}"
        raise RequestError(message, "model", status=404, code="model_not_found")


def _add_error_handlers(app: FastAPI) -> None:
    """Every error as OpenAI's error body, which its clients turn into their exceptions."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            reason = first.get("ctx", {}).get("error", first["msg"])
            return _error(400, f"the body is not valid JSON: {reason}")
        param = _dotted(first["loc"][1:])
        message = first["msg"].removeprefix("Value error, ")
        return _error(400, f"{param or 'the body'}: {message[0].lower()}{message[1:]}", param=param)

    @app.exception_handler(InputError)
    async def refused(_: Request, error: InputError) -> Response:
        if isinstance(error, RequestError):
            return _error(error.status, str(error), param=error.param, code=error.code)
        code = "context_length_exceeded" if isinstance(error, ContextLengthError) else None
        return _error(400, str(error), param="messages", code=code)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return _error(error.status_code, f"{request.method} {request.url.path}: {error.detail}")

    @app.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> Response:
        # The traceback goes to the log, not to the client.
        return _error(500, "the server failed; its log says why", kind="server_error")


def _dotted(location: tuple[int | str, ...]) -> str | None:
    """`("messages", 0, "role")` as `messages[0].role`."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".") or None


def _error(
    status: int, message: str, *, param: str | None = None, code: str | None = None, kind: str = "invalid_request_error"
) -> Response:
    body = {"message": message, "type": kind, "param": param, "code": code}
    # Plain ASCII: the request's own words may be in it, half a surrogate pair among them.
    return Response(json.dumps({"error": body}), status, media_type="application/json")
