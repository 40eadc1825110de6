"""One record a request: for the metrics, for the audit log, and for the rate of its key."""

from __future__ import annotations

import json
import logging
import time
import uuid
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chatloom.serving.gate import GUARDED
from chatloom.serving.metrics import Metrics

log = logging.getLogger(__name__)

METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
LEFT = 499
"""Status in records where the client left; it never sees one."""


@dataclass
class Record:
    id: str
    at: str
    """In UTC, ISO 8601."""
    method: str
    path: str
    key: str | None = None
    """Name of the API key."""
    model: str | None = None
    status: int = LEFT
    seconds: float = 0.0
    first_token_seconds: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reasons: list[str | None] = field(default_factory=list)
    """Of each choice; None where nobody waited for its end."""
    prompts: list[str] | None = None
    """Texts of the request, only where bodies are wanted, as `answers`."""
    answers: list[str] | None = None


class Audit:
    """A JSON line a request, at the end of a file. A full disk costs lines, not answers."""

    def __init__(self, path: Path, metrics: Metrics) -> None:
        self._path, self._metrics = path, metrics
        self._whole = True
        """Whether the last line was written to its end."""

    def write(self, record: Record) -> None:
        values = {key: value for key, value in asdict(record).items() if key not in ("prompts", "answers") or value}
        line = json.dumps(values, ensure_ascii=True) + "\n"
        try:
            with self._path.open("a", encoding="utf-8") as file:  # anew each time: it may have been rotated away
                file.write(line if self._whole else f"\n{line}")
        except OSError as error:
            if self._whole:
                log.error("the audit log %s lacks lines from now on: %s", self._path, error)
            self._whole = False
            self._metrics.audit_failures.inc()
        else:
            self._whole = True


class Recorded:
    """Keeps the record of each request, in its state as `record`; its id is the header X-Request-Id."""

    def __init__(self, app: ASGIApp, metrics: Metrics, audit: Audit | None) -> None:
        self._app, self._metrics, self._audit = app, metrics, audit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = Record(
            f"req-{uuid.uuid4().hex}",
            datetime.now(UTC).isoformat(timespec="milliseconds"),
            scope["method"],
            scope["path"],
        )
        state: dict[str, Any] = scope.setdefault("state", {})
        state["record"] = record
        started = time.perf_counter()

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = record.id
            await send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            record.seconds = round(time.perf_counter() - started, 4)
            self._tell(record, scope)

    def _tell(self, record: Record, scope: Scope) -> None:
        holder = scope["state"].get("holder")
        if holder is not None:
            record.key = holder.key.name
            holder.spend(record.prompt_tokens + record.completion_tokens)
        # The route's own path: one label for all that has a name or an id in it.
        path = getattr(scope.get("route"), "path", "other")
        method = record.method if record.method in METHODS else "other"
        self._metrics.requests.labels(path, method, str(record.status)).inc()
        if None in record.finish_reasons:
            self._metrics.unfinished.inc()
        self._metrics.seconds.labels(path).observe(record.seconds)
        self._metrics.tokens.labels("prompt").inc(record.prompt_tokens)
        self._metrics.tokens.labels("completion").inc(record.completion_tokens)
        if record.first_token_seconds is not None:
            self._metrics.first_token.observe(record.first_token_seconds)
        if self._audit is not None and record.path.startswith(GUARDED):
            self._audit.write(record)
