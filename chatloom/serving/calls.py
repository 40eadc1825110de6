"""A request from its acceptance to its end: the answers that are made for it, and what is told of it afterwards."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from chatloom.errors import InputError
from chatloom.models.generation import draw_seeds
from chatloom.models.sampling import Sampling
from chatloom.serving.batches import Request, Token
from chatloom.serving.errors import RequestError
from chatloom.serving.logits import Logprobs
from chatloom.serving.options import Options
from chatloom.serving.prompts import ContextLengthError, Prompts
from chatloom.serving.records import Record
from chatloom.serving.schema import ChatRequest, CompletionRequest
from chatloom.serving.served import Served
from chatloom.serving.text import AnswerText, FinishReason, StopScanner
from chatloom.serving.words import WordList, WordScanner

AnyRequest = ChatRequest | CompletionRequest


@dataclass(frozen=True)
class Told:
    """A token of an answer with its logprobs, for those who asked."""

    id: int
    logprobs: Logprobs


@dataclass(frozen=True)
class Delta:
    """What a token adds to one choice."""

    choice: int
    text: str
    told: Sequence[Told]
    finish_reason: FinishReason | None


@dataclass
class _Choice:
    text: AnswerText
    number: int = -1
    """With the scheduler."""
    told: list[Told] = field(default_factory=list)
    """Of tokens whose text is still held back."""


class Call:
    """The choices of one request as they are made. Closing it frees their places, however it ends."""

    def __init__(
        self, served: Served, body: AnyRequest, options: Options, words: WordList | None, record: Record
    ) -> None:
        self.served, self.body, self.record = served, body, record
        self._options, self._words = options, words
        self._choices: list[_Choice] = []
        self._tokens: asyncio.Queue[tuple[int, Token | Exception]] = asyncio.Queue()
        self._started = time.perf_counter()
        self._closed = False
        record.model = served.fingerprint
        served.enter()

    @property
    def num_choices(self) -> int:
        return len(self._choices)

    @property
    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.record.prompt_tokens,
            "completion_tokens": self.record.completion_tokens,
            "total_tokens": self.record.prompt_tokens + self.record.completion_tokens,
        }

    async def start(self) -> None:
        """Check the request and queue its answers.

        Raises:
            InputError: where the request cannot be honoured.
            Busy: where there is no room.
        """
        prompts, scheduler = self.served.model.prompts, self.served.scheduler
        # Reading a long conversation takes a while: not on the event loop.
        if self._words is not None:
            await asyncio.to_thread(refuse_words, self._words, self.body)
        requests = await asyncio.to_thread(make_requests, self.body, prompts, self._options)
        if len(requests) > scheduler.capacity:
            raise RequestError(f"n and prompt ask for {len(requests)} answers: {scheduler.capacity} at most", "n")
        numbers = scheduler.submit(requests, [partial(self._put, index) for index in range(len(requests))])
        self._choices = [_Choice(self._text(), number) for number in numbers]
        self.record.finish_reasons = [None] * len(numbers)
        self.record.prompt_tokens = sum(len(request.prompt_ids) for request in requests[:: self.body.n or 1])

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """What each token adds, whichever choice it is of, until every choice is complete.

        Raises:
            EngineFailure, Stopped: where no more comes.
        """
        while None in self.record.finish_reasons:
            index, token = await self._tokens.get()
            if isinstance(token, Exception):
                raise token
            if self.record.finish_reasons[index] is None:  # else made in the step that was under way when it ended
                delta = self._take(index, token)
                if delta.text or delta.finish_reason is not None:
                    yield delta

    def close(self) -> None:
        """Give up what is still to be made."""
        if self._closed:
            return
        self._closed = True
        for choice in self._choices:
            self.served.scheduler.cancel(choice.number)
        self.served.leave()

    def _put(self, index: int, token: Token | Exception) -> None:
        if self.record.first_token_seconds is None:
            self.record.first_token_seconds = round(time.perf_counter() - self._started, 4)
        self._tokens.put_nowait((index, token))

    def _take(self, index: int, token: Token) -> Delta:
        choice = self._choices[index]
        self.record.completion_tokens += 1
        text = choice.text.push(token.id, last=token.last)
        reason = self.record.finish_reasons[index] = choice.text.finish_reason
        if reason is not None:
            self.served.scheduler.cancel(choice.number)
        if token.logprobs is not None and token.id not in self.served.model.stop_ids:
            choice.told.append(Told(token.id, token.logprobs))
        if not text and reason is None:
            return Delta(index, "", (), None)
        # Tokens of a stop string are not part of the answer, nor are their logprobs.
        told, choice.told = choice.told if text else [], []
        if self._options.audit_bodies:
            self._keep(index, text)
        return Delta(index, text, told, reason)

    def _text(self) -> AnswerText:
        words = [WordScanner(self._words)] if self._words is not None else []
        model = self.served.model
        return AnswerText(model.prompts.decode, model.stop_ids, [StopScanner(self.body.stop), *words])

    def _keep(self, index: int, text: str) -> None:
        if self.record.answers is None:
            self.record.answers = [""] * len(self._choices)
            self.record.prompts = list(self.body.texts)
        self.record.answers[index] += text


def make_requests(body: AnyRequest, prompts: Prompts, options: Options) -> list[Request]:
    """`n` a prompt, in the prompts' order.

    Raises:
        InputError: where a prompt cannot be encoded, or has no room for the answer.
    """
    asked, most = body.asked_tokens, options.max_tokens
    if asked is not None and most is not None and asked > most:
        raise RequestError(f"max_tokens = {asked}: this server gives {most} at most", "max_tokens")
    generator = None if body.seed is None else torch.Generator().manual_seed(body.seed)
    try:
        encoded = body.encode(prompts, drop_oldest=options.overflow == "drop-oldest")
        rooms = [prompts.room(prompt_ids, asked, default=body.default_tokens) for prompt_ids in encoded]
    except InputError as error:
        code = "context_length_exceeded" if isinstance(error, ContextLengthError) else None
        raise RequestError(str(error), body.subject, code=code) from error
    requests = []
    for prompt_ids, room in zip(encoded, rooms, strict=True):
        sampling = Sampling(
            max_new_tokens=room if most is None else min(room, most),
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
        )
        requests += [
            Request(prompt_ids, sampling, seed, body.top_k, body.penalties, body.num_logprobs)
            for seed in draw_seeds(body.n or 1, generator)
        ]
    return requests


def refuse_words(words: WordList, body: AnyRequest) -> None:
    """
    Raises:
        RequestError: where the request has a word of the list, or would be told one.
    """
    if body.num_logprobs is not None:
        raise RequestError("logprobs would tell words that this server filters: leave them out", "logprobs")
    if any(words.find(text) is not None for text in body.texts):
        raise RequestError("the request has a word that is not allowed here", code="content_filter")
