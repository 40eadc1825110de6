"""Sampling responses: the rollout engine, and what is built on it. V vocabulary."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from chatloom.models.decoder import Decoder, ModelDecoder
from chatloom.models.llama_decoder import LlamaDecoder
from chatloom.models.sampling import Sampling, sample
from chatloom.parallel.ranks import ALONE, Ranks

PREFILL_TOKENS = 2048
"""Prompt tokens that join the batch in one step, unless a single prompt is longer: bounds the memory of a pass."""


@dataclass(frozen=True)
class Event:
    """One token of one request."""

    request: int
    token: int
    finish: Literal["stop", "length"] | None
    """Why this is the last one; None where more follow."""


@dataclass
class _Request:
    number: int
    prompt: Sequence[int]
    sampling: Sampling
    stop_ids: frozenset[int]
    uniforms: random.Random
    """Asked once a token, so that the token at a position depends on the seed and the position alone."""
    last: int = -1
    num_tokens: int = 0

    def take(self, token: int) -> Event:
        self.last, self.num_tokens = token, self.num_tokens + 1
        if token in self.stop_ids:
            return Event(self.number, token, "stop")
        return Event(self.number, token, "length" if self.num_tokens == self.sampling.max_new_tokens else None)


class Engine:
    """Continuous batching: a request leaves the batch when it is done, and the next one that waits takes its place.

    Requests bring their own settings and seed; what a request gets does not depend on the others, nor on the size of
    the batch, but for rounding. For one thread.
    """

    def __init__(
        self, decoder: Decoder, batch_size: int, warp: Callable[[Tensor, list[int]], Tensor] = lambda logits, _: logits
    ) -> None:
        """
        Args:
            warp: gets the (requests, V) logits of a step and the requests' numbers, and gives what is sampled from; the
                events of the step have the same order.
        """
        self._decoder, self._batch_size, self._warp = decoder, batch_size, warp
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        """In the order of the decoder's rows."""
        self._num_requests = 0

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._running

    def add(self, prompt_ids: Sequence[int], sampling: Sampling, *, stop_ids: Sequence[int], seed: int) -> int:
        """Queue a request; returns its number, counted from 0."""
        assert prompt_ids, "an empty prompt: a model has nothing to go on from"
        number = self._num_requests
        self._num_requests += 1
        self._waiting.append(_Request(number, prompt_ids, sampling, frozenset(stop_ids), random.Random(seed)))
        return number

    def cancel(self, request: int) -> None:
        """Forget a request; one that has ended already is none any more."""
        self._waiting = deque(waiting for waiting in self._waiting if waiting.number != request)
        for row, running in enumerate(self._running):
            if running.number == request:
                self._leave(row)
                return

    def step(self) -> list[Event]:
        """One token for every request in the batch, those that join it now included."""
        joining = self._admit()
        if not self._running and not joining:
            return []
        logits = self._decoder.extend([request.last for request in self._running], [r.prompt for r in joining])
        self._running += joining
        tokens = sample(
            self._warp(logits, [request.number for request in self._running]),
            [request.sampling for request in self._running],
            [request.uniforms.random() for request in self._running],
        )
        events = [request.take(token) for request, token in zip(self._running, tokens, strict=True)]
        for row in reversed(range(len(events))):  # from the end: the row that takes a place has been looked at
            if events[row].finish is not None:
                self._leave(row)
        return events

    def _admit(self) -> list[_Request]:
        joining: list[_Request] = []
        room = PREFILL_TOKENS
        while self._waiting and len(self._running) + len(joining) < self._batch_size:
            room -= len(self._waiting[0].prompt)
            if joining and room < 0:
                break
            joining.append(self._waiting.popleft())
        return joining

    def _leave(self, row: int) -> None:
        self._decoder.drop(row)
        last = self._running.pop()
        if row < len(self._running):
            self._running[row] = last


def open_decoder(model: Any, num_rows: int, *, snapshot: bool) -> Decoder:
    """The leanest decoder for `model`, which has `chatloom.models.attention`; see `LlamaDecoder` for `snapshot`."""
    if isinstance(model, LlamaForCausalLM) and model.config.hidden_act == "silu":
        return LlamaDecoder(model, num_rows, snapshot=snapshot)
    return ModelDecoder(model, num_rows)


def generate(
    model: Any,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    *,
    stop_ids: Sequence[int],
    generator: torch.Generator | None = None,
    batch_size: int = 16,
    ranks: Ranks = ALONE,
    on_done: Callable[[int], object] = lambda rows: None,
) -> list[list[int]]:
    """One response a prompt, in the prompts' order; each ends with its stop token unless the limit came first.

    Args:
        model: a causal language model with `chatloom.models.attention`, and the adapter on that is to answer.
        generator: draws a seed a prompt, and nothing else; PyTorch's default one where it is None.
        batch_size: sequences at once; what is sampled does not depend on it, but for rounding.
        ranks: who share the prompts, all of them with the same model and the same generator; each gets all responses.
        on_done: called with the number of responses finished since the last call.
    """

    def respond(own: list[tuple[list[int], int]]) -> list[list[int]]:
        engine = Engine(open_decoder(model, batch_size, snapshot=model.device.type == "cpu"), batch_size)
        for prompt, seed in own:
            engine.add(prompt, sampling, stop_ids=stop_ids, seed=seed)
        responses: list[list[int]] = [[] for _ in own]
        while not engine.idle:
            events = engine.step()
            for event in events:
                responses[event.request].append(event.token)
            if done := sum(event.finish is not None for event in events):
                on_done(done)
        return responses

    seeds = draw_seeds(len(prompts), generator)
    return ranks.spread(list(zip(prompts, seeds, strict=True)), [len(prompt) for prompt in prompts], respond)


def stream_tokens(
    model: Any,
    prompt_ids: list[int],
    sampling: Sampling,
    *,
    stop_ids: Sequence[int],
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """The tokens of one response as they are sampled, the stop token included where there is one."""
    engine = Engine(open_decoder(model, 1, snapshot=False), 1)
    (seed,) = draw_seeds(1, generator)
    engine.add(prompt_ids, sampling, stop_ids=stop_ids, seed=seed)
    while not engine.idle:
        for event in engine.step():
            yield event.token


def draw_seeds(count: int, generator: torch.Generator | None) -> list[int]:
    """One a request, each below 2^63; PyTorch's default generator draws them where `generator` is None."""
    device = generator.device if generator is not None else torch.device("cpu")
    seeds: list[int] = torch.randint(2**63 - 1, (count,), generator=generator, device=device).tolist()
    return seeds
