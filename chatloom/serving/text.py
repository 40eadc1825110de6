"""Tokens to text as they come: never half a character, never past a stop string."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Literal, Protocol

REPLACEMENT = "\ufffd"
FinishReason = Literal["stop", "length", "content_filter"]


class Scanner(Protocol):
    """Looks for the end of an answer in its text, given piece by piece."""

    found: bool
    """Whether the answer ends before what is held back."""

    @property
    def reason(self) -> FinishReason: ...

    def push(self, delta: str) -> str:
        """The text that is safe to show."""

    def flush(self) -> str:
        """The text held back, at the end of the answer; it may be found there."""


class AnswerText:
    """The text of one answer from its tokens, and why it ends."""

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stop_ids: Collection[int], scanners: Sequence[Scanner]
    ) -> None:
        """
        Args:
            stop_ids: tokens that end an answer and are not part of it.
            scanners: each gets what the one before it shows.
        """
        self._decoder, self._stop_ids, self._scanners = TextDecoder(decode), frozenset(stop_ids), tuple(scanners)
        self.finish_reason: FinishReason | None = None
        """None until the answer is complete; no token comes after that."""

    def push(self, token: int, *, last: bool) -> str:
        """The text that `token` adds; `last` says that the length limit ends the answer here."""
        assert self.finish_reason is None, "nothing comes after the end"
        if token in self._stop_ids:
            self.finish_reason = "stop"
            return self._scan(self._decoder.flush(), last=True)
        text = self._decoder.push(token)
        if last:
            self.finish_reason = "length"
            text += self._decoder.flush()
        return self._scan(text, last=last)

    def _scan(self, text: str, *, last: bool) -> str:
        for scanner in self._scanners:
            text = scanner.push(text)
            if last and not scanner.found:
                text += scanner.flush()
            if scanner.found:  # what the later ones hold back is still to be shown
                self.finish_reason, last = scanner.reason, True
        return text


class TextDecoder:
    """Text of a growing list of tokens.

    A Chinese character or an emoji is often several byte-level tokens: text that may still change is held back. Bytes
    that can never become a character (a model may sample anything) are left out.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        # Tokens before `_shown` are out as text; those from `_context` on are decoded again with each new one, since
        # some tokenizers write a token differently at the start of a text.
        self._context = self._shown = 0

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete."""
        self._ids.append(token)
        text = self._decode(self._ids[self._context :])
        if text.endswith(REPLACEMENT):
            return ""
        known = self._decode(self._ids[self._context : self._shown])
        self._context, self._shown = self._shown, len(self._ids)
        return text[len(known) :].replace(REPLACEMENT, "")

    def flush(self) -> str:
        """What is left at the end, without the bytes of an unfinished character."""
        known = self._decode(self._ids[self._context : self._shown])
        text = self._decode(self._ids[self._context :])
        self._context = self._shown = len(self._ids)
        return text[len(known) :].replace(REPLACEMENT, "")


class StopScanner:
    """Cuts a text, given piece by piece, before the first of the stop strings."""

    reason: FinishReason = "stop"

    def __init__(self, stop: Sequence[str]) -> None:
        assert all(stop), "an empty stop string would end every answer at once"
        self._stop = tuple(stop)
        self._held = ""
        self.found = False

    def push(self, delta: str) -> str:
        """The text that is safe to show: what could be the beginning of a stop string is held back."""
        assert not self.found, "nothing comes after a stop string"
        self._held += delta
        hits = [at for at in map(self._held.find, self._stop) if at >= 0]
        if hits:
            self.found = True
            return self._take(min(hits), drop_rest=True)
        return self._take(len(self._held) - self._longest_beginning())

    def flush(self) -> str:
        """The text held back, at the end of the answer."""
        return self._take(len(self._held))

    def _take(self, end: int, *, drop_rest: bool = False) -> str:
        shown, self._held = self._held[:end], "" if drop_rest else self._held[end:]
        return shown

    def _longest_beginning(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0
