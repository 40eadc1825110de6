"""A line that was confirmed stays, and one that could not be written leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from chatloom.files import append_line


def test_lines_of_many_threads_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lines.jsonl"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: append_line(path, {"number": number, "text": "茶" * 2000}), range(40)))
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert sorted(line["number"] for line in lines) == list(range(40))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"", b"[1]\n"),
        (b"[0]\n", b"[0]\n[1]\n"),
        (b"[0]", b"[0]\n[1]\n"),  # written by hand
        (b'[0]\n{"cut', b"[0]\n[1]\n"),  # a crash
        (b'{"cut', b"[1]\n"),
        (b'[0]\n"' + b"x" * 200_000, b"[0]\n[1]\n"),
    ],
)
def test_last_line_without_an_end(tmp_path: Path, before: bytes, after: bytes) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(before)
    append_line(path, [1])
    assert path.read_bytes() == after


def test_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines.jsonl"
    append_line(path, [0])

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        append_line(path, [1])
    assert path.read_bytes() == b"[0]\n"
