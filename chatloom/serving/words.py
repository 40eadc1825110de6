"""A word list that answers end before, found also where a word comes in pieces."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from chatloom.errors import InputError
from chatloom.serving.text import FinishReason

LETTER = re.compile("[a-z0-9]")
"""What a word may not have as its neighbour where it begins or ends with one: 'ass' is not in 'class'. Chinese is
written without borders."""


class WordList:
    """Words and phrases, whatever their case; those of ASCII letters only as whole words."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = tuple(dict.fromkeys(map(_fold, words)))
        self._pattern = re.compile("|".join(map(_bounded, sorted(self._words, key=len, reverse=True))))

    def find(self, text: str) -> int | None:
        """Where the first of them begins in `text`."""
        match = self._pattern.search(_fold(text))
        return match.start() if match else None

    def unsettled(self, text: str) -> int:
        """Length of the longest end of `text` that is the beginning of a word, or one whose border is still to come."""
        folded = _fold(text)
        longest = max(map(len, self._words))
        for length in range(min(longest, len(folded)), 0, -1):
            if any(word.startswith(folded[-length:]) for word in self._words):
                return length
        return 0


def read_words(path: Path) -> WordList:
    """One word or phrase a line; empty lines and those that begin with # say nothing.

    Raises:
        InputError: where the file cannot be read or has none.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--words {path}: cannot be read as UTF-8 text: {error}") from error
    words = [line for line in lines if line and not line.startswith("#")]
    if not words:
        raise InputError(f"--words {path}: has no words; leave the option out, or write one a line")
    return WordList(words)


class WordScanner:
    """Cuts a text, given piece by piece, before the first word of a list."""

    reason: FinishReason = "content_filter"

    def __init__(self, words: WordList) -> None:
        self._words = words
        self._before = ""
        """The last character shown: whether a word begins behind it depends on it."""
        self._held = ""
        self.found = False

    def push(self, delta: str) -> str:
        self._held += delta
        return self._show(len(self._held) - self._words.unsettled(self._held))

    def flush(self) -> str:
        return self._show(len(self._held))

    def _show(self, settled: int) -> str:
        """The first `settled` characters of what is held, or those before a word that begins among them.

        Such a word ends before the end of what is held, so that its border is known: else its beginning would not be
        settled.
        """
        at = self._words.find(self._before + self._held)
        start = settled if at is None else at - len(self._before)
        if start < settled:
            self.found, settled = True, start
        shown, self._held = self._held[:settled], self._held[settled:]
        self._before = (self._before + shown)[-1:]
        return shown


def _fold(text: str) -> str:
    """Lower case, with as many characters as before."""
    return "".join(lower if len(lower := char.lower()) == 1 else char for char in text)


def _bounded(word: str) -> str:
    before = f"(?<!{LETTER.pattern})" if LETTER.match(word[0]) else ""
    behind = f"(?!{LETTER.pattern})" if LETTER.match(word[-1]) else ""
    return f"{before}{re.escape(word)}{behind}"
