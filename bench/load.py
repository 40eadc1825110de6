"""Clients of a chat server: so many at once, each answer streamed, timed and kept."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

PATIENCE = 600.0
"""Seconds for one answer: a slow server is slow, not lost."""


@dataclass(frozen=True)
class Reply:
    text: str
    complete: bool
    """Whether the stream came to its proper end."""
    first_seconds: float | None
    """From the request to the first text; None where none came."""
    seconds: float


@dataclass(frozen=True)
class Loaded:
    """What a number of clients got together."""

    replies: Sequence[Reply]
    seconds: float

    @property
    def lost(self) -> int:
        return sum(not reply.complete for reply in self.replies)


def load(address: str, model: str, prompts: Sequence[str], clients: int, max_tokens: int) -> Loaded:
    """Every prompt asked once, by whichever client is free."""
    return asyncio.run(_load(address, model, prompts, clients, max_tokens))


async def _load(address: str, model: str, prompts: Sequence[str], clients: int, max_tokens: int) -> Loaded:
    waiting = list(reversed(prompts))
    replies: list[Reply] = []
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(timeout=PATIENCE, limits=limits) as http:

        async def client() -> None:
            while waiting:
                prompt = waiting.pop()
                body = {
                    "model": model,
                    "messages": [{"role": "user", "content": prompt}],
                    "max_tokens": max_tokens,
                    "temperature": 1.0,
                    "stream": True,
                }
                replies.append(await ask(http, f"{address}/v1/chat/completions", body))

        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        return Loaded(replies, time.perf_counter() - started)


async def ask(http: httpx.AsyncClient, url: str, body: dict[str, object]) -> Reply:
    """One streamed answer; a refusal or a connection that breaks is an incomplete one."""
    started, first, text, complete = time.perf_counter(), None, "", False
    try:
        async with http.stream("POST", url, json=body) as response:
            async for line in response.aiter_lines():
                for choice in choices_of(line):
                    if delta := choice.get("delta", {}).get("content"):
                        first = time.perf_counter() - started if first is None else first
                        text += delta
                    complete |= choice.get("finish_reason") is not None
    except httpx.TransportError:
        complete = False
    return Reply(text, complete, first, time.perf_counter() - started)


def choices_of(line: str) -> list[dict[str, dict[str, str]]]:
    """Of a line of server-sent events; none where it is no chunk of an answer."""
    if not line.startswith("data: {"):
        return []
    choices: list[dict[str, dict[str, str]]] = json.loads(line.removeprefix("data: ")).get("choices", [])
    return choices
