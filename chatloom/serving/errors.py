"""Every error as OpenAI's error body, which its clients turn into their exceptions."""

from __future__ import annotations

import json
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from chatloom.errors import InputError
from chatloom.serving.scheduler import Busy, EngineFailure, Stopped


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What every refused request gets."""

    error: ErrorDetail


class RequestError(InputError):
    """A request that cannot be honoured, with the parameter at fault and OpenAI's code for it."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


def error_body(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> str:
    # Plain ASCII: the request's own words may be in it, half a surrogate pair among them.
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    kind: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    kind = kind or ("invalid_request_error" if status < 500 else "server_error")
    return Response(error_body(message, kind, param=param, code=code), status, headers, media_type="application/json")


def failure_body(failure: EngineFailure | Stopped) -> str:
    """For a stream, whose status is out already."""
    if isinstance(failure, Stopped):
        return error_body(str(failure), "server_error", code="server_stopping")
    return error_body(f"{failure}; the server's log says why", "server_error")


def add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            reason = first.get("ctx", {}).get("error", first["msg"])
            return error_response(400, f"the body is not valid JSON: {reason}")
        param = _dotted(first["loc"][1:])
        message = first["msg"].removeprefix("Value error, ")
        return error_response(400, f"{param or 'the body'}: {message[0].lower()}{message[1:]}", param=param)

    @app.exception_handler(InputError)
    async def refused(_: Request, error: InputError) -> Response:
        if isinstance(error, RequestError):
            return error_response(error.status, str(error), param=error.param, code=error.code)
        return error_response(400, str(error))

    @app.exception_handler(Busy)
    async def busy(_: Request, error: Busy) -> Response:
        headers = {"Retry-After": str(error.retry_after)}
        return error_response(429, str(error), headers=headers, kind="server_busy", code="server_busy")

    @app.exception_handler(EngineFailure)
    async def failed(_: Request, error: EngineFailure) -> Response:
        return Response(failure_body(error), 500, media_type="application/json")

    @app.exception_handler(Stopped)
    async def stopped(_: Request, error: Stopped) -> Response:
        return Response(failure_body(error), 503, {"Retry-After": "5"}, media_type="application/json")

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return error_response(error.status_code, message, headers=error.headers)

    @app.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> Response:
        # The traceback goes to the log, not to the client.
        return error_response(500, "the server failed; its log says why")


def _dotted(location: tuple[int | str, ...]) -> str | None:
    """`("messages", 0, "role")` as `messages[0].role`."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".") or None
