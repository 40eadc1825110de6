"""The chat server around a small model, on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from chatloom.serving.api import create_app
from chatloom.serving.engine import Engine
from chatloom.serving.options import Options
from tests.loopback import running

LINEAGE = {"git.revision": "abc", "dvc.model": "123.dir"}


@contextmanager
def serving(engine: Engine, **options: Any) -> Iterator[str]:
    with running(create_app(engine, "tiny", LINEAGE, version="3", options=Options(**options))) as address:
        yield address


def busy(address: str) -> bool:
    found: bool = httpx.get(f"{address}/health", timeout=10).json()["busy"]
    return found
