"""The one who steps a batch: requests come from the event loop, tokens go back to it, a thread does the arithmetic."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from chatloom.serving.batches import Batch, Request, Token

log = logging.getLogger(__name__)

Sink = Callable[[Token | Exception], None]
"""Gets the tokens of a request as they come, or why no more will; called on the event loop."""
MEMORY = 0.9
"""Share that the mean duration of answers keeps of what it was, with each new one."""


class Busy(Exception):
    """No room, not even in the queue."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"every place is taken: try again in {retry_after} s")
        self.retry_after = retry_after
        """Seconds until a place can be expected."""


class EngineFailure(Exception):
    """The engine failed while it made this answer; its cause says how."""


class Stopped(Exception):
    """The server stops before this answer is complete."""


@dataclass
class _Asked:
    request: Request
    sink: Sink
    since: float = field(default_factory=time.monotonic)


class Scheduler:
    """Steps a batch as long as anybody wants tokens. For one event loop.

    Adding and cancelling take effect between steps. A step that fails ends the requests in the batch, not the server:
    the next ones get a fresh batch.
    """

    def __init__(self, batch: Batch, open_batch: Callable[[], Batch], *, size: int, queue: int) -> None:
        """
        Args:
            open_batch: makes another one like `batch`.
            size: requests that the batch has room for.
            queue: how many more may wait.
        """
        self._open_batch, self._batch = open_batch, batch
        self.size, self.capacity = size, size + queue
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="generate")
        self._numbers = itertools.count()
        self._asked: dict[int, _Asked] = {}
        self._new: list[int] = []
        self._left: list[int] = []
        self._wanted = asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        self._seconds = 1.0
        """Mean duration of recent answers."""

    @property
    def in_flight(self) -> int:
        """Requests that wait or run."""
        return len(self._asked)

    @property
    def alive(self) -> bool:
        return self._running is not None and not self._running.done()

    def start(self) -> None:
        """Begin to step; inside the event loop."""
        self._running = asyncio.create_task(self._run())

    async def close(self) -> None:
        """End what runs; the sinks get `Stopped`."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])
        self._end_all(Stopped("the server stops"))
        self._thread.shutdown(wait=False, cancel_futures=True)

    def submit(self, requests: Sequence[Request], sinks: Sequence[Sink]) -> list[int]:
        """Queue all of the requests or none; their numbers.

        Raises:
            Busy: where there is no room for them.
            EngineFailure: where the engine has failed and did not come back.
        """
        assert len(requests) <= self.capacity, "refused before"
        if not self.alive:
            raise EngineFailure("the engine is down")
        if self.in_flight + len(requests) > self.capacity:
            # A place gets free once in so many seconds.
            raise Busy(max(1, math.ceil(self._seconds / self.size)))
        numbers = [next(self._numbers) for _ in requests]
        self._asked.update(zip(numbers, map(_Asked, requests, sinks), strict=True))
        self._new += numbers
        self._wanted.set()
        return numbers

    def cancel(self, number: int) -> None:
        """Forget a request; one that has ended is none any more."""
        if self._asked.pop(number, None) is not None:
            self._left.append(number)
            self._wanted.set()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if not self._asked and not self._left:
                self._wanted.clear()
                await self._wanted.wait()
            self._apply_changes()
            step = loop.run_in_executor(self._thread, self._batch.step)
            await asyncio.wait([step])
            if (error := step.exception()) is None:
                for token in step.result():
                    self._deliver(token)
                continue
            log.error("the engine failed: %d answers end, the next get a new batch", self.in_flight, exc_info=error)
            self._end_all(EngineFailure("the engine failed"))
            opening = loop.run_in_executor(self._thread, self._open_batch)
            await asyncio.wait([opening])
            if (error := opening.exception()) is not None:
                log.error("no new batch can be made: this server answers no more", exc_info=error)
                self._end_all(EngineFailure("the engine is down"))
                return
            self._batch = opening.result()

    def _apply_changes(self) -> None:
        for number in self._new:
            if number in self._asked:
                self._batch.add(number, self._asked[number].request)
        for number in self._left:
            self._batch.cancel(number)
        self._new, self._left = [], []

    def _deliver(self, token: Token) -> None:
        asked = self._asked.get(token.request)
        if asked is None:  # cancelled during the step
            return
        if token.last:
            del self._asked[token.request]
            self._seconds = MEMORY * self._seconds + (1 - MEMORY) * (time.monotonic() - asked.since)
        asked.sink(token)

    def _end_all(self, reason: Exception) -> None:
        ended, self._asked = self._asked, {}
        self._new, self._left = [], []
        for asked in ended.values():
            asked.sink(reason)
