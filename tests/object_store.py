"""A server on loopback that speaks S3."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from moto.server import ThreadedMotoServer


@contextmanager
def object_store() -> Iterator[str]:
    """Its address. It begins empty: moto keeps buckets in this process, where an earlier test may have left some."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        address = f"http://{host}:{port}"
        httpx.post(f"{address}/moto-api/reset").raise_for_status()
        yield address
    finally:
        server.stop()
