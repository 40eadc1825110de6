"""How often a reward model is right about pairs, and whether it knows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from chatloom.data.comparisons import Comparison


@dataclass(frozen=True)
class Pair:
    """One pair of responses as a reward model saw it."""

    lang: str
    gap: int
    """Ranks between the two: 1 for neighbours."""
    logit: float
    """Log odds that the model gives the better one: what its training loss is the log-likelihood of."""
    weight: float
    """1 / pairs of its prompt, so that a prompt counts once however many responses it has."""

    @property
    def right(self) -> float:
        return 1.0 if self.logit > 0 else 0.5 if self.logit == 0 else 0.0

    @property
    def confidence(self) -> float:
        """Probability, 0.5 to 1, that the model gives the response it prefers."""
        return 1 / (1 + math.exp(-abs(self.logit)))


@dataclass(frozen=True)
class Bin:
    """Pairs of like confidence."""

    low: float
    high: float
    weight: float
    """Share of all pairs."""
    confidence: float
    accuracy: float


def pairs_of(comparisons: Sequence[Comparison], margins: Sequence[Sequence[float]], gain: float) -> list[Pair]:
    """Every pair of each comparison.

    Args:
        margins: of each comparison, score of the better less that of the worse response, pair by pair.
        gain: that turned the model's own log odds into normalised scores; it is taken out again.
    """
    return [
        Pair(comparison.lang, comparison.ranks[j] - comparison.ranks[i], margin / gain, 1 / len(row))
        for comparison, row in zip(comparisons, margins, strict=True)
        for (i, j), margin in zip(comparison.pairs, row, strict=True)
    ]


def reliability(pairs: Sequence[Pair], num_bins: int) -> list[Bin]:
    """Pairs by confidence in bins of equal width from 0.5 to 1; bins without a pair are left out."""
    width = 0.5 / num_bins
    groups: dict[int, list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[min(int((pair.confidence - 0.5) / width), num_bins - 1)].append(pair)
    total = sum(pair.weight for pair in pairs)
    bins = []
    for number, some in sorted(groups.items()):
        weight = sum(pair.weight for pair in some)
        confidence = sum(pair.weight * pair.confidence for pair in some) / weight
        low = 0.5 + number * width
        bins.append(Bin(low, low + width, weight / total, confidence, accuracy(some)))
    return bins


def calibration_error(bins: Iterable[Bin]) -> float:
    """Expected calibration error: mean distance of accuracy from confidence over the pairs (Naeini 2015)."""
    return sum(part.weight * abs(part.accuracy - part.confidence) for part in bins)


def accuracy(pairs: Sequence[Pair]) -> float:
    """Weighted share of pairs that are ordered rightly; an exact tie counts half."""
    return sum(pair.weight * pair.right for pair in pairs) / sum(pair.weight for pair in pairs)


def accuracies(pairs: Sequence[Pair], key: Callable[[Pair], str]) -> dict[str, float]:
    """`accuracy` of the pairs with each key."""
    groups: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[key(pair)].append(pair)
    return {name: accuracy(groups[name]) for name in sorted(groups)}


def gap_of(pair: Pair) -> str:
    """Near and far pairs apart: `gap_1`, `gap_2`, `gap_3_or_more`."""
    return f"gap_{pair.gap}" if pair.gap < 3 else "gap_3_or_more"
