"""Confidence intervals of what is counted or averaged over few rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Interval:
    mean: float
    low: float
    high: float


def wilson(successes: float, trials: int) -> Interval:
    """95 % interval of a share (Wilson 1927); honest near 0 and 1 and for few trials."""
    share = successes / trials
    z2 = Z95**2 / trials
    center = (share + z2 / 2) / (1 + z2)
    half = Z95 / (1 + z2) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials))
    return Interval(share, center - half, center + half)


def bootstrap_mean(values: Sequence[float], samples: int, seed: int) -> Interval:
    """95 % percentile interval of a mean (Efron 1979), rows drawn with replacement."""
    array = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(array), size=(samples, len(array)))
    low, high = np.percentile(array[drawn].mean(axis=1), [2.5, 97.5])
    return Interval(float(array.mean()), float(low), float(high))
