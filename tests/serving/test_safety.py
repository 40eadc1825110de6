"""Keys, rates, origins, the audit log and the metrics, on a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from chatloom.serving.engine import Engine
from chatloom.serving.keys import add_key, remove_key
from tests.loopback import poll
from tests.serving.server import serving

BASE: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "count"}], "temperature": 0}
CHAT = "/v1/chat/completions"
ORIGIN = "https://chat.example"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    return {
        "file": str(file),
        "ann": add_key(file, "ann", None, None),
        "slow": add_key(file, "slow", 1, None),
        "poor": add_key(file, "poor", None, 10),
        "gone": add_key(file, "gone", None, None),
    }


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audit") / "audit.jsonl"


@pytest.fixture(scope="module")
def address(parrot: Engine, keys: dict[str, str], audit: Path) -> Iterator[str]:
    with serving(parrot, keys=Path(keys["file"]), audit=audit, cors=(ORIGIN,), max_tokens=100) as url:
        yield url


def ask(address: str, key: str, **change: Any) -> httpx.Response:
    return httpx.post(f"{address}{CHAT}", json=BASE | change, headers={"Authorization": f"Bearer {key}"}, timeout=30)


def test_without_a_key_nobody_comes_in(address: str, keys: dict[str, str]) -> None:
    for headers in ({}, {"Authorization": "Bearer cl-guess"}, {"Authorization": f"Basic {keys['ann']}"}):
        for path in (CHAT, "/v1/completions", "/generate", "/generate/stream"):
            response = httpx.post(f"{address}{path}", json=BASE, headers=headers, timeout=30)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{address}/v1/models", headers=headers, timeout=30).status_code == 401
    for path in ("/health", "/ready", "/metrics"):
        assert httpx.get(f"{address}{path}", timeout=30).status_code == 200
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{address}/v1", api_key="cl-guess", max_retries=0).models.list()


def test_with_a_key(address: str, keys: dict[str, str]) -> None:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key=keys["ann"], max_retries=0)
    done = client.chat.completions.create(**BASE)
    assert done.choices[0].message.content == "one two three four five six"


def test_a_key_that_is_removed(address: str, keys: dict[str, str]) -> None:
    assert ask(address, keys["gone"]).status_code == 200
    remove_key(Path(keys["file"]), "gone")
    assert ask(address, keys["gone"]).status_code == 401
    assert ask(address, keys["ann"]).status_code == 200


@pytest.mark.parametrize("name", ["slow", "poor"])
def test_rates(address: str, keys: dict[str, str], name: str) -> None:
    """One request a minute; ten tokens a minute, known when the first answer is made."""
    assert ask(address, keys[name]).status_code == 200
    poll(lambda: ask(address, keys[name]).status_code == 429)
    refused = ask(address, keys[name])
    assert int(refused.headers["retry-after"]) > 1
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert ask(address, keys["ann"]).status_code == 200


def test_a_limit_on_answers(address: str, keys: dict[str, str]) -> None:
    refused = ask(address, keys["ann"], max_tokens=101)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "max_tokens"
    assert ask(address, keys["ann"], max_tokens=100).status_code == 200


def test_origins(address: str, parrot: Engine) -> None:
    asking = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    allowed = httpx.options(f"{address}{CHAT}", headers=asking, timeout=30)
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    other = httpx.options(f"{address}{CHAT}", headers=asking | {"Origin": "https://evil.example"}, timeout=30)
    assert "access-control-allow-origin" not in other.headers
    with serving(parrot) as closed:
        response = httpx.options(f"{closed}{CHAT}", headers=asking, timeout=30)
        assert not [name for name in response.headers if name.startswith("access-control")]


def lines(audit: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in audit.read_text().splitlines()] if audit.exists() else []


def test_audit(address: str, keys: dict[str, str], audit: Path) -> None:
    before = len(lines(audit))
    response = ask(address, keys["ann"])
    httpx.post(f"{address}{CHAT}", json=BASE, timeout=30)
    poll(lambda: len(lines(audit)) == before + 2)
    served, refused = lines(audit)[before:]
    assert served["id"] == response.headers["x-request-id"]
    usage = response.json()["usage"]
    expected = {
        "key": "ann",
        "model": "tiny/3",
        "path": CHAT,
        "status": 200,
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": usage["completion_tokens"],
        "finish_reasons": ["stop"],
    }
    assert served | expected == served
    assert 0 < served["first_token_seconds"] <= served["seconds"]
    assert (refused["status"], refused["key"], refused["completion_tokens"]) == (401, None, 0)
    text = audit.read_text()
    assert "count" not in text.replace("chat/completions", "")
    assert "two" not in text
    assert keys["ann"] not in text


def test_audit_with_bodies(parrot: Engine, tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    with serving(parrot, audit=file, audit_bodies=True) as address:
        httpx.post(f"{address}{CHAT}", json=BASE | {"stream": True}, timeout=30)
        poll(lambda: len(lines(file)) == 1)
    (line,) = lines(file)
    assert (line["prompts"], line["answers"]) == (["count"], ["one two three four five six"])


def test_metrics(parrot: Engine) -> None:
    with serving(parrot) as address:
        usage = httpx.post(f"{address}{CHAT}", json=BASE, timeout=30).json()["usage"]
        httpx.post(f"{address}{CHAT}", json=BASE | {"n": 0}, timeout=30)
        httpx.get(f"{address}/v1/models/tiny", timeout=30)
        httpx.request("PROPFIND", f"{address}/coffee", timeout=30)
        response = httpx.get(f"{address}/metrics", timeout=30)
    assert response.headers["content-type"].startswith("text/plain")
    found = dict(line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#"))
    expected = {
        f'chatloom_requests_total{{method="POST",path="{CHAT}",status="200"}}': 1,
        f'chatloom_requests_total{{method="POST",path="{CHAT}",status="400"}}': 1,
        'chatloom_requests_total{method="GET",path="/v1/models/{model:path}",status="200"}': 1,
        'chatloom_requests_total{method="other",path="other",status="404"}': 1,
        'chatloom_tokens_total{kind="prompt"}': usage["prompt_tokens"],
        'chatloom_tokens_total{kind="completion"}': usage["completion_tokens"],
        "chatloom_first_token_seconds_count": 1,
        "chatloom_answers_in_flight": 0,
        "chatloom_answers_places": 16 + 64,
        'chatloom_model_info{name="tiny",version="3"}': 1,
    }
    assert {name: float(found[name]) for name in expected} == expected


def test_oldest_turns_are_left_out_where_the_server_is_told_to(parrot: Engine) -> None:
    turns = [{"role": role, "content": "x" * 900} for role in ("user", "assistant", "user", "assistant")]
    body = BASE | {"messages": [*turns, *BASE["messages"]]}
    with serving(parrot, overflow="drop-oldest") as address:
        done = httpx.post(f"{address}{CHAT}", json=body, timeout=30)
        assert done.status_code == 200
        assert done.json()["usage"]["prompt_tokens"] < 2048
