"""Real servers on free ports of loopback."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import httpx
import uvicorn
from fastapi import FastAPI

T = TypeVar("T")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """Its address; a request waits in the socket until the server is up."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            address = f"http://127.0.0.1:{listening.getsockname()[1]}"
            httpx.get(f"{address}/", timeout=30).raise_for_status()
            yield address
        finally:
            server.should_exit = True
            thread.join(timeout=30)
            assert not thread.is_alive()


def poll(condition: Callable[[], T], seconds: float = 20, *, pause: float = 0.01) -> T:
    """The first true answer of `condition`, asked anew after each `pause`."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"the condition never held: {answer!r}"
        threading.Event().wait(pause)
    return answer
