"""Progress of long work: a live bar on a terminal, a log line now and then elsewhere; both with rate and time left."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

Log = Callable[[int, Mapping[str, float]], None]
"""Called by a loop with (step, metrics) after each step."""

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
SECONDS_AVERAGED = 3600.0
"""Of the bar's time left: a step may take minutes, and it needs two of them."""


class Progress:
    """Handed out by `progress`; call it after each piece of work."""

    def __init__(self, name: str, total: int, done: int, bar: RichProgress | None) -> None:
        self.name, self.total, self.done = name, total, done
        self._before, self._bar = done, bar
        self._task = bar.add_task(name, total=total, completed=done, shown="") if bar else None
        self._started = self._last_line = time.monotonic()

    def __call__(self, advance: int = 1, **values: float) -> None:
        """`advance` more units are done; `values` are shown beside the rate."""
        self.done += advance
        shown = "  ".join(f"{key} {value:.4g}" for key, value in values.items())
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=advance, shown=shown)
            return
        now = time.monotonic()
        if self.done < self.total and now - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        rate = (self.done - self._before) / max(now - self._started, 1e-9)
        left = (self.total - self.done) / rate if rate else 0.0
        log.info("%s %d/%d  %s  %.3g/s  %s left", self.name, self.done, self.total, shown, rate, _clock(left))


@contextmanager
def progress(name: str, total: int, done: int = 0) -> Iterator[Progress]:
    """`done` of `total` units were done by an earlier run: rate and time left are of this one's."""
    if not sys.stderr.isatty():
        yield Progress(name, total, done, None)
        return
    # On a narrow terminal the values take several lines: step and time left have to stay.
    whole = Column(no_wrap=True)
    columns = (
        TextColumn("[bold]{task.description}", table_column=whole),
        BarColumn(bar_width=16, table_column=whole),
        MofNCompleteColumn(table_column=whole),
        TextColumn("{task.fields[shown]}", table_column=Column()),
        TimeElapsedColumn(table_column=whole),
        TimeRemainingColumn(table_column=whole),
    )
    with RichProgress(*columns, console=Console(stderr=True), speed_estimate_period=SECONDS_AVERAGED) as bar:
        yield Progress(name, total, done, bar)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
