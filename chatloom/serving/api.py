"""The HTTP server: OpenAI's API over the version that is served now."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from chatloom.registry.resolve import Resolved
from chatloom.serving.answering import EventStream, events_of, read_whole, whole_response
from chatloom.serving.calls import AnyRequest, Call
from chatloom.serving.colossalchat import GenerationRequest, generate_events
from chatloom.serving.engine import Engine
from chatloom.serving.errors import ErrorBody, RequestError, add_error_handlers
from chatloom.serving.feedback import add_feedback
from chatloom.serving.gate import BodyLimit, KeyGate
from chatloom.serving.keys import KeyRing
from chatloom.serving.loading import make_served, native_model
from chatloom.serving.metrics import CONTENT_TYPE, Metrics
from chatloom.serving.options import Options
from chatloom.serving.records import Audit, Recorded
from chatloom.serving.schema import ChatRequest, CompletionRequest, refuse_unsupported
from chatloom.serving.served import Model, Served, Slot
from chatloom.serving.swap import Watcher
from chatloom.serving.web import add_page
from chatloom.serving.wire import ChatFormat, TextFormat, head_of
from chatloom.serving.words import read_words

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is refused; the message says why."},
    "5XX": {"model": ErrorBody, "description": "The server failed, or stops."},
}
ANSWER = "The answer; with `stream` as server-sent events."
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": ANSWER, "content": {"application/json": {}, "text/event-stream": {}}},
    **ERRORS,
}


@dataclass(frozen=True)
class Watch:
    """What makes a server swap by itself."""

    uri: str
    """`models:/name@alias`"""
    open_served: Callable[[Resolved], Served]


def create_app(
    model: Model | Engine,
    name: str,
    lineage: Mapping[str, str],
    *,
    version: str | None = None,
    options: Options | None = None,
    watch: Watch | None = None,
) -> FastAPI:
    """The server's routes.

    Args:
        name: what requests must call the model.
        lineage: shown by /v1/models: the data, code and parameters behind the model.
        version: of the registered model; None for a plain folder.
        watch: None serves this model until the server ends.

    Raises:
        InputError: where the model fails its self-check, or a file that `options` name cannot be read.
    """
    options = options or Options()
    dropping = replace(options, overflow="drop-oldest")
    loaded = native_model(model, options) if isinstance(model, Engine) else model
    slot = Slot(make_served(loaded, name, version, lineage, options))
    metrics = Metrics(slot)
    words = read_words(options.words) if options.words is not None else None

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        slot.current.scheduler.start()
        watcher = None
        if watch is not None and options.watch_seconds:
            watcher = Watcher(watch.uri, watch.open_served, slot, metrics)
            watcher.start(options.watch_seconds)
        yield
        if watcher is not None:
            await watcher.close()
        await slot.current.scheduler.close()

    # Its own pages of documentation would be fetched from the web.
    app = FastAPI(
        title="Chatloom", lifespan=lifespan, docs_url=None, redoc_url=None, middleware=_middleware(options, metrics)
    )
    app.state.slot = slot
    add_error_handlers(app)

    async def begin(body: AnyRequest, request: Request, options: Options = options) -> Call:
        refuse_unsupported(body)
        served = slot.current
        _check_name(body.model, served.name)
        call = Call(served, body, options, words, request.state.record)
        try:
            await call.start()
        except BaseException:
            call.close()
            raise
        return call

    async def answer(body: AnyRequest, request: Request, kind: type[ChatFormat | TextFormat]) -> Response:
        call = await begin(body, request)
        style = kind(head_of(call.served.name, call.served.fingerprint), call.served.model.prompts)
        if body.stream:
            return EventStream(call, events_of(call, style))
        return await whole_response(call, style, request)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether the process answers."""
        return {"status": "ok", "busy": slot.current.scheduler.in_flight > 0}

    @app.get("/ready", responses={503: {"model": ErrorBody}})
    async def ready() -> dict[str, Any]:
        """Whether requests would be answered now."""
        if not slot.current.scheduler.alive:
            raise RequestError("the engine is down", status=503)
        return {"status": "ready", "model": slot.current.name, "version": slot.current.version}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def prometheus() -> Response:
        return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    @app.get("/v1/models", responses=ERRORS)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [slot.current.card()]}

    @app.get("/v1/models/{model:path}", responses=ERRORS)
    async def one_model(model: str) -> dict[str, Any]:
        _check_name(model, slot.current.name)
        return slot.current.card()

    @app.post("/v1/chat/completions", responses=ANSWERS, response_class=JSONResponse)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await answer(body, request, ChatFormat)

    @app.post("/v1/completions", responses=ANSWERS, response_class=JSONResponse)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await answer(body, request, TextFormat)

    @app.post("/generate", responses=ERRORS)
    async def generate(body: GenerationRequest, request: Request) -> str:
        """ColossalChat's: the response as a JSON string."""
        call = await begin(body.as_chat(slot.current.name), request, dropping)
        choices = await read_whole(call, request)
        return choices[0].text.lstrip() if choices is not None else ""

    @app.post(
        "/generate/stream",
        responses={200: {"content": {"text/event-stream": {}}}, **ERRORS},
        response_class=Response,
    )
    async def generate_stream(body: GenerationRequest, request: Request) -> Response:
        """ColossalChat's: events `generate`, then `end`."""
        call = await begin(body.as_chat(slot.current.name), request, dropping)
        return EventStream(call, generate_events(call))

    add_page(app)
    if options.feedback is not None:
        add_feedback(app, options.feedback, ERRORS)
    return app


def _middleware(options: Options, metrics: Metrics) -> list[Middleware]:
    """From the outside in."""
    audit = Audit(options.audit, metrics) if options.audit is not None else None
    found = [Middleware(Recorded, metrics=metrics, audit=audit)]
    if options.cors:
        found.append(
            Middleware(
                CORSMiddleware,
                allow_origins=options.cors,
                allow_methods=["GET", "POST"],
                allow_headers=["Authorization", "Content-Type"],
                expose_headers=["Retry-After", "X-Request-Id"],
            )
        )
    if options.keys is not None:
        found.append(Middleware(KeyGate, ring=KeyRing(options.keys)))
    found.append(Middleware(BodyLimit, max_bytes=options.max_body, seconds=options.body_seconds))
    return found


def _check_name(asked: str, served: str) -> None:
    if asked != served:
        message = f"model {asked!r} is not served here: this server has {served!r}"
        raise RequestError(message, "model", status=404, code="model_not_found")
