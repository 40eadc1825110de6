"""Rows left out: never silently, always by reason, with a few examples to look at."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

EXAMPLES = 3


class RowFault(Exception):
    """Why one row cannot be used: a short `reason` to count by, and the `detail` of this row."""

    def __init__(self, reason: str, detail: str) -> None:
        # Both go to Exception, so that a fault survives the way back from another process.
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return self.detail


class Drops:
    """Counts of rows left out (or mended, or noticed), by reason, with the first few of each as examples."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._examples: dict[str, list[str]] = {}

    @classmethod
    def merged(cls, parts: Iterable[Drops]) -> Drops:
        drops = cls()
        for part in parts:
            drops.merge(part)
        return drops

    def add(self, reason: str, example: str) -> None:
        self.add_count(reason, 1)
        if len(self._examples[reason]) < EXAMPLES:
            self._examples[reason].append(example)

    def add_count(self, reason: str, count: int) -> None:
        """Rows of which no single one is worth looking at."""
        if count:
            self._counts[reason] = self._counts.get(reason, 0) + count
            self._examples.setdefault(reason, [])

    def merge(self, other: Drops) -> None:
        for reason, count in other._counts.items():
            self.add_count(reason, count)
            self._examples[reason] += other._examples[reason][: EXAMPLES - len(self._examples[reason])]

    @property
    def total(self) -> int:
        return sum(self._counts.values())

    def first(self) -> str:
        """The example that was added first."""
        return next(iter(self._examples.values()))[0]

    def counts(self) -> dict[str, int]:
        return {reason: self._counts[reason] for reason in sorted(self._counts)}

    def report(self) -> dict[str, Any]:
        """`{reason: {"rows": count, "examples": [...]}}`, for a JSON report."""
        return {reason: {"rows": count, "examples": self._examples[reason]} for reason, count in self.counts().items()}
