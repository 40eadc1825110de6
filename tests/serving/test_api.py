"""The official client against a real server."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from chatloom.serving.api import create_app
from chatloom.serving.engine import Engine

LINEAGE = {"git.revision": "abc", "dvc.model": "123.dir"}
HELLO, COUNT = [{"role": "user", "content": "你好"}], [{"role": "user", "content": "count"}]
ANSWER, COUNTED = "你好，世界！龘😀 end", "one two three four five six"
ENDLESS = {"model": "tiny", "messages": COUNT, "max_tokens": 90_000, "temperature": 0}


@contextmanager
def serving(engine: Engine) -> Iterator[str]:
    """Address of a server on a free port; a request waits in the socket until the server is up."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        app = create_app(engine, "tiny", LINEAGE, version="3")
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


@pytest.fixture(scope="module")
def address(parrot: Engine) -> Iterator[str]:
    with serving(parrot) as url:
        yield url


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def endless(babbler: Engine) -> Iterator[str]:
    with serving(babbler) as url:
        yield url


def poll(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        threading.Event().wait(0.01)


def test_completion(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(model="tiny", messages=HELLO, temperature=0)
    assert done.object == "chat.completion"
    assert (done.choices[0].message.role, done.choices[0].message.content) == ("assistant", ANSWER)
    assert (done.choices[0].finish_reason, done.system_fingerprint) == ("stop", "tiny/3")
    assert done.usage is not None
    assert done.usage.prompt_tokens == 25
    assert done.usage.total_tokens == 25 + done.usage.completion_tokens


def test_several_turns_and_text_parts(client: openai.OpenAI, parrot: Engine) -> None:
    first = client.chat.completions.create(model="tiny", messages=HELLO, temperature=0).choices[0].message
    parts = [{"type": "text", "text": "co"}, {"type": "text", "text": "unt"}]
    done = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": parts}], temperature=0)
    assert done.choices[0].message.content == COUNTED
    # Clients hand our own message back, with its null fields.
    messages = [*HELLO, first.model_dump(), {"role": "user", "content": "count"}]
    longer = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=2)
    assert longer.usage is not None
    assert longer.usage.prompt_tokens > 25 + 24


def test_stream(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="tiny", messages=HELLO, temperature=0, stream=True))
    parts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert "".join(parts) == ANSWER
    assert {"你", "好", "龘", "😀"} <= set(parts)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_stream_with_usage(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True}
    asked: Any = {"model": "tiny", "messages": HELLO, "temperature": 0}
    *others, last = client.chat.completions.create(**asked, stream=True, stream_options=options)
    assert last.choices == []
    assert last.usage == client.chat.completions.create(**asked).usage
    assert all(chunk.usage is None for chunk in others)


def test_stream_on_the_wire(address: str) -> None:
    body = {"model": "tiny", "messages": HELLO, "temperature": 0, "stream": True}
    response = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[0].removeprefix("data: "))["object"] == "chat.completion.chunk"


@pytest.mark.parametrize("stop", ["two three", ["absent", "two three"]])
def test_stop(client: openai.OpenAI, stop: str | list[str]) -> None:
    done = client.chat.completions.create(model="tiny", messages=COUNT, temperature=0, stop=stop)
    assert (done.choices[0].message.content, done.choices[0].finish_reason) == ("one ", "stop")
    chunks = client.chat.completions.create(model="tiny", messages=COUNT, temperature=0, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "one "


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_length_limit(client: openai.OpenAI, name: str) -> None:
    limit: Any = {name: 5}
    done = client.chat.completions.create(model="tiny", messages=COUNT, temperature=0, **limit)
    assert done.choices[0].finish_reason == "length"
    assert done.usage is not None
    assert done.usage.completion_tokens == 5


def test_seed(endless: str) -> None:
    client = openai.OpenAI(base_url=f"{endless}/v1", api_key="none", max_retries=0)

    def answer(seed: int) -> str | None:
        done = client.chat.completions.create(model="tiny", messages=COUNT, max_tokens=30, seed=seed)
        return done.choices[0].message.content

    assert answer(7) == answer(7) != answer(8)


def test_models(client: openai.OpenAI) -> None:
    (card,) = client.models.list().data
    assert (card.id, card.object) == ("tiny", "model")
    assert card.model_extra == {"version": "3", "lineage": LINEAGE}
    assert client.models.retrieve("tiny") == card


BASE: dict[str, Any] = {"model": "tiny", "messages": HELLO}


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'system', 'developer', 'user'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "input should be"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "field required"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "valid string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content",
            "reads text only",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]},
            "messages[0].tool_calls",
            "not supported",
        ),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, None, "give one of them"),
        ({"stop": ""}, "stop[0]", "at least 1 character"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
        ({"seed": 2**64}, "seed", "less than"),
        ({"n": 2}, "n", "one answer a request"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "not supported"),
        ({"logprobs": True}, "logprobs", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
        ({"temprature": 0.5}, "temprature", "unknown parameter"),
        ({"stream_options": {"include_usage": True}}, None, "only for stream"),
    ],
)
def test_bad_request(address: str, change: dict[str, Any], param: str | None, words: str) -> None:
    response = httpx.post(f"{address}/v1/chat/completions", json=BASE | change, timeout=30)
    assert response.status_code == 400
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert words in error["message"]


@pytest.mark.parametrize("body", [b'{"model": "tiny", ', b"", b"[]", b"\xff", b'"text"'])
def test_malformed_body(address: str, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{address}/v1/chat/completions", content=body, headers=headers, timeout=30)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert "body" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud83d"}]}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "\\ud83d": 1}',
        b'{"model": "\\ud83d", "messages": [{"role": "user", "content": "x"}]}',
    ],
)
def test_half_a_surrogate_pair(address: str, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{address}/v1/chat/completions", content=body, headers=headers, timeout=30)
    assert response.status_code in (400, 404)
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_harmless_parameters(client: openai.OpenAI) -> None:
    neutral: Any = {"n": 1, "presence_penalty": 0, "logprobs": False, "user": "me", "response_format": {"type": "text"}}
    done = client.chat.completions.create(model="tiny", messages=HELLO, temperature=0, max_tokens=3, **neutral)
    assert done.choices[0].message.content == "你"


def test_errors_are_the_clients_exceptions(client: openai.OpenAI) -> None:
    long: Any = [{"role": "user", "content": "x " * 1500}]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="context is 2048") as caught:
            client.chat.completions.create(model="tiny", messages=long, stream=stream)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError, match="ask for at most 2023"):
        client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=2040)
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'") as missing:
        client.chat.completions.create(model="gpt-4o", messages=HELLO)
    assert missing.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405)]
)
def test_wrong_address(address: str, method: str, path: str, status: int) -> None:
    response = httpx.request(method, f"{address}{path}", timeout=30)
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_bug_is_a_server_error(address: str, parrot: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(ids: object) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr(parrot, "_decode", broken)
    response = httpx.post(f"{address}/v1/chat/completions", json=BASE, timeout=30)
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    # The status of a stream is out already: what is left is to break the connection off.
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.post(f"{address}/v1/chat/completions", json=BASE | {"stream": True}, timeout=30)
    poll(lambda: not parrot.busy)


def test_a_left_stream_frees_the_engine(endless: str, babbler: Engine) -> None:
    client = openai.OpenAI(base_url=f"{endless}/v1", api_key="none", max_retries=0)
    asked: Any = ENDLESS
    with client.chat.completions.create(**asked, stream=True) as stream:
        for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        assert babbler.busy
        # The event loop is free while tokens are made.
        assert httpx.get(f"{endless}/health", timeout=5).json() == {"status": "ok", "busy": True}
    poll(lambda: not babbler.busy)


def test_a_left_request_frees_the_engine(endless: str, babbler: Engine) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{endless}/v1/chat/completions", json=ENDLESS, timeout=1)
    poll(lambda: not babbler.busy)


def test_a_request_left_while_it_waits_never_runs(endless: str, babbler: Engine) -> None:
    with httpx.stream("POST", f"{endless}/v1/chat/completions", json=ENDLESS | {"stream": True}, timeout=10) as first:
        lines = first.iter_lines()
        next(lines)
        for stream in (False, True):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{endless}/v1/chat/completions", json=ENDLESS | {"stream": stream}, timeout=0.5)
        assert next(line for line in lines if line)
    short = ENDLESS | {"max_tokens": 2}
    assert httpx.post(f"{endless}/v1/chat/completions", json=short, timeout=20).status_code == 200
    poll(lambda: not babbler.busy)
