from __future__ import annotations

import math
from typing import Any

import pytest

from chatloom.config import Cost, Gate, LicenseGate, RegisterParams
from chatloom.errors import InputError
from chatloom.registry import gates as module
from chatloom.registry.gates import Verdict, holds, reason

NESTED = {"reward": {"accuracy": 0.5}, "ppo": {"kl": 12, "steps": {"n": 8}}, "note": "text", "flag": True}


COST = Cost(currency="USD", cpu_hour=0, gpu_hour=0, cpu_watts=0, gpu_watts=0)


def params(gates: list[Gate], allowed: list[str], *, blocks: bool = True) -> RegisterParams:
    licenses = LicenseGate(allowed=allowed, blocks=blocks)
    return RegisterParams(model_name="x", cost=COST, promotion="gates", gates=gates, licenses=licenses)


def evaluate_gates(gates: list[Gate], metrics: Any, *, has_champion: bool = True) -> tuple[Verdict, ...]:
    """The verdicts on metrics, of a model whose data may be used."""
    source = {"name": "own", "license": "MIT", "splits": {"sft": 1}}
    *verdicts, licenses = module.evaluate_gates(params(gates, ["MIT"]), metrics, [source], has_champion=has_champion)
    assert licenses.verdict == "pass"
    return tuple(verdicts)


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


SOURCES = [
    {"name": "own", "license": "CC-BY-4.0", "splits": {"sft": 10, "eval": 2}},
    {"name": "web", "license": "CC-BY-NC-4.0", "splits": {"ptx": 1}},
    {"name": "benchmark", "license": "unknown", "splits": {"eval": 50}},
    {"name": "unused", "license": "proprietary", "splits": {}},
]


@pytest.mark.parametrize(
    ("allowed", "sources", "blocks", "verdict", "value", "note"),
    [
        (["CC-BY-4.0", "CC-BY-NC-4.0"], SOURCES, True, "pass", 0.0, ""),
        (["CC-BY-4.0"], SOURCES, True, "fail", 1.0, "web: CC-BY-NC-4.0"),
        (["MIT"], SOURCES, False, "warn", 2.0, "own: CC-BY-4.0; web: CC-BY-NC-4.0"),
        # Rows that only measure the model are not behind it; rows that nobody recorded may be anything.
        (["MIT"], [], True, "fail", 1.0, "no source's rows are recorded"),
    ],
)
def test_licences_of_the_data_that_was_learned_from(
    allowed: list[str], sources: list[Any], blocks: bool, verdict: str, value: float, note: str
) -> None:
    (found,) = module.evaluate_gates(params([], allowed, blocks=blocks), {}, sources, has_champion=False)
    assert (found.verdict, found.value, found.note) == (verdict, value, note)
    assert found.bound == f"only {', '.join(allowed)}"


def test_why_a_version_is_rejected() -> None:
    gates = [gate("ppo/kl", high=1.0), gate("ppo/kl", high=2.0, blocks=False)]
    verdicts = module.evaluate_gates(params(gates, ["MIT"]), NESTED, SOURCES[1:2], has_champion=False)
    assert reason(verdicts) == ("ppo/kl = 12, bound <= 1; data/other_licenses = 1, bound only MIT (web: CC-BY-NC-4.0)")


def test_gates_on_the_champion_hold_while_there_is_none() -> None:
    gates = [gate("champion/win_rate_high", low=0.5)]
    (found,) = evaluate_gates(gates, {}, has_champion=False)
    assert found == Verdict("champion/win_rate_high", None, ">= 0.5", "pass", True, "no champion to compare with")
    (found,) = evaluate_gates(gates, {"champion": {"win_rate_high": 0.4}})
    assert found.verdict == "fail"
    with pytest.raises(InputError, match=r"register\.gates\[0\]\.metric = 'champion/win': no such metric"):
        evaluate_gates([gate("champion/win", low=0.5)], {}, has_champion=False)
