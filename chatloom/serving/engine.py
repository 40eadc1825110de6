"""One loaded chat model for one process: conversations in, text out, one answer at a time. The server batches instead
(`chatloom.serving.scheduler`)."""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from chatloom.models.checkpoint import load_causal_lm
from chatloom.models.generation import stream_tokens
from chatloom.models.sampling import Sampling
from chatloom.serving.prompts import Message, Prompts
from chatloom.serving.text import AnswerText, FinishReason, StopScanner

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    text: str
    prompt_tokens: int
    completion_tokens: int
    """Tokens generated, the stop token included."""
    finish_reason: FinishReason


class Engine:
    """A chat model loaded once, for any number of threads; answers wait for each other behind a lock."""

    def __init__(self, path: Path, *, device: str = "auto", dtype: str = "auto", context: int | None = None) -> None:
        """
        Args:
            context: tokens of a conversation and its answer, at most; None for all that the model has room for.

        Raises:
            InputError: where `path` holds no usable checkpoint.
        """
        self.chat_model = load_causal_lm(path, device, dtype)
        own: int = self.chat_model.model.config.max_position_embeddings
        self.prompts = Prompts(self.chat_model.tokenizer, min(own, context or own))
        self._generating = threading.Lock()
        log.info("%s: loaded, context of %d tokens", path, self.prompts.context)

    def generate(
        self, prompt_ids: list[int], sampling: Sampling, *, seed: int | None = None, stop: Sequence[str] = ()
    ) -> Generation:
        """An answer that is generated while it is read; `sampling.max_new_tokens` must fit (see `Prompts.room`).

        Args:
            seed: the same one gives the same answer on the same machine; None draws anew.
            stop: strings that end the answer and are not part of it.
        """
        self.prompts.room(prompt_ids, sampling.max_new_tokens)
        return Generation(self, prompt_ids, sampling, seed, stop)

    def stream(
        self, messages: Sequence[Message], sampling: Sampling, *, seed: int | None = None, stop: Sequence[str] = ()
    ) -> Generation:
        """The answer to a conversation as text deltas; input is checked here, before the first of them."""
        return self.generate(self.prompts.encode(messages), sampling, seed=seed, stop=stop)

    def chat(
        self, messages: Sequence[Message], sampling: Sampling, *, seed: int | None = None, stop: Sequence[str] = ()
    ) -> Answer:
        """The whole answer to a conversation."""
        generation = self.stream(messages, sampling, seed=seed, stop=stop)
        text = "".join(generation)
        assert generation.finish_reason is not None, "nobody closes this one"
        return Answer(text, generation.prompt_tokens, generation.completion_tokens, generation.finish_reason)


class Generation(Iterator[str]):
    """Text deltas of one answer. It has the engine from the first delta until it ends or is closed."""

    def __init__(
        self, engine: Engine, prompt_ids: list[int], sampling: Sampling, seed: int | None, stop: Sequence[str]
    ) -> None:
        self.prompt_tokens = len(prompt_ids)
        self.completion_tokens = 0
        self.finish_reason: FinishReason | None = None
        """None until the answer is complete, and for ever if it was closed before."""
        self._deltas = self._run(engine, prompt_ids, sampling, seed, stop)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        return next(self._deltas)

    def close(self) -> None:
        """Stop here and free the engine."""
        self._deltas.close()

    def _run(
        self, engine: Engine, prompt_ids: list[int], sampling: Sampling, seed: int | None, stop: Sequence[str]
    ) -> Generator[str, None, None]:
        chat, generator = engine.chat_model, None
        text = AnswerText(engine.prompts.decode, chat.stop_ids, [StopScanner(stop)])
        with engine._generating:
            if seed is not None:
                generator = torch.Generator(chat.device).manual_seed(seed)
            for token in stream_tokens(chat.model, prompt_ids, sampling, stop_ids=chat.stop_ids, generator=generator):
                self.completion_tokens += 1
                delta = text.push(token, last=self.completion_tokens == sampling.max_new_tokens)
                self.finish_reason = text.finish_reason
                if delta:
                    yield delta
                if self.finish_reason is not None:
                    return
