from __future__ import annotations

import math
from typing import Any

import pytest

from chatloom.config import Gate
from chatloom.errors import InputError
from chatloom.registry.gates import Verdict, evaluate_gates, holds

NESTED = {"reward": {"accuracy": 0.5}, "ppo": {"kl": 12, "steps": {"n": 8}}, "note": "text", "flag": True}


def gate(metric: str, low: float | None = None, high: float | None = None, *, blocks: bool = True) -> Gate:
    return Gate(metric=metric, min=low, max=high, blocks=blocks)


@pytest.mark.parametrize(
    ("low", "high", "verdict", "bound"),
    [
        (0.5, None, "pass", ">= 0.5"),  # bounds are inclusive
        (None, 0.5, "pass", "<= 0.5"),
        (0.500001, None, "fail", ">= 0.500001"),
        (None, 0.4, "fail", "<= 0.4"),
        (0.1, 0.9, "pass", "0.1 .. 0.9"),
        (0.6, 0.9, "fail", "0.6 .. 0.9"),
        (0.1, 0.2, "fail", "0.1 .. 0.2"),
    ],
)
def test_bounds(low: float | None, high: float | None, verdict: str, bound: str) -> None:
    (found,) = evaluate_gates([gate("reward/accuracy", low, high)], NESTED)
    assert (found.verdict, found.bound, found.value) == (verdict, bound, 0.5)
    assert holds([found]) == (verdict == "pass")


def test_nested_and_flat_metrics_are_the_same() -> None:
    gates = [gate("ppo/kl", high=40.0), gate("ppo/steps/n", low=1)]
    flat = {"ppo/kl": 12, "ppo/steps/n": 8}
    mixed = {"ppo": {"kl": 12, "steps/n": 8}}
    assert evaluate_gates(gates, NESTED) == evaluate_gates(gates, flat) == evaluate_gates(gates, mixed)


def test_a_gate_that_does_not_block_warns() -> None:
    verdicts = evaluate_gates([gate("ppo/kl", high=1.0, blocks=False), gate("ppo/kl", high=20.0)], NESTED)
    assert verdicts[0] == Verdict("ppo/kl", 12.0, "<= 1", "warn", False)
    assert verdicts[1].verdict == "pass"
    assert holds(verdicts)


def test_no_gates_hold() -> None:
    assert holds(evaluate_gates([], NESTED))


def test_nan_breaks_every_bound() -> None:
    for low, high in ((0.0, None), (None, 1.0), (-1e9, 1e9)):
        (verdict,) = evaluate_gates([gate("x", low, high)], {"x": math.nan})
        assert verdict.verdict == "fail"


def test_unknown_metric() -> None:
    with pytest.raises(InputError) as caught:
        evaluate_gates([gate("ppo/kl", high=1.0), gate("reward/acuracy", low=0.5)], NESTED)
    message = str(caught.value)
    assert message == (
        "register.gates[1].metric = 'reward/acuracy': no such metric was measured; "
        "known: ppo/kl, ppo/steps/n, reward/accuracy"
    )


@pytest.mark.parametrize("value", [None, "0.7", True, [1]])
def test_a_metric_that_is_no_number(value: Any) -> None:
    with pytest.raises(InputError, match=r"register\.gates\[0\]\.metric = 'x': its value .* is not a number"):
        evaluate_gates([gate("x", low=0.5)], {"x": value})
