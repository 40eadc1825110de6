"""Ending processes together with all that they started."""

from __future__ import annotations

import os
from contextlib import suppress

import psutil

SECONDS_TO_END = 30.0
SECONDS_OF_GRACE = 8.0
"""In which a stage that is told to stop finishes its training step and saves its state: a cancel takes under 10 s."""


def end_tree(pid: int, seconds: float = SECONDS_TO_END, *, top: bool = True) -> None:
    """SIGTERM to a process and all below; SIGKILL to what is left after `seconds`, or once we are told to stop again.

    Args:
        top: False where the process ends by itself when those below it have: DVC then frees its locks. Who is in a
            session of its own, as the ranks of a stage are, is then told by the process that started it, and so once.
    """
    process = psutil.Process(pid)
    session, below = os.getsid(pid), process.children(recursive=True)
    try:
        for one in [*below, process] if top or not below else below:
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                if top or os.getsid(one.pid) == session:
                    one.terminate()
        psutil.wait_procs([*below, process], timeout=seconds)
    finally:
        for one in (*below, process):
            with suppress(psutil.NoSuchProcess):
                one.kill()
