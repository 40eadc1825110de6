"""A real server on a free port of loopback."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from chatloom.serving.api import create_app
from chatloom.serving.engine import Engine
from chatloom.serving.options import Options

LINEAGE = {"git.revision": "abc", "dvc.model": "123.dir"}


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """Its address; a request waits in the socket until the server is up."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            address = f"http://127.0.0.1:{listening.getsockname()[1]}"
            httpx.get(f"{address}/health", timeout=30).raise_for_status()
            yield address
        finally:
            server.should_exit = True
            thread.join(timeout=30)
            assert not thread.is_alive()


@contextmanager
def serving(engine: Engine, **options: Any) -> Iterator[str]:
    with running(create_app(engine, "tiny", LINEAGE, version="3", options=Options(**options))) as address:
        yield address


def poll(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        threading.Event().wait(0.01)


def busy(address: str) -> bool:
    found: bool = httpx.get(f"{address}/health", timeout=10).json()["busy"]
    return found
