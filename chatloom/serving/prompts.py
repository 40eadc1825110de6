"""From conversations and texts to the tokens that a model is given, and back; within its context."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from chatloom.data.drops import RowFault
from chatloom.data.templates import encode_prompt
from chatloom.errors import InputError

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


class Prompts:
    """A checkpoint's tokenizer and chat template, for any number of threads."""

    def __init__(self, tokenizer: Any, context: int) -> None:
        """
        Args:
            context: tokens of a conversation and its answer, at most.
        """
        self.context = context
        self._tokenizer = tokenizer
        # A fast tokenizer raises "Already borrowed" when two threads use it at once.
        self._tokenizing = threading.Lock()

    @property
    def vocabulary(self) -> int:
        """Number of tokens, added ones included."""
        return len(self._tokenizer)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The prompt of a conversation, up to where the answer begins.

        Control tokens written inside a message are read as ordinary text: nobody forges a turn.

        Raises:
            InputError: for no message, text that is not Unicode, or roles that the chat template does not take.
            ContextLengthError: where no token is left for the answer.
        """
        ids = self._encode(messages)
        if len(ids) >= self.context:
            raise ContextLengthError(
                f"the conversation has {len(ids)} tokens, and the model's context is {self.context} with the answer: "
                "shorten or drop messages"
            )
        return ids

    def encode_latest(self, messages: Sequence[Message], asked: int | None) -> list[int]:
        """As `encode`, without the oldest turns where the answer would have no room beside all of them.

        System messages at the beginning stay, and so does the last message; what is left begins with the user.

        Raises:
            ContextLengthError: where the last message alone is too long.
        """
        room = self.context - (min(DEFAULT_MAX_NEW_TOKENS, self.context // 2) if asked is None else asked)
        opening = next((i for i, message in enumerate(messages) if ROLES.get(message.role) != "system"), len(messages))
        starts = [i for i in range(opening + 1, len(messages)) if messages[i].role == "user"]
        candidates = [list(messages), *([*messages[:opening], *messages[start:]] for start in starts)]
        fitting = bisect_left(range(len(candidates)), True, key=lambda i: len(self._encode(candidates[i])) <= room)
        return self.encode(candidates[min(fitting, len(candidates) - 1)])

    def encode_text(self, text: str) -> list[int]:
        """The tokens of a bare text, as the model was pretrained on it; control tokens are read as ordinary text.

        Raises:
            InputError: where it is empty or not Unicode.
            ContextLengthError: where no token is left for the answer.
        """
        _require_unicode(text, "prompt")
        with self._tokenizing:
            ids: list[int] = self._tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"]
        return self.check_ids(ids)

    def check_ids(self, ids: list[int]) -> list[int]:
        """Token ids as a client gave them.

        Raises:
            InputError: where there is none, or one is not in the vocabulary.
            ContextLengthError: where no token is left for the answer.
        """
        if not ids:
            raise InputError("prompt is empty: give at least one token")
        if wrong := next((id for id in ids if not 0 <= id < self.vocabulary), None):
            raise InputError(f"prompt has token {wrong}: the vocabulary has 0 to {self.vocabulary - 1}")
        if len(ids) >= self.context:
            raise ContextLengthError(
                f"the prompt has {len(ids)} tokens, and the model's context is {self.context} with the answer: "
                "shorten it"
            )
        return ids

    def room(
        self, prompt_ids: Sequence[int], asked: int | None = None, *, default: int = DEFAULT_MAX_NEW_TOKENS
    ) -> int:
        """Tokens that an answer may have: `asked`, or the default as far as the context allows.

        Raises:
            ContextLengthError: where `asked` does not fit.
        """
        left = self.context - len(prompt_ids)
        if asked is None:
            return min(default, left)
        if asked > left:
            raise ContextLengthError(
                f"the model's context holds {self.context} tokens, and {len(prompt_ids)} of the conversation with "
                f"{asked} of the answer are {len(prompt_ids) + asked}: ask for at most {left}, or shorten the messages"
            )
        return asked

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, without control tokens."""
        with self._tokenizing:
            text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def name(self, id: int) -> str:
        """One token as text, control tokens included."""
        with self._tokenizing:
            text: str = self._tokenizer.decode([id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        if not messages:
            raise InputError("messages is empty: give at least one message")
        for index, message in enumerate(messages):
            if message.role not in ROLES:
                raise InputError(f"messages[{index}].role = {message.role!r}: use one of {', '.join(ROLES)}")
            _require_unicode(message.content, f"messages[{index}].content")
        turns = [{"role": ROLES[message.role], "content": message.content} for message in messages]
        try:
            with self._tokenizing:
                return encode_prompt(self._tokenizer, turns)
        except RowFault as fault:
            raise InputError(f"messages: {fault}") from fault


def _require_unicode(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can say "\ud83d", and a tokenizer raises TypeError on it
        raise InputError(f"{where}: half a character at position {error.start}") from error
