"""Who comes in, and with how much: API keys and their rates, the size of a body and the time it takes to arrive."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chatloom.serving.errors import error_response
from chatloom.serving.keys import KeyRing

GUARDED = ("/v1/", "/generate")
"""Beginnings of the paths that need a key; the page, health and metrics need none."""


class KeyGate:
    """Lets requests with a known key through; the key's holder is in the request's state as `holder`."""

    def __init__(self, app: ASGIApp, ring: KeyRing) -> None:
        self._app, self._ring = app, ring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(GUARDED):
            await self._app(scope, receive, send)
            return
        scheme, _, secret = Headers(scope=scope).get("authorization", "").partition(" ")
        holder = self._ring.find(secret.strip()) if scheme.lower() == "bearer" else None
        if holder is None:
            said = "the API key is not known here" if secret else "give an API key: Authorization: Bearer cl-..."
            headers = {"WWW-Authenticate": "Bearer"}
            await error_response(401, said, headers=headers, code="invalid_api_key")(scope, receive, send)
            return
        scope.setdefault("state", {})["holder"] = holder
        if wait := holder.admit():
            message = f"the key {holder.key.name!r} is over its rate: try again in {wait} s"
            headers = {"Retry-After": str(wait)}
            refusal = error_response(429, message, headers=headers, kind="requests", code="rate_limit_exceeded")
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)


class BodyLimit:
    """Refuses bodies that are too large, announced or not, and those that take too long to come."""

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float) -> None:
        self._app, self._max_bytes, self._seconds = app, max_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        deadline = time.monotonic() + self._seconds
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced) > self._max_bytes:
            await _drain(receive, deadline)
            refusal = error_response(413, self._too_large(), code="request_too_large")
            await refusal(scope, receive, send)
            return
        received, complete = 0, False

        async def limited() -> Message:
            nonlocal received, complete
            if complete:  # what comes now is that the client leaves
                return await receive()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    message = await receive()
            except TimeoutError as error:
                raise HTTPException(408, f"the body did not come within {self._seconds:g} s") from error
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > self._max_bytes:
                if not complete:
                    await _drain(receive, deadline)
                raise HTTPException(413, self._too_large())
            return message

        await self._app(scope, limited, send)

    def _too_large(self) -> str:
        return f"the body has more than {self._max_bytes} bytes: shorten it"


async def _drain(receive: Receive, deadline: float) -> None:
    """Take what still comes and keep nothing: a client that is not listened to never reads why it was refused."""
    with suppress(TimeoutError):
        async with asyncio.timeout(deadline - time.monotonic()):
            while (await receive()).get("more_body", False):
                pass
