"""Gates: the bounds that evaluation metrics must hold before a model may become champion. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from chatloom.config import Gate
from chatloom.errors import InputError


@dataclass(frozen=True)
class Verdict:
    metric: str
    value: float
    bound: str
    """For people: `>= 0.5`, `<= 40`, `0.5 .. 40`."""
    verdict: Literal["pass", "warn", "fail"]
    """`warn` is a bound broken by a gate that does not block."""
    blocks: bool


def evaluate_gates(gates: Sequence[Gate], metrics: Mapping[str, Any]) -> tuple[Verdict, ...]:
    """One verdict a gate, in the gates' order.

    Args:
        metrics: of `metrics/evaluate.json`, nested or flat: `{"ppo": {"kl": 3}}` and `{"ppo/kl": 3}` are the same.

    Raises:
        InputError: for a gate on a metric that was not measured or is no number.
    """
    flat = flatten(metrics)
    return tuple(_judge(index, gate, flat) for index, gate in enumerate(gates))


def holds(verdicts: Sequence[Verdict]) -> bool:
    """Whether every blocking gate holds."""
    return all(verdict.verdict != "fail" for verdict in verdicts)


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with names such as `ppo/kl`."""
    flat: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}/")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _judge(index: int, gate: Gate, metrics: Mapping[str, Any]) -> Verdict:
    key = f"register.gates[{index}].metric = {gate.metric!r}"
    if gate.metric not in metrics:
        known = ", ".join(sorted(name for name, value in metrics.items() if is_number(value))) or "none"
        raise InputError(f"{key}: no such metric was measured; known: {known}")
    value = metrics[gate.metric]
    if not is_number(value):
        raise InputError(f"{key}: its value {value!r} is not a number, so no bound can be checked; gate another metric")
    # Written so that NaN breaks every bound.
    inside = (gate.min is None or value >= gate.min) and (gate.max is None or value <= gate.max)
    verdict: Literal["pass", "warn", "fail"] = "pass" if inside else "fail" if gate.blocks else "warn"
    return Verdict(gate.metric, float(value), _bound(gate), verdict, gate.blocks)


def _bound(gate: Gate) -> str:
    if gate.min is not None and gate.max is not None:
        return f"{gate.min:g} .. {gate.max:g}"
    return f">= {gate.min:g}" if gate.min is not None else f"<= {gate.max:g}"
