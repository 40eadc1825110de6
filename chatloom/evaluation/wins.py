"""Who wins over whom on the same prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RIDGE = np.diag([1e-3, 0.1])
"""Penalty on level and slope: it keeps the regression finite where one side always wins, or the longer answer does."""
NEWTON_STEPS = 50


def wins(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Of each prompt 1 where ours scores higher, 0 where it scores lower, 0.5 for a tie."""
    return [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(ours, theirs, strict=True)]


def length_controlled(won: Sequence[float], ours: Sequence[int], theirs: Sequence[int]) -> float:
    """Win rate as it would be were both answers equally long (after Dubois 2024, without its model of the prompts).

    A logistic regression of `won` on the difference in length, in standard deviations and squashed by tanh; its value
    where that difference is 0.

    Args:
        won: see `wins`.
        ours, theirs: lengths of the answers, in tokens.
    """
    difference = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    spread = difference.std()
    x = np.tanh(difference / spread) if spread > 0 else np.zeros_like(difference)
    design = np.stack([np.ones_like(x), x], axis=1)
    weights = np.zeros(2)
    for _ in range(NEWTON_STEPS):
        p = 1 / (1 + np.exp(-design @ weights))
        gradient = design.T @ (p - won) + RIDGE @ weights
        hessian = (design * (p * (1 - p))[:, None]).T @ design + RIDGE
        step = np.linalg.solve(hessian, gradient)
        weights -= step
        if float(np.abs(step).max()) < 1e-10:
            break
    return float(1 / (1 + np.exp(-weights[0])))
