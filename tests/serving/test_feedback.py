"""The route that keeps what people say of answers."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from chatloom.serving.api import create_app
from chatloom.serving.engine import Engine
from chatloom.serving.feedback import FILE
from chatloom.serving.keys import add_key
from chatloom.serving.options import Options

SAID: dict[str, Any] = {
    "rating": "up",
    "answer": "chatcmpl-1",
    "messages": [{"role": "user", "content": "你好"}],
    "response": "Hello!",
    "model": "tiny/3",
    "comment": " kind ",
}
OTHER = {"answer": "chatcmpl-0", "response": "Hi.", "model": "tiny/2"}


@pytest.fixture
def client(parrot: Engine, tmp_path: Path) -> TestClient:
    app = create_app(parrot, "tiny", {}, options=Options(feedback=tmp_path / "said"))
    return TestClient(app, raise_server_exceptions=False)


def lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "said" / FILE
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def test_what_is_said_is_a_line(client: TestClient, tmp_path: Path) -> None:
    answer = client.post("/v1/feedback", json=SAID)
    assert (answer.status_code, answer.json()["rating"]) == (201, "up")
    client.post("/v1/feedback", json={**SAID, "rating": "better", "other": OTHER, "comment": ""})
    first, second = lines(tmp_path)
    assert first == {**SAID, "comment": "kind", "annotator": None, "at": answer.json()["at"]}
    assert (second["rating"], second["other"]) == ("better", OTHER)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rating": "great"}, "rating: input should be 'up', 'down', 'none', 'better' or 'tie'"),
        ({"stars": 5}, "stars: extra inputs are not permitted"),
        ({"answer": ""}, "answer: string should have at least 1 character"),
        ({"response": " \n"}, "response: string should match pattern"),
        (
            {"response": "half \ud83d"},
            "response: input should be a valid string, unable to parse raw data as a unicode",
        ),
        ({"response": "x" * 200_001}, "response: string should have at most 200000 characters"),
        ({"messages": []}, "messages: list should have at least 1 item"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role: input should be 'system', 'user' or"),
        ({"messages": [*SAID["messages"], {"role": "assistant", "content": "x"}]}, "messages has to end with the user"),
        ({"rating": "better"}, "rating better needs the other answer"),
        ({"other": OTHER}, "rating up is of one answer: leave other out"),
        ({"rating": "tie", "other": {**OTHER, "answer": "chatcmpl-1"}}, "other is the same answer"),
    ],
)
def test_nonsense_is_refused_and_not_kept(
    client: TestClient, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    body = json.dumps({**SAID, **change})
    answer = client.post("/v1/feedback", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert lines(tmp_path) == []


def test_full_disk_is_said_and_the_next_one_is_kept(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        answer = client.post("/v1/feedback", json=SAID)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_kept")
    assert answer.json()["error"]["message"] == "the feedback could not be kept: No space left on device"
    assert client.post("/v1/feedback", json=SAID).status_code == 201
    assert len(lines(tmp_path)) == 1


def test_server_without_a_folder_keeps_nothing(parrot: Engine) -> None:
    assert TestClient(create_app(parrot, "tiny", {})).post("/v1/feedback", json=SAID).status_code == 404


def test_key_is_who_said_it(parrot: Engine, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    secret = add_key(keys, "Ann", None, None)
    client = TestClient(create_app(parrot, "tiny", {}, options=Options(feedback=tmp_path / "said", keys=keys)))
    assert client.post("/v1/feedback", json=SAID).status_code == 401
    assert client.get("/").status_code == client.get("/page/app.js").status_code == 200
    client.post("/v1/feedback", json=SAID, headers={"Authorization": f"Bearer {secret}"}).raise_for_status()
    assert [line["annotator"] for line in lines(tmp_path)] == ["Ann"]
