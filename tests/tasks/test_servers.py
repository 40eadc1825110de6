"""A server that is watched, with real processes."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import psutil
import pytest

from tasks.servers import Server, ServerFailed, watch

# Answers, and ends at the third look at its health.
ENDS = """
import os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    looks = 0
    def do_GET(self):
        Handler.looks += 1
        if Handler.looks == 3:
            os._exit(7)
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_): pass
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_that_ends_is_started_again_until_patience_is_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ends.py").write_text(ENDS)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started: list[Server] = []

    def start() -> Server:
        started.append(Server("serve", ["ends", str(port)], tmp_path, os.environ))
        return started[-1]

    said: list[str] = []
    with pytest.raises(ServerFailed, match=r"serve ended with status 7"):
        watch(start, f"http://127.0.0.1:{port}/health", said.append, patience=1, pause=0.01)
    assert len(started) == 2
    assert [line for line in said if "answers at" in line] == [f"serve answers at http://127.0.0.1:{port}/health"] * 2
    assert sum("is started again, failure 1 of 1" in line for line in said) == 1
    assert not any(psutil.pid_exists(server.process.pid) for server in started)


def test_a_server_that_never_starts_shows_its_log(tmp_path: Path) -> None:
    def start() -> Server:
        return Server("serve", ["not_there"], tmp_path, {"PATH": os.environ["PATH"]})

    with pytest.raises(ServerFailed, match=r"No module named .*not_there"):
        watch(start, "http://127.0.0.1:9/health", print, patience=0)
