"""One reproduction at a time in a workspace: others wait, and clean up after one that was killed."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import psutil

from stages.run import REPRODUCTION, STATE
from tasks.processes import SECONDS_OF_GRACE, end_tree

LOCK = STATE / "reproduction.lock"
Say = Callable[[str], None]


@contextmanager
def alone_in(workspace: Path, say: Say) -> Iterator[Callable[[Mapping[str, str]], dict[str, str]]]:
    """Hold `workspace` for the block; wait while another reproduction does.

    The operating system frees the lock of a process that is killed. What it leaves is known by its record.

    Yields:
        A function that records the holder, as `{"reproduction": id, ...}`, and gives the record of the one before,
        whose processes, if any outlived it, are ended by then: their training states are saved, DVC's locks freed.
    """
    path = workspace / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        os.set_inheritable(file.fileno(), True)  # a program that takes our place keeps the lock; our children do not
        _wait_for(file, workspace, say)

        def record(holder: Mapping[str, str]) -> dict[str, str]:
            earlier = _read(file)
            if earlier and earlier["reproduction"] != holder["reproduction"]:
                end_survivors(earlier["reproduction"], say)
            file.seek(0)
            file.truncate()
            json.dump(dict(holder), file)
            file.flush()
            return earlier

        try:
            yield record
        finally:
            file.truncate(0)  # an end that was no kill leaves nothing to look after


def end_survivors(reproduction: str, say: Say) -> None:
    """End every process of a reproduction whose flow was killed: stages are in sessions of their own and go on."""
    found = {process.pid: process for process in psutil.process_iter() if _belongs(process, reproduction)}
    for process in found.values():
        with suppress(psutil.NoSuchProcess):
            if process.ppid() in found:
                continue
            say(f"reproduction {reproduction} was killed, its process {process.pid} was not: it is ended")
            end_tree(process.pid, SECONDS_OF_GRACE, top="dvc" not in process.cmdline())


def _belongs(process: psutil.Process, reproduction: str) -> bool:
    if process.pid == os.getpid() or process in psutil.Process().parents():
        return False
    try:
        return process.environ().get(REPRODUCTION) == reproduction
    except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):  # gone, somebody else's, or ending
        return False


def _wait_for(file: TextIO, workspace: Path, say: Say) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(f"waits: reproduction {_read(file).get('reproduction', '')} is at work in {workspace}")
        fcntl.flock(file, fcntl.LOCK_EX)
        say("goes on: the workspace is free")


def _read(file: TextIO) -> dict[str, str]:
    file.seek(0)
    try:
        found: Any = json.loads(file.read() or "{}")
    except json.JSONDecodeError:  # killed while it wrote
        return {}
    return dict(found)
