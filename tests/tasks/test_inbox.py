"""New rows are brought once, whole lines only."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from chatloom.errors import InputError, Unavailable
from tasks.inbox import FOLDER, pull


def test_files_and_folders_are_brought_when_they_changed(tmp_path: Path) -> None:
    (tmp_path / "feedback").mkdir()
    (tmp_path / "feedback" / "a.jsonl").write_text('{"n": 1}\n{"n":')  # somebody is writing
    (tmp_path / "new.csv").write_text("prompt\nhello")
    sources = ["feedback", str(tmp_path / "new.csv")]
    assert pull(sources, tmp_path) == ["feedback/a.jsonl", "new.csv"]
    inbox = tmp_path / FOLDER
    assert (inbox / "feedback" / "a.jsonl").read_text() == '{"n": 1}\n'
    assert (inbox / "new.csv").read_text() == "prompt\nhello"
    before = (inbox / "new.csv").stat()
    assert pull(sources, tmp_path) == []
    assert (inbox / "new.csv").stat().st_mtime_ns == before.st_mtime_ns
    (tmp_path / "feedback" / "a.jsonl").write_text('{"n": 1}\n{"n": 2}\n')
    assert pull(sources, tmp_path) == ["feedback/a.jsonl"]
    assert (inbox / "feedback" / "a.jsonl").read_text() == '{"n": 1}\n{"n": 2}\n'
    assert sorted(path.name for path in inbox.iterdir()) == ["feedback", "new.csv"]


def test_a_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"inbox 'nowhere': no such file or folder"):
        pull(["nowhere"], tmp_path)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "rows.jsonl").write_text('{"n": 1}\n')
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "web"))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_address_is_fetched(address: str, tmp_path: Path) -> None:
    assert pull([f"{address}/rows.jsonl?token=1"], tmp_path) == ["rows.jsonl"]
    assert (tmp_path / FOLDER / "rows.jsonl").read_text() == '{"n": 1}\n'
    with pytest.raises(InputError, match="the server answered 404") as refused:
        pull([f"{address}/gone.jsonl"], tmp_path)
    assert not isinstance(refused.value, Unavailable), "another try cannot help"


def test_a_server_that_is_down_may_be_up_later(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="cannot be fetched"):
        pull(["http://127.0.0.1:9/rows.jsonl"], tmp_path)
    assert not (tmp_path / FOLDER / "rows.jsonl").exists()
