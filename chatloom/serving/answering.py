"""A call as a response: whole, or as events while it is made. However either ends, the call is closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from chatloom.serving.calls import Call
from chatloom.serving.errors import failure_body
from chatloom.serving.records import LEFT
from chatloom.serving.scheduler import EngineFailure, Stopped
from chatloom.serving.wire import Format, Whole, event


async def whole_response(call: Call, style: Format, request: Request) -> Response:
    """All choices in one body; making them stops when the client leaves."""
    choices = await read_whole(call, request)
    if choices is None:
        return Response(status_code=LEFT)  # nobody reads it
    body = [style.whole(index, choice) for index, choice in enumerate(choices)]
    return JSONResponse({**style.head, "object": style.whole_object, "choices": body, "usage": call.usage})


async def read_whole(call: Call, request: Request) -> list[Whole] | None:
    """The choices when all are complete; None where the client leaves before."""
    choices = [Whole() for _ in range(call.num_choices)]

    async def read() -> None:
        async with aclosing(call.deltas()) as deltas:
            async for delta in deltas:
                choices[delta.choice].add(delta)

    reading = asyncio.ensure_future(read())
    leaving = asyncio.ensure_future(_until_disconnect(request))
    try:
        await asyncio.wait((reading, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            return None
        reading.result()
        return choices
    finally:
        reading.cancel()
        leaving.cancel()
        call.close()


class EventStream(StreamingResponse):
    """Server-sent events; the call ends with the response."""

    media_type = "text/event-stream"

    def __init__(self, call: Call, events: AsyncGenerator[str, None]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._call, self._events = call, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._call.close()
            await self._events.aclose()


async def events_of(call: Call, style: Format) -> AsyncGenerator[str, None]:
    """OpenAI's events. What fails on the way is an event too: the status is out already."""
    usage = {"usage": None} if call.body.include_usage else {}

    def chunk(choice: dict[str, Any]) -> str:
        return event({**style.head, "object": style.piece_object, "choices": [choice], **usage})

    for index in range(call.num_choices):
        if (opening := style.opening(index)) is not None:
            yield chunk(opening)
    try:
        async with aclosing(call.deltas()) as deltas:
            async for delta in deltas:
                if delta.text:
                    yield chunk(style.piece(delta))
                if delta.finish_reason is not None:
                    yield chunk(style.ending(delta.choice, delta.finish_reason))
    except (EngineFailure, Stopped) as failure:
        yield event(failure_body(failure))
        return
    if usage:
        yield event({**style.head, "object": style.piece_object, "choices": [], "usage": call.usage})
    yield event("[DONE]")


async def _until_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
