"""Requests as ColossalChat's clients send them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from chatloom.serving.engine import Engine
from tests.serving.server import serving

HELLO: dict[str, Any] = {"max_new_tokens": 64, "history": [{"instruction": "你好", "response": ""}], "temperature": 0}


@pytest.fixture(scope="module")
def address(parrot: Engine) -> Iterator[str]:
    with serving(parrot) as url:
        yield url


def test_generate(address: str) -> None:
    response = httpx.post(f"{address}/generate", json=HELLO, timeout=30)
    assert response.json() == "你好，世界！龘😀 end"
    history = [{"instruction": "你好", "response": "你好"}, {"instruction": "count", "response": ""}]
    assert isinstance(httpx.post(f"{address}/generate", json=HELLO | {"history": history}, timeout=30).json(), str)


def test_generate_stream(address: str) -> None:
    response = httpx.post(f"{address}/generate/stream", json=HELLO | {"top_k": 1, "temperature": 0.7}, timeout=30)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [block.splitlines() for block in response.text.strip("\n").split("\n\n")]
    assert {event[0] for event in events[:-1]} == {"event: generate"}
    assert "".join(event[1].removeprefix("data: ") for event in events[:-1]) == "你好，世界！龘😀 end"
    assert events[-1][0] == "event: end"


def test_a_long_history_loses_its_oldest_turns(address: str) -> None:
    old = [{"instruction": "x" * 500, "response": "y" * 500}] * 3
    response = httpx.post(f"{address}/generate", json=HELLO | {"history": [*old, *HELLO["history"]]}, timeout=30)
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"history": []}, "at least 1 item"),
        ({"history": [{"instruction": "a", "response": "b"}]}, "has to be empty"),
        ({"max_new_tokens": 0}, "greater than or equal to 1"),
        ({"typo": 1}, "extra inputs are not permitted"),
        ({"history": [{"instruction": "x" * 3000, "response": ""}]}, "context is 2048"),
    ],
)
def test_refusals(address: str, change: dict[str, Any], words: str) -> None:
    for path in ("/generate", "/generate/stream"):
        response = httpx.post(f"{address}{path}", json=HELLO | change, timeout=30)
        assert response.status_code == 400
        assert words in response.json()["error"]["message"]
