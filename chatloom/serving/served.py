"""A loaded version with everything that answers its requests; and the one that is served now."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from chatloom.errors import InputError
from chatloom.models.sampling import Sampling
from chatloom.serving.batches import Batch, Request
from chatloom.serving.prompts import Message, Prompts
from chatloom.serving.scheduler import Scheduler

CHECK_TOKENS = 8
CHECK_STEPS = 1000
"""Many more than tokens: an engine with a pipeline of its own takes steps that give none."""


@dataclass(frozen=True)
class Model:
    """What an engine has loaded, of whichever kind."""

    prompts: Prompts
    stop_ids: tuple[int, ...]
    open_batch: Callable[[], Batch]


@dataclass
class Served:
    name: str
    version: str | None
    """None for a plain folder."""
    lineage: Mapping[str, str]
    model: Model
    scheduler: Scheduler
    created: int
    """Unix time when it was loaded."""
    _users: int = field(default=0, init=False)
    """Requests that have taken it and are not over."""
    _free: asyncio.Event = field(default_factory=asyncio.Event, init=False)

    @property
    def fingerprint(self) -> str:
        return f"{self.name}/{self.version}" if self.version is not None else self.name

    def card(self) -> dict[str, Any]:
        """As /v1/models shows it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "chatloom",
            "version": self.version,
            "context": self.model.prompts.context,
            "lineage": dict(self.lineage),
        }

    def enter(self) -> None:
        """Count a request that has taken this version."""
        self._users += 1
        self._free.clear()

    def leave(self) -> None:
        self._users -= 1
        if not self._users:
            self._free.set()

    async def retire(self) -> None:
        """Wait until the last request that has taken it is over, then end its thread."""
        if self._users:
            await self._free.wait()
        await self.scheduler.close()


@dataclass
class Slot:
    """The version that requests get which come now."""

    current: Served


def check(prompts: Prompts, batch: Batch) -> None:
    """Have a fresh model answer once: everything that a request needs is there, and its numbers are numbers.

    Raises:
        InputError: where it gives no finite probabilities.
    """
    prompt_ids = prompts.encode([Message("user", "Hello! 你好！")])
    batch.add(0, Request(prompt_ids, Sampling(CHECK_TOKENS, temperature=0.0), seed=0, num_logprobs=1))
    for _ in range(CHECK_STEPS):
        for token in batch.step():
            if token.logprobs is None or not math.isfinite(token.logprobs.sampled):
                raise InputError("the self-check: the model's probabilities are not numbers; its weights are damaged")
            prompts.decode([token.id])
            if token.last:
                return
    raise InputError(f"the self-check: no end after {CHECK_STEPS} steps, though {CHECK_TOKENS} tokens are the limit")
