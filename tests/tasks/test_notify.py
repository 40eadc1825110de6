"""What became of a run, told to a real web server and a real mail server of the test's own."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import httpx
import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_LOGGING_TO_API_ENABLED, temporary_settings
from prefect.states import Completed, Failed

from chatloom.errors import InputError
from tasks.notify import notify, send_mail

FLOW = SimpleNamespace(name="reproduce")


@pytest.fixture
def run() -> FlowRun:
    return FlowRun(id=uuid4(), name="reproduce-smoke", flow_id=uuid4())


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("CHATLOOM_NOTIFY_WEBHOOK", "CHATLOOM_NOTIFY_MAIL", "CHATLOOM_SMTP", "CHATLOOM_NOTIFY_ON"):
        monkeypatch.delenv(name, raising=False)
    with temporary_settings({PREFECT_LOGGING_TO_API_ENABLED: False}):
        yield


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What came to it; it answers 500 where the text begins so."""
    received: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(500 if received[-1]["message"] == "refuse me" else 200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("CHATLOOM_NOTIFY_WEBHOOK", f"http://127.0.0.1:{server.server_port}/hook")
        yield received
        server.shutdown()


def test_a_webhook_is_told_what_and_where(webhook: list[dict[str, Any]], run: FlowRun) -> None:
    notify(FLOW, run, Failed(message="stage train_sft failed"))
    (told,) = webhook
    assert told["flow"] == "reproduce"
    assert told["run"] == "reproduce-smoke"
    assert told["kind"] == "failed"
    assert told["message"] == "stage train_sft failed"
    assert told["page"].endswith(f"/runs/flow-run/{run.id}")
    assert told["text"].startswith("reproduce-smoke: Failed\nstage train_sft failed\n")


def test_only_what_is_asked_for_is_told(
    webhook: list[dict[str, Any]], run: FlowRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHATLOOM_NOTIFY_ON", "failed,crashed")
    notify(FLOW, run, Completed(name="Unchanged"))
    assert webhook == []
    notify(FLOW, run, Failed())
    assert len(webhook) == 1


def test_a_flow_inside_another_is_silent(webhook: list[dict[str, Any]], run: FlowRun) -> None:
    notify(FLOW, run.model_copy(update={"parent_task_run_id": uuid4()}), Failed())
    assert webhook == []


def test_a_webhook_that_refuses_is_an_error_of_the_hook(webhook: list[dict[str, Any]], run: FlowRun) -> None:
    with pytest.raises(httpx.HTTPStatusError):
        notify(FLOW, run, Failed(message="refuse me"))


def test_without_a_word_in_the_environment_only_the_log_is_told(run: FlowRun) -> None:
    notify(FLOW, run, Completed())


class Mails(socketserver.StreamRequestHandler):
    """The least that a mail client needs."""

    received: list[str]

    def handle(self) -> None:
        self.say("220 here")
        while line := self.rfile.readline().decode().strip():
            if line.upper() == "DATA":
                self.say("354 go on")
                text = ""
                while (part := self.rfile.readline().decode()) != ".\r\n":
                    text += part
                self.received.append(text)
            elif line.upper() == "QUIT":
                self.say("221 bye")
                return
            self.say("250 well")

    def say(self, text: str) -> None:
        self.wfile.write(f"{text}\r\n".encode())


def test_a_mail_is_sent(run: FlowRun, monkeypatch: pytest.MonkeyPatch) -> None:
    Mails.received = []
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Mails) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("CHATLOOM_SMTP", f"smtp://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("CHATLOOM_NOTIFY_MAIL", "ann@example.org,bo@example.org")
        notify(FLOW, run, Completed(message="十一个阶段"))
        server.shutdown()
    (mail,) = Mails.received
    assert "Subject: reproduce-smoke: Completed" in mail
    assert "To: ann@example.org,bo@example.org" in mail


@pytest.mark.parametrize("server", ["", "mail.example.org", "http://mail.example.org"])
def test_a_mail_without_a_server_says_what_to_set(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATLOOM_SMTP", server)
    with pytest.raises(InputError, match=r"CHATLOOM_SMTP is no address: write smtp://"):
        send_mail("ann@example.org", "s", "t")
