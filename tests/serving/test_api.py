"""The official client against a real server."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from chatloom.serving.api import create_app
from chatloom.serving.engine import Engine
from chatloom.serving.options import Options
from chatloom.serving.prompts import Message
from tests.loopback import poll, running
from tests.serving.server import LINEAGE, busy, serving

HELLO, COUNT = [{"role": "user", "content": "你好"}], [{"role": "user", "content": "count"}]
ANSWER, COUNTED = "你好，世界！龘😀 end", "one two three four five six"
ENDLESS = {"model": "tiny", "messages": COUNT, "max_tokens": 90_000, "temperature": 0}


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
    assert card.model_extra == {"version": "3", "context": 2048, "lineage": LINEAGE}
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
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 17}, "n", "less than or equal to 16"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "not supported"),
        ({"top_logprobs": 2}, None, "only for logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"presence_penalty": 2.5}, "presence_penalty", "less than or equal to 2"),
        ({"frequency_penalty": "much"}, "frequency_penalty", "valid number"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than or equal to 0.01"),
        ({"top_k": -1}, "top_k", "greater than or equal to 1"),
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

    monkeypatch.setattr(parrot.prompts, "decode", broken)
    response = httpx.post(f"{address}/v1/chat/completions", json=BASE, timeout=30)
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "ZeroDivision" not in response.text
    # The status of a stream is out already: what is left is to break the connection off.
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.post(f"{address}/v1/chat/completions", json=BASE | {"stream": True}, timeout=30)
    poll(lambda: not busy(address))


def test_a_left_stream_frees_its_place(endless: str) -> None:
    client = openai.OpenAI(base_url=f"{endless}/v1", api_key="none", max_retries=0)
    asked: Any = ENDLESS
    with client.chat.completions.create(**asked, stream=True) as stream:
        for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        # The event loop is free while tokens are made.
        assert httpx.get(f"{endless}/health", timeout=5).json() == {"status": "ok", "busy": True}
    poll(lambda: not busy(endless))


def test_a_left_request_frees_its_place(endless: str) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{endless}/v1/chat/completions", json=ENDLESS, timeout=1)
    poll(lambda: not busy(endless))


def test_a_request_left_while_it_waits_never_runs(babbler: Engine) -> None:
    with serving(babbler, batch_size=1) as address:
        url = f"{address}/v1/chat/completions"
        with httpx.stream("POST", url, json=ENDLESS | {"stream": True}, timeout=10) as first:
            lines = first.iter_lines()
            next(lines)
            for stream in (False, True):
                with pytest.raises(httpx.ReadTimeout):
                    httpx.post(url, json=ENDLESS | {"stream": stream}, timeout=0.5)
            assert next(line for line in lines if line)
        assert httpx.post(url, json=ENDLESS | {"max_tokens": 2}, timeout=20).status_code == 200
        poll(lambda: not busy(address))


def test_answers_are_made_at_once_and_do_not_mix(address: str, babbler: Engine) -> None:
    """A short answer overtakes one that was there before; conversations of many clients stay apart."""
    with serving(babbler) as slow:
        url = f"{slow}/v1/chat/completions"
        with httpx.stream("POST", url, json=ENDLESS | {"stream": True}, timeout=10) as first:
            lines = first.iter_lines()  # held: a client that drops it leaves
            assert next(lines)
            assert httpx.post(url, json=ENDLESS | {"max_tokens": 3}, timeout=20).status_code == 200
            assert busy(slow)
    with ThreadPoolExecutor(8) as pool:
        bodies = [{"model": "tiny", "messages": turns, "temperature": 0} for turns in [HELLO, COUNT] * 8]
        replies = list(
            pool.map(lambda body: httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60), bodies)
        )
    texts = [reply.json()["choices"][0]["message"]["content"] for reply in replies]
    assert texts == [ANSWER, COUNTED] * 8


def test_several_choices(endless: str, client: openai.OpenAI) -> None:
    hot = openai.OpenAI(base_url=f"{endless}/v1", api_key="none", max_retries=0)
    asked: Any = {"model": "tiny", "messages": COUNT, "max_tokens": 12, "seed": 5, "n": 3}
    done = hot.chat.completions.create(**asked)
    texts = [choice.message.content for choice in done.choices]
    assert [choice.index for choice in done.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert done.usage is not None
    assert done.usage.prompt_tokens == hot.chat.completions.create(**asked | {"n": 1}).usage.prompt_tokens  # type: ignore[union-attr]
    streamed = ["", "", ""]
    ends = []
    for chunk in hot.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
            ends += [choice.index] if choice.finish_reason else []
    assert streamed == texts
    assert sorted(ends) == [0, 1, 2]
    # The first of several is what one alone would be.
    assert hot.chat.completions.create(**asked | {"n": 1}).choices[0].message.content == texts[0]


def test_logprobs(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": COUNT, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    done = client.chat.completions.create(**asked)
    assert done.choices[0].logprobs is not None
    content = done.choices[0].logprobs.content
    assert content is not None
    assert "".join(entry.token for entry in content) == COUNTED
    assert bytes(byte for entry in content for byte in entry.bytes or []).decode() == COUNTED
    for entry in content:
        assert entry.top_logprobs[0].token == entry.token  # greedy takes the likeliest
        assert entry.top_logprobs[0].logprob == entry.logprob
        # It knows these answers by heart, and no two tokens have more than the whole.
        assert 0.5 < math.exp(entry.logprob) <= 1
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1 + 1e-6
    chunks = list(client.chat.completions.create(**asked, stream=True))
    streamed = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content or []]
    assert [(entry.token, entry.logprob) for entry in streamed] == [(entry.token, entry.logprob) for entry in content]


def test_penalties(endless: str) -> None:
    client = openai.OpenAI(base_url=f"{endless}/v1", api_key="none", max_retries=0)
    penalties: list[Any] = [
        {},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"extra_body": {"repetition_penalty": 5.0}},
    ]
    asked: Any = {"model": "tiny", "messages": COUNT, "temperature": 0, "max_tokens": 60}
    plain, *penalized = [
        client.chat.completions.create(**asked, **each).choices[0].message.content for each in penalties
    ]
    assert plain not in penalized


def test_completions(client: openai.OpenAI, parrot: Engine) -> None:
    """The chat template written out by hand, as token ids: text that looks like control tokens stays text."""
    ids = parrot.prompts.encode([Message("user", "count")])
    done = client.completions.create(model="tiny", prompt=ids, temperature=0, max_tokens=64, logprobs=1)
    assert (done.object, done.choices[0].text, done.choices[0].finish_reason) == ("text_completion", COUNTED, "stop")
    logprobs = done.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == COUNTED
    lengths = [len(token) for token in logprobs.tokens or []]
    assert logprobs.text_offset == [sum(lengths[:place]) for place in range(len(lengths))]
    chunks = list(client.completions.create(model="tiny", prompt=ids, temperature=0, max_tokens=64, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == COUNTED
    assert chunks[-1].choices[0].finish_reason == "stop"
    text = parrot.prompts.decode(ids)
    assert client.completions.create(model="tiny", prompt="<|im_start|>user", max_tokens=1).usage.prompt_tokens > 8  # type: ignore[union-attr]
    two = client.completions.create(model="tiny", prompt=[text, "b"], temperature=0, n=2)
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
    assert (two.choices[0].text, two.choices[2].text) == (two.choices[1].text, two.choices[3].text)
    assert two.usage is not None
    assert two.usage.completion_tokens <= 4 * 16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": ""}, "at least 1 character"),
        ({"prompt": []}, "at least 1 item"),
        ({"prompt": [5, 100_000]}, "the vocabulary has 0 to"),
        ({"prompt": [-1]}, "greater than or equal to 0"),
        ({"prompt": {"a": 1}}, "valid"),
        ({"prompt": "x " * 1500}, "context is 2048"),
        ({"prompt": ["a"] * 17}, "at most 16 items"),
        ({"echo": True}, "echo is not supported"),
        ({"max_tokens": 10**9}, "ask for at most"),
        ({"logprobs": 6}, "less than or equal to 5"),
    ],
)
def test_bad_completion(address: str, change: dict[str, Any], words: str) -> None:
    body = {"model": "tiny", "prompt": "a"} | change
    response = httpx.post(f"{address}/v1/completions", json=body, timeout=30)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


def test_a_full_queue(babbler: Engine) -> None:
    with serving(babbler, batch_size=1, queue=1) as address:
        url = f"{address}/v1/chat/completions"
        with (
            httpx.stream("POST", url, json=ENDLESS | {"stream": True}, timeout=10) as first,
            httpx.stream("POST", url, json=ENDLESS | {"stream": True}, timeout=10) as second,
        ):
            held = [stream.iter_lines() for stream in (first, second)]
            assert all(next(lines) for lines in held)
            refused = httpx.post(url, json=ENDLESS, timeout=10)
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "server_busy"
            too_many = httpx.post(url, json=ENDLESS | {"n": 3}, timeout=10)
            assert too_many.status_code == 400
            assert too_many.json()["error"]["param"] == "n"
        poll(lambda: not busy(address))
        assert httpx.post(url, json=ENDLESS | {"max_tokens": 2}, timeout=20).status_code == 200


def test_a_failing_engine(parrot: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers under way end with an error, a stream's as an event; the next request is served."""
    app = create_app(parrot, "tiny", LINEAGE, options=Options())
    with running(app) as address:
        for stream in (False, True):
            batch = app.state.slot.current.scheduler._batch

            def broken() -> None:
                raise RuntimeError("out of memory")

            monkeypatch.setattr(batch, "step", broken)
            response = httpx.post(f"{address}/v1/chat/completions", json=BASE | {"stream": stream}, timeout=30)
            last = response.text.strip().splitlines()[-1].removeprefix("data: ")
            assert json.loads(last)["error"]["type"] == "server_error"
            assert "memory" not in response.text
            assert response.status_code == (200 if stream else 500)
            done = httpx.post(f"{address}/v1/chat/completions", json=BASE | {"temperature": 0}, timeout=30)
            assert done.json()["choices"][0]["message"]["content"] == ANSWER
        assert httpx.get(f"{address}/ready", timeout=30).status_code == 200

        def gone() -> None:
            raise RuntimeError("no device")

        monkeypatch.setattr(app.state.slot.current.scheduler._batch, "step", broken)
        monkeypatch.setattr(app.state.slot.current.scheduler, "_open_batch", gone)
        for _ in range(2):
            assert httpx.post(f"{address}/v1/chat/completions", json=BASE, timeout=30).status_code == 500
        assert httpx.get(f"{address}/ready", timeout=30).status_code == 503
        assert httpx.get(f"{address}/health", timeout=30).status_code == 200
