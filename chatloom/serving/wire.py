"""Answers as OpenAI's clients expect them: whole, and as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from chatloom.serving.calls import Delta, Told
from chatloom.serving.prompts import Prompts
from chatloom.serving.text import REPLACEMENT, FinishReason

LEAST_LOGPROB = -9999.0
"""JSON has no infinity."""


@dataclass
class Whole:
    """One choice when it is complete."""

    text: str = ""
    told: list[Told] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.told += delta.told
        self.finish_reason = delta.finish_reason


class Format(Protocol):
    """One of the two kinds of answers."""

    head: dict[str, Any]
    """Fields of every body."""
    whole_object: str
    piece_object: str

    def whole(self, index: int, choice: Whole) -> dict[str, Any]: ...

    def opening(self, index: int) -> dict[str, Any] | None:
        """What comes before the first text, if anything does."""

    def piece(self, delta: Delta) -> dict[str, Any]:
        """Text and logprobs, without an end."""

    def ending(self, index: int, reason: FinishReason) -> dict[str, Any]: ...


class ChatFormat:
    whole_object, piece_object = "chat.completion", "chat.completion.chunk"

    def __init__(self, head: dict[str, Any], prompts: Prompts) -> None:
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", **head}
        self._prompts = prompts

    def whole(self, index: int, choice: Whole) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        logprobs = self._logprobs(choice.told)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def opening(self, index: int) -> dict[str, Any]:
        return _chunk(index, {"role": "assistant", "content": ""})

    def piece(self, delta: Delta) -> dict[str, Any]:
        return _chunk(delta.choice, {"content": delta.text}, self._logprobs(delta.told))

    def ending(self, index: int, reason: FinishReason) -> dict[str, Any]:
        return _chunk(index, {}, reason=reason)

    def _logprobs(self, told: Sequence[Told]) -> dict[str, Any] | None:
        if not told:
            return None
        content = [
            {
                **self._entry(token.id, token.logprobs.sampled),
                "top_logprobs": [self._entry(*top) for top in token.logprobs.top],
            }
            for token in told
        ]
        return {"content": content, "refusal": None}

    def _entry(self, id: int, logprob: float) -> dict[str, Any]:
        name = self._prompts.name(id)
        # A part of a character has no text: its bytes are not known here.
        known = None if REPLACEMENT in name else list(name.encode())
        return {"token": name, "logprob": max(logprob, LEAST_LOGPROB), "bytes": known}


class TextFormat:
    whole_object = piece_object = "text_completion"

    def __init__(self, head: dict[str, Any], prompts: Prompts) -> None:
        self.head = {"id": f"cmpl-{uuid.uuid4().hex}", **head}
        self._prompts = prompts
        self._offsets: dict[int, int] = {}
        """Characters of each choice that were told already."""

    def whole(self, index: int, choice: Whole) -> dict[str, Any]:
        logprobs = self._logprobs(index, choice.told)
        return {"index": index, "text": choice.text, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def opening(self, index: int) -> None:
        return None

    def piece(self, delta: Delta) -> dict[str, Any]:
        logprobs = self._logprobs(delta.choice, delta.told)
        return {"index": delta.choice, "text": delta.text, "logprobs": logprobs, "finish_reason": None}

    def ending(self, index: int, reason: FinishReason) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": reason}

    def _logprobs(self, index: int, told: Sequence[Told]) -> dict[str, Any] | None:
        if not told:
            return None
        names = [self._prompts.name(token.id) for token in told]
        offset, offsets = self._offsets.get(index, 0), []
        for name in names:
            offsets.append(offset)
            offset += len(name)
        self._offsets[index] = offset
        return {
            "tokens": names,
            "token_logprobs": [max(token.logprobs.sampled, LEAST_LOGPROB) for token in told],
            "top_logprobs": [
                {self._prompts.name(id): max(logprob, LEAST_LOGPROB) for id, logprob in token.logprobs.top}
                for token in told
            ],
            "text_offset": offsets,
        }


def head_of(model: str, fingerprint: str) -> dict[str, Any]:
    return {"created": int(time.time()), "model": model, "system_fingerprint": fingerprint}


def event(body: dict[str, Any] | str) -> str:
    """A server-sent event."""
    return f"data: {body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)}\n\n"


def _chunk(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, *, reason: FinishReason | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
