"""One loaded chat model: conversations in, text out, one answer at a time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch

from chatloom.data.drops import RowFault
from chatloom.data.templates import encode_prompt
from chatloom.errors import InputError
from chatloom.models.checkpoint import load_causal_lm
from chatloom.models.generation import stream_tokens
from chatloom.models.sampling import Sampling
from chatloom.serving.text import StopScanner, TextDecoder

log = logging.getLogger(__name__)

FinishReason = Literal["stop", "length"]

# Templates know the roles on the right; `developer` is what newer OpenAI clients call the system message.
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
DEFAULT_MAX_NEW_TOKENS = 512
"""Room of an answer where a request names none: one that never stops must not hold the server for its whole context."""


class ContextLengthError(InputError):
    """The conversation, or it and the answer asked for, is longer than the model's context."""


@dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True)
class Answer:
    text: str
    prompt_tokens: int
    completion_tokens: int
    """Tokens generated, the stop token included."""
    finish_reason: FinishReason


class Engine:
    """A chat model loaded once, for any number of threads; answers wait for each other behind a lock."""

    def __init__(self, path: Path, *, device: str = "auto", dtype: str = "auto") -> None:
        """
        Raises:
            InputError: where `path` holds no usable checkpoint.
        """
        self._chat_model = load_causal_lm(path, device, dtype)
        self.context: int = self._chat_model.model.config.max_position_embeddings
        """Tokens of a conversation and its answer, at most."""
        self._generating = threading.Lock()
        # A fast tokenizer raises "Already borrowed" when two threads use it at once.
        self._tokenizing = threading.Lock()
        log.info("%s: loaded, context of %d tokens", path, self.context)

    @property
    def busy(self) -> bool:
        """Whether an answer is being generated now."""
        return self._generating.locked()

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The prompt of a conversation, up to where the answer begins.

        Control tokens written inside a message are read as ordinary text: nobody forges a turn.

        Raises:
            InputError: for no message, text that is not Unicode, or roles that the chat template does not take.
            ContextLengthError: where no token is left for the answer.
        """
        if not messages:
            raise InputError("messages is empty: give at least one message")
        for index, message in enumerate(messages):
            if message.role not in ROLES:
                raise InputError(f"messages[{index}].role = {message.role!r}: use one of {', '.join(ROLES)}")
            try:
                message.content.encode("utf-8")
            except UnicodeEncodeError as error:  # JSON can say "\ud83d", and a tokenizer raises TypeError on it
                raise InputError(f"messages[{index}].content: half a character at position {error.start}") from error
        turns = [{"role": ROLES[message.role], "content": message.content} for message in messages]
        try:
            with self._tokenizing:
                ids = encode_prompt(self._chat_model.tokenizer, turns)
        except RowFault as fault:
            raise InputError(f"messages: {fault}") from fault
        if len(ids) >= self.context:
            raise ContextLengthError(
                f"the conversation has {len(ids)} tokens, and the model's context is {self.context} with the answer: "
                "shorten or drop messages"
            )
        return ids

    def room(self, prompt_ids: Sequence[int], asked: int | None = None) -> int:
        """Tokens that an answer may have: `asked`, or the default as far as the context allows.

        Raises:
            ContextLengthError: where `asked` does not fit.
        """
        left = self.context - len(prompt_ids)
        if asked is None:
            return min(DEFAULT_MAX_NEW_TOKENS, left)
        if asked > left:
            raise ContextLengthError(
                f"the model's context holds {self.context} tokens, and {len(prompt_ids)} of the conversation with "
                f"{asked} of the answer are {len(prompt_ids) + asked}: ask for at most {left}, or shorten the messages"
            )
        return asked

    def generate(
        self, prompt_ids: list[int], sampling: Sampling, *, seed: int | None = None, stop: Sequence[str] = ()
    ) -> Generation:
        """An answer that is generated while it is read; `sampling.max_new_tokens` must fit (see `room`).

        Args:
            seed: the same one gives the same answer on the same machine; None draws anew.
            stop: strings that end the answer and are not part of it.
        """
        self.room(prompt_ids, sampling.max_new_tokens)
        return Generation(self, prompt_ids, sampling, seed, stop)

    def stream(
        self, messages: Sequence[Message], sampling: Sampling, *, seed: int | None = None, stop: Sequence[str] = ()
    ) -> Generation:
        """The answer to a conversation as text deltas; input is checked here, before the first of them."""
        return self.generate(self.encode(messages), sampling, seed=seed, stop=stop)

    def chat(
        self, messages: Sequence[Message], sampling: Sampling, *, seed: int | None = None, stop: Sequence[str] = ()
    ) -> Answer:
        """The whole answer to a conversation."""
        generation = self.stream(messages, sampling, seed=seed, stop=stop)
        text = "".join(generation)
        assert generation.finish_reason is not None, "nobody cancels this one"
        return Answer(text, generation.prompt_tokens, generation.completion_tokens, generation.finish_reason)

    def _decode(self, ids: Sequence[int]) -> str:
        with self._tokenizing:
            text: str = self._chat_model.tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        return text

    def _generator(self, seed: int | None) -> torch.Generator | None:
        return None if seed is None else torch.Generator(self._chat_model.device).manual_seed(seed)


class Generation(Iterator[str]):
    """Text deltas of one answer. It has the engine from the first delta until it ends, is closed or is cancelled."""

    def __init__(
        self, engine: Engine, prompt_ids: list[int], sampling: Sampling, seed: int | None, stop: Sequence[str]
    ) -> None:
        self.prompt_tokens = len(prompt_ids)
        self.completion_tokens = 0
        self.finish_reason: FinishReason | None = None
        """None until the answer is complete, and for ever if it was cancelled."""
        self._cancelled = threading.Event()
        self._deltas = self._run(engine, prompt_ids, sampling, seed, stop)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        return next(self._deltas)

    def close(self) -> None:
        """Stop here and free the engine; for the thread that reads."""
        self._deltas.close()

    def cancel(self) -> None:
        """Have it end before its next token; for any thread."""
        self._cancelled.set()

    def _run(
        self, engine: Engine, prompt_ids: list[int], sampling: Sampling, seed: int | None, stop: Sequence[str]
    ) -> Generator[str, None, None]:
        decoder, scanner = TextDecoder(engine._decode), StopScanner(stop)
        stop_ids = engine._chat_model.stop_ids
        with engine._generating:
            if self._cancelled.is_set():
                return
            tokens = stream_tokens(
                engine._chat_model.model, prompt_ids, sampling, stop_ids=stop_ids, generator=engine._generator(seed)
            )
            for token in tokens:
                if self._cancelled.is_set():
                    return
                self.completion_tokens += 1
                if token in stop_ids:
                    self.finish_reason = "stop"
                    break
                if delta := scanner.push(decoder.push(token)):
                    yield delta
                if scanner.found:
                    self.finish_reason = "stop"
                    return
            tail = scanner.push(decoder.flush())
            tail += "" if scanner.found else scanner.flush()
            self.finish_reason = self.finish_reason or ("stop" if scanner.found else "length")
            if tail:
                yield tail
