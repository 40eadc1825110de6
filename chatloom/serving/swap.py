"""A new version beside the one that is served: loaded, checked, switched to between requests; the old one drains."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from chatloom.errors import InputError
from chatloom.registry.resolve import Resolved, current_version, resolve
from chatloom.serving.metrics import Metrics
from chatloom.serving.served import Served, Slot

log = logging.getLogger(__name__)
T = TypeVar("T")


class Watcher:
    """Asks the registry which version an address means, and serves that one as soon as it can."""

    def __init__(self, uri: str, open_served: Callable[[Resolved], Served], slot: Slot, metrics: Metrics) -> None:
        """
        Args:
            uri: `models:/name@alias`.
            open_served: loads and checks a version; what it raises refuses the version.
        """
        self._uri, self._open_served, self._slot, self._metrics = uri, open_served, slot, metrics
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="swap")
        self._refused: str | None = None
        """The version that the address meant when it failed; tried again only after it meant another one."""
        self._trouble: str | None = None
        """Why the registry did not answer when it was last asked."""
        self._tasks: set[asyncio.Task[None]] = set()
        metrics.registry_up.set(1)

    def start(self, seconds: float) -> None:
        """Look every so many seconds from now on; inside the event loop."""
        self._keep(asyncio.create_task(self._run(seconds)))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def look(self) -> None:
        """Ask once, and swap if there is reason to."""
        version = await self._ask(lambda: current_version(self._uri))
        if version in (None, self._refused):
            return
        self._refused = None
        if version == self._slot.current.version:
            return
        log.info("%s means version %s now: it is loaded beside %s", self._uri, version, self._slot.current.version)
        loop = asyncio.get_running_loop()
        folder = TemporaryDirectory(prefix="chatloom-")  # a server that swaps for months keeps no downloads
        try:
            resolved = await self._ask(lambda: resolve(self._uri, Path(folder.name)))
            if resolved is None:
                return
            opening = loop.run_in_executor(self._thread, self._open_served, resolved)
            await asyncio.wait([opening])
        finally:
            loop.run_in_executor(self._thread, folder.cleanup)
        if (error := opening.exception()) is not None:
            self._refuse(version, error)
            return
        self._switch(opening.result())

    async def _run(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            await self.look()

    async def _ask(self, question: Callable[[], T]) -> T | None:
        """The registry's answer; None where it has none, which is logged once."""
        asking = asyncio.get_running_loop().run_in_executor(self._thread, question)
        await asyncio.wait([asking])
        error = asking.exception()
        if isinstance(error, InputError):
            if self._trouble is None:
                log.warning("version %s stays: %s", self._slot.current.version, error)
            self._trouble = str(error)
            self._metrics.registry_up.set(0)
            return None
        if self._trouble is not None:
            log.info("the registry answers again")
        self._trouble = None
        self._metrics.registry_up.set(1)
        return asking.result()

    def _refuse(self, version: str, error: BaseException) -> None:
        # A mistake of ours in loading it is no reason to stop serving the other one, but its traceback is wanted.
        trace = None if isinstance(error, InputError) else error
        log.error("version %s is refused, %s stays: %s", version, self._slot.current.version, error, exc_info=trace)
        self._refused = version
        self._metrics.swaps.labels("refused").inc()

    def _switch(self, new: Served) -> None:
        old, self._slot.current = self._slot.current, new
        new.scheduler.start()
        self._metrics.swaps.labels("served").inc()
        log.info("version %s is served; %s ends when its last answer does", new.version, old.version)
        self._keep(asyncio.create_task(_retire(old)))

    def _keep(self, task: asyncio.Task[None]) -> None:
        # The event loop itself forgets tasks that nobody holds.
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _retire(old: Served) -> None:
    await old.retire()
    log.info("version %s is unloaded", old.version)
    del old
    gc.collect()  # modules and their hooks are cycles: without this the weights stay for a while
