"""Continuous batching of requests that each bring their own settings: a token for all of them in one step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from chatloom.models.checkpoint import ChatModel
from chatloom.models.generation import Engine, Event, open_decoder
from chatloom.models.sampling import Sampling
from chatloom.serving.logits import Logprobs, Penalties, keep_top, logprobs_of, penalize


@dataclass(frozen=True)
class Request:
    """One answer that is wanted."""

    prompt_ids: Sequence[int]
    sampling: Sampling
    seed: int
    top_k: int | None = None
    """Only so many of the likeliest tokens may come; None for all."""
    penalties: Penalties = field(default_factory=Penalties)
    num_logprobs: int | None = None
    """How many of the likeliest tokens are told with each sampled one; None tells no logprobs at all."""


@dataclass(frozen=True)
class Token:
    request: int
    """The number that the request was added with."""
    id: int
    last: bool
    logprobs: Logprobs | None


class Batch(Protocol):
    """A model that answers many requests at once. For one thread at a time."""

    def add(self, number: int, request: Request) -> None:
        """Queue a request; it joins as soon as there is room."""

    def cancel(self, number: int) -> None:
        """Forget a request; one that has ended is none any more."""

    def step(self) -> list[Token]:
        """The next token of every request that has room; a stop token and the length limit end a request."""


@dataclass
class _Row:
    number: int
    request: Request
    answer: Counter[int] = field(default_factory=Counter)


class NativeBatch:
    """The project's own engine, with penalties, top-k and logprobs: what a request gets depends on no other one but for
    rounding."""

    def __init__(self, chat_model: ChatModel, size: int) -> None:
        """
        Args:
            size: requests at once. On a CPU the decoder has its own copy of 16-bit weights, in its fastest layout.
        """
        decoder = open_decoder(chat_model.model, size, snapshot=chat_model.device.type == "cpu")
        self._engine, self._stop_ids = Engine(decoder, size, self._warped), chat_model.stop_ids
        self._rows: dict[int, _Row] = {}
        """By their number with the engine."""
        self._logits: list[Tensor] = []
        """(V) of each request in the step that is under way, as the model gave them."""

    def add(self, number: int, request: Request) -> None:
        own = self._engine.add(request.prompt_ids, request.sampling, stop_ids=self._stop_ids, seed=request.seed)
        self._rows[own] = _Row(number, request)

    def cancel(self, number: int) -> None:
        for own in [own for own, row in self._rows.items() if row.number == number]:
            self._engine.cancel(own)
            del self._rows[own]

    @torch.inference_mode()
    def step(self) -> list[Token]:
        self._logits = []
        events = self._engine.step()
        return [self._token(event, logits) for event, logits in zip(events, self._logits, strict=True)]

    def _token(self, event: Event, logits: Tensor) -> Token:
        row, last = self._rows[event.request], event.finish is not None
        row.answer[event.token] += 1
        if last:
            del self._rows[event.request]
        told = row.request.num_logprobs
        return Token(row.number, event.token, last, None if told is None else logprobs_of(logits, event.token, told))

    def _warped(self, logits: Tensor, numbers: list[int]) -> Tensor:
        """What is sampled from; logprobs are told of `logits` themselves."""
        self._logits = list(logits)
        rows = [self._rows[number] for number in numbers]
        if not any(row.request.top_k or not row.request.penalties.neutral for row in rows):
            return logits
        logits = logits.to(torch.float32, copy=True)
        for own, row in zip(logits, rows, strict=True):
            request = row.request
            if not request.penalties.neutral:
                penalize(own, request.penalties, request.prompt_ids, row.answer)
            if request.top_k is not None:
                keep_top(own, request.top_k)
        return logits
