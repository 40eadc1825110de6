"""Progress of a loop that went on from a saved state: lines in a log, a bar on a terminal."""

from __future__ import annotations

import io
import logging
import re
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


def test_a_narrow_terminal_shows_step_values_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "80")
    with progress("train_ppo", 500, 120) as advance:
        advance(policy_loss=-0.01234, tokens_per_s=321.5, score=0.4321, kl=2.345)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    for part in (
        "train_ppo",
        "121/500",
        "policy_loss",
        "-0.01234",
        "321.5",
        "0.4321",
        "kl 2.345",
        "0:00:00",
        "-:--:--",
    ):
        assert part in shown
