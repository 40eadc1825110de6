"""Progress of a loop that went on from a saved state: lines in a log, a bar on a terminal."""

from __future__ import annotations

import io
import logging
from types import SimpleNamespace

import pytest

from chatloom.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("done", "line"), [(6, "loop 7/10  loss 2  0.05/s  1:00 left"), (0, "loop 1/10  loss 2  0.05/s  3:00 left")]
)
def test_a_log_line_counts_all_steps_and_times_those_of_this_run(
    done: int, line: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One step in 20 s, so 3 (or 9) more take 60 s (or 180 s), however fast the earlier run was."""
    now = [100.0]
    monkeypatch.setattr("chatloom.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with caplog.at_level(logging.INFO), progress("loop", 10, done) as advance:
        now[0] += 20
        advance(loss=2.0)
    assert caplog.messages == [line]


@pytest.mark.parametrize("seconds", [1, 600])
def test_the_bar_counts_all_steps_and_times_those_of_this_run(seconds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress("loop", 10, 6) as advance:
        bar = advance._bar
        assert bar is not None
        bar.get_time = lambda: now[0]
        for _ in range(2):
            now[0] += seconds
            advance(loss=2.0)
        (task,) = bar.tasks
        assert task.time_remaining == 2 * seconds
    assert "8/10" in terminal.getvalue()
