"""Continuous batching of requests that each bring their own settings: a token for all of them in one step."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from chatloom.models.checkpoint import ChatModel
from chatloom.models.generation import PREFILL_TOKENS, open_decoder
from chatloom.models.sampling import Sampling, sample
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
    uniforms: random.Random
    """Asked once a token, so that the token at a position depends on the seed and the position alone."""
    answer: Counter[int] = field(default_factory=Counter)
    last: int = -1

    def take(self, token: int, stop_ids: frozenset[int], logits: Tensor) -> Token:
        self.answer[token] += 1
        self.last = token
        told = self.request.num_logprobs
        return Token(
            self.number,
            token,
            token in stop_ids or self.answer.total() == self.request.sampling.max_new_tokens,
            None if told is None else logprobs_of(logits, token, told),
        )


class NativeBatch:
    """The project's own decoders: what a request gets depends on no other one but for rounding."""

    def __init__(self, chat_model: ChatModel, size: int) -> None:
        """
        Args:
            size: requests at once. On a CPU the decoder has its own copy of 16-bit weights, in its fastest layout.
        """
        self._decoder = open_decoder(chat_model.model, size, snapshot=chat_model.device.type == "cpu")
        self._stop_ids, self._size = frozenset(chat_model.stop_ids), size
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []
        """In the order of the decoder's rows."""

    def add(self, number: int, request: Request) -> None:
        self._waiting.append(_Row(number, request, random.Random(request.seed)))

    def cancel(self, number: int) -> None:
        self._waiting = deque(row for row in self._waiting if row.number != number)
        for place, row in enumerate(self._rows):
            if row.number == number:
                self._leave(place)
                return

    @torch.inference_mode()
    def step(self) -> list[Token]:
        joining = self._admit()
        if not self._rows and not joining:
            return []
        logits = self._decoder.extend([row.last for row in self._rows], [row.request.prompt_ids for row in joining])
        self._rows += joining
        ids = sample(
            self._warped(logits),
            [row.request.sampling for row in self._rows],
            [row.uniforms.random() for row in self._rows],
        )
        tokens = [row.take(id, self._stop_ids, own) for row, id, own in zip(self._rows, ids, logits, strict=True)]
        for place in reversed(range(len(tokens))):  # from the end: the row that takes a place has been looked at
            if tokens[place].last:
                self._leave(place)
        return tokens

    def _admit(self) -> list[_Row]:
        joining: list[_Row] = []
        room = PREFILL_TOKENS
        while self._waiting and len(self._rows) + len(joining) < self._size:
            room -= len(self._waiting[0].request.prompt_ids)
            if joining and room < 0:
                break
            joining.append(self._waiting.popleft())
        return joining

    def _warped(self, logits: Tensor) -> Tensor:
        """What is sampled from; logprobs are told of `logits` themselves."""
        if not any(row.request.top_k or not row.request.penalties.neutral for row in self._rows):
            return logits
        logits = logits.to(torch.float32, copy=True)
        for own, row in zip(logits, self._rows, strict=True):
            request = row.request
            if not request.penalties.neutral:
                penalize(own, request.penalties, request.prompt_ids, row.answer)
            if request.top_k is not None:
                keep_top(own, request.top_k)
        return logits

    def _leave(self, place: int) -> None:
        self._decoder.drop(place)
        last = self._rows.pop()
        if place < len(self._rows):
            self._rows[place] = last
