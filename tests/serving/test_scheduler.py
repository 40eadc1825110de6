"""The scheduler over a batch that counts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from chatloom.models.sampling import Sampling
from chatloom.serving.batches import Request, Token
from chatloom.serving.scheduler import Busy, EngineFailure, Scheduler, Stopped

ASKED = Request([1], Sampling(3), seed=0)


class Counting:
    """Gives each request the tokens 0, 1, 2; waits for `gate` before a step."""

    def __init__(self) -> None:
        self.made: dict[int, int] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.fails = False

    def add(self, number: int, request: Request) -> None:
        self.made[number] = 0

    def cancel(self, number: int) -> None:
        self.made.pop(number, None)

    def step(self) -> list[Token]:
        assert self.gate.wait(20)
        if self.fails:
            raise RuntimeError("broken")
        tokens = [Token(number, made, made == 2, None) for number, made in self.made.items()]
        self.made = {number: made + 1 for number, made in self.made.items() if made < 2}
        return tokens


Found = list[Token | Exception]


def scenario(
    test: Callable[[Scheduler, Counting], Coroutine[Any, Any, None]], reopen: Callable[[], Counting] = Counting
) -> None:
    async def run() -> None:
        batch = Counting()
        scheduler = Scheduler(batch, reopen, size=2, queue=1)
        scheduler.start()
        try:
            async with asyncio.timeout(30):
                await test(scheduler, batch)
        finally:
            batch.gate.set()
            await scheduler.close()

    asyncio.run(run())


async def ended(*founds: Found) -> None:
    while not all(found and (isinstance(found[-1], Exception) or found[-1].last) for found in founds):
        await asyncio.sleep(0)


def test_tokens_reach_those_who_asked() -> None:
    async def test(scheduler: Scheduler, batch: Counting) -> None:
        first: Found = []
        second: Found = []
        a, b = scheduler.submit([ASKED, ASKED], [first.append, second.append])
        await ended(first, second)
        assert first == [Token(a, 0, False, None), Token(a, 1, False, None), Token(a, 2, True, None)]
        assert [token.request for token in second if isinstance(token, Token)] == [b] * 3
        assert scheduler.in_flight == 0

    scenario(test)


def test_all_or_none_have_a_place() -> None:
    async def test(scheduler: Scheduler, batch: Counting) -> None:
        batch.gate.clear()
        found: list[Found] = [[], []]
        scheduler.submit([ASKED, ASKED], [each.append for each in found])
        with pytest.raises(Busy) as busy:
            scheduler.submit([ASKED, ASKED], [print, print])
        assert busy.value.retry_after >= 1
        assert scheduler.in_flight == 2
        last: Found = []
        scheduler.submit([ASKED], [last.append])
        batch.gate.set()
        await ended(*found, last)

    scenario(test)


def test_a_cancelled_request_gets_nothing_more() -> None:
    async def test(scheduler: Scheduler, batch: Counting) -> None:
        batch.gate.clear()
        gone: Found = []
        here: Found = []
        number, _ = scheduler.submit([ASKED, ASKED], [gone.append, here.append])
        while number not in batch.made:  # the step is under way
            await asyncio.sleep(0)
        scheduler.cancel(number)
        scheduler.cancel(number)
        assert scheduler.in_flight == 1
        batch.gate.set()
        await ended(here)
        assert gone == []
        while number in batch.made:
            await asyncio.sleep(0)

    scenario(test)


def test_one_cancelled_before_it_begins_never_joins() -> None:
    async def test(scheduler: Scheduler, batch: Counting) -> None:
        found: Found = []
        (number,) = scheduler.submit([ASKED], [print])
        scheduler.cancel(number)
        scheduler.submit([ASKED], [found.append])
        await ended(found)
        assert number not in batch.made

    scenario(test)


def test_a_failed_step_ends_what_runs_and_no_more() -> None:
    async def test(scheduler: Scheduler, batch: Counting) -> None:
        batch.fails = True
        found: Found = []
        scheduler.submit([ASKED], [found.append])
        await ended(found)
        assert isinstance(found[-1], EngineFailure)
        after: Found = []
        scheduler.submit([ASKED], [after.append])
        await ended(after)
        assert isinstance(after[-1], Token)
        assert scheduler.alive

    scenario(test)


def test_an_engine_that_does_not_come_back() -> None:
    def gone() -> Counting:
        raise RuntimeError("no device")

    async def test(scheduler: Scheduler, batch: Counting) -> None:
        batch.fails = True
        found: Found = []
        scheduler.submit([ASKED], [found.append])
        await ended(found)
        while scheduler.alive:
            await asyncio.sleep(0)
        with pytest.raises(EngineFailure):
            scheduler.submit([ASKED], [print])

    scenario(test, gone)


def test_closing_tells_who_waits() -> None:
    async def run() -> None:
        batch = Counting()
        scheduler = Scheduler(batch, Counting, size=2, queue=1)
        scheduler.start()
        batch.gate.clear()
        found: Found = []
        scheduler.submit([ASKED], [found.append])
        await asyncio.sleep(0)
        await scheduler.close()
        assert isinstance(found[-1], Stopped)
        batch.gate.set()

    asyncio.run(run())
