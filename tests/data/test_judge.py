"""The judge against a server of its own: both orders, retries, budget, cache."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from chatloom.config import JudgeParams
from chatloom.data import judge as module
from chatloom.data.judge import Judge, OverBudget
from chatloom.errors import InputError

ASKED = [{"role": "user", "content": "Which one?"}]


class Server(ThreadingHTTPServer):
    asked: list[dict[str, Any]]
    headers: list[dict[str, str]]
    answers: list[int]
    """Status of the next answers; 200 when there are no more."""
    verdict: Callable[[str, str], str]
    """What the judge says of the answers A and B."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            made.asked.append(body)
            made.headers.append(dict(self.headers))
            status = made.answers.pop(0) if made.answers else 200
            found = re.search(r"<A>\n(.*)\n</A>\n\n<B>\n(.*)\n</B>", body["messages"][1]["content"], re.DOTALL)
            assert found is not None
            content = made.verdict(found.group(1), found.group(2))
            reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

    monkeypatch.setattr(module, "RETRY_DELAY", 0.0)
    made = Server(("127.0.0.1", 0), Handler)
    made.asked, made.headers, made.answers = [], [], []
    made.verdict = lambda a, b: "A" if len(a) > len(b) else "B"
    thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def judge(server: Server, folder: Path, **changes: Any) -> Judge:
    values = {"url": f"http://127.0.0.1:{server.server_port}/v1/", "model": "m", "max_requests": 100, "retries": 2}
    return Judge(JudgeParams.model_validate({**values, "timeout": 5.0, **changes}), folder)


def test_each_pair_is_asked_in_both_orders(server: Server, tmp_path: Path) -> None:
    found = judge(server, tmp_path)
    assert found.rank(ASKED, ["xx", "xxx", "x"]) == [1, 0, 2]
    assert found.asked == len(server.asked) == 6
    assert "[user]\nWhich one?" in server.asked[0]["messages"][1]["content"]
    assert (server.asked[0]["model"], server.asked[0]["temperature"]) == ("m", 0)


def test_judge_that_likes_the_first_place_decides_nothing(server: Server, tmp_path: Path) -> None:
    server.verdict = lambda a, b: "A"
    assert judge(server, tmp_path).rank(ASKED, ["x", "xx"]) == [0, 0]


def test_cycle_is_a_tie(server: Server, tmp_path: Path) -> None:
    beats = {("r", "s"), ("s", "p"), ("p", "r")}
    server.verdict = lambda a, b: "A" if (a, b) in beats else "B"
    assert judge(server, tmp_path).rank(ASKED, ["r", "s", "p"]) == [0, 0, 0]


@pytest.mark.parametrize(
    ("says", "ranks", "unclear"), [('"A".', [0, 0], 0), ("I cannot say", [0, 0], 2), ("C", [0, 0], 0)]
)
def test_reply_is_read_leniently(server: Server, tmp_path: Path, says: str, ranks: list[int], unclear: int) -> None:
    server.verdict = lambda a, b: says
    found = judge(server, tmp_path)
    assert found.rank(ASKED, ["x", "xx"]) == ranks
    assert found.unclear == unclear


def test_what_was_said_is_not_asked_again(server: Server, tmp_path: Path) -> None:
    judge(server, tmp_path).rank(ASKED, ["x", "xx"])
    again = judge(server, tmp_path)
    assert again.rank(ASKED, ["x", "xx"]) == [1, 0]
    assert (again.asked, again.cached, len(server.asked)) == (0, 2, 2)
    other = judge(server, tmp_path, model="another")
    other.rank(ASKED, ["x", "xx"])
    assert other.asked == 2


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_server_is_asked_again(server: Server, tmp_path: Path, status: int) -> None:
    server.answers = [status, status]
    found = judge(server, tmp_path)
    assert found.rank(ASKED, ["x", "xx"]) == [1, 0]
    assert found.asked == 4


def test_server_that_stays_busy_is_named(server: Server, tmp_path: Path) -> None:
    server.answers = [503] * 9
    with pytest.raises(InputError, match=r"compare\.judge\.url = .*: answered 503: .*, 3 times"):
        judge(server, tmp_path).rank(ASKED, ["x", "xx"])
    assert len(server.asked) == 3


def test_refusal_is_not_asked_again(server: Server, tmp_path: Path) -> None:
    server.answers = [401]
    with pytest.raises(InputError, match="answered 401"):
        judge(server, tmp_path).rank(ASKED, ["x", "xx"])
    assert len(server.asked) == 1


def test_unreachable_judge_is_named(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"compare\.judge\.url = 'http://127\.0\.0\.1:9': cannot be reached"):
        judge(server, tmp_path, url="http://127.0.0.1:9").rank(ASKED, ["x", "xx"])


def test_budget_ends_the_asking_and_keeps_what_was_said(server: Server, tmp_path: Path) -> None:
    found = judge(server, tmp_path, max_requests=3)
    with pytest.raises(OverBudget):
        found.rank(ASKED, ["x", "xx", "xxx"])
    assert len(server.asked) == 3
    assert judge(server, tmp_path, max_requests=3).rank(ASKED, ["x", "xx", "xxx"]) == [2, 1, 0]


def test_key_comes_from_the_environment(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(module.KEY, "secret")
    judge(server, tmp_path).rank(ASKED, ["x", "xx"])
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert not any("secret" in file.read_text() for file in tmp_path.iterdir())
