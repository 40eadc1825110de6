"""Gates: the bounds that a model must hold before it may become champion. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from chatloom.config import Gate, LicenseGate, RegisterParams
from chatloom.errors import InputError

CHAMPION_METRICS = (
    "champion/win_rate",
    "champion/win_rate_low",
    "champion/win_rate_high",
    "champion/perplexity_ratio",
)
"""Metrics that compare with the present champion on the same rows; without a champion their gates hold."""


@dataclass(frozen=True)
class Verdict:
    metric: str
    value: float | None
    """None where there was no champion to compare with."""
    bound: str
    """For people: `>= 0.5`, `<= 40`, `0.5 .. 40`."""
    verdict: Literal["pass", "warn", "fail"]
    """`warn` is a bound broken by a gate that does not block."""
    blocks: bool
    note: str = ""
    """What a number does not say: whose licence is not allowed, that there was no champion."""


def evaluate_gates(
    params: RegisterParams, metrics: Mapping[str, Any], sources: Sequence[Mapping[str, Any]], *, has_champion: bool
) -> tuple[Verdict, ...]:
    """One verdict a gate, in the gates' order, and that on the licences.

    Args:
        metrics: of `metrics/evaluate.json`, nested or flat: `{"ppo": {"kl": 3}}` and `{"ppo/kl": 3}` are the same.
        sources: `{"name", "license", "splits": {split: rows}}` of the data, as in the lineage.

    Raises:
        InputError: for a gate on a metric that was not measured or is no number.
    """
    flat = flatten(metrics)
    verdicts = [
        _judge(f"register.gates[{index}].metric = {gate.metric!r}", gate, flat, has_champion)
        for index, gate in enumerate(params.gates)
    ]
    return (*verdicts, _judge_licenses(params.licenses, sources))


def holds(verdicts: Sequence[Verdict]) -> bool:
    """Whether every blocking gate holds."""
    return all(verdict.verdict != "fail" for verdict in verdicts)


def reason(verdicts: Sequence[Verdict]) -> str:
    """Why a version is rejected: every blocking gate that it broke."""
    return "; ".join(
        f"{verdict.metric} = {verdict.value:.4g}, bound {verdict.bound}{f' ({verdict.note})' if verdict.note else ''}"
        for verdict in verdicts
        if verdict.verdict == "fail"
    )


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


def _judge(key: str, gate: Gate, metrics: Mapping[str, Any], has_champion: bool) -> Verdict:
    if gate.metric in CHAMPION_METRICS and not has_champion:
        return Verdict(gate.metric, None, _bound(gate), "pass", gate.blocks, "no champion to compare with")
    if gate.metric not in metrics:
        known = ", ".join(sorted(name for name, value in metrics.items() if is_number(value))) or "none"
        raise InputError(f"{key}: no such metric was measured; known: {known}")
    value = metrics[gate.metric]
    if not is_number(value):
        raise InputError(f"{key}: its value {value!r} is not a number, so no bound can be checked; gate another metric")
    # Written so that NaN breaks every bound.
    inside = (gate.min is None or value >= gate.min) and (gate.max is None or value <= gate.max)
    return Verdict(gate.metric, float(value), _bound(gate), _verdict(inside, gate.blocks), gate.blocks)


def _judge_licenses(gate: LicenseGate, sources: Sequence[Mapping[str, Any]]) -> Verdict:
    learned = [source for source in sources if set(source["splits"]) - {"eval"}]
    others = [f"{source['name']}: {source['license']}" for source in learned if source["license"] not in gate.allowed]
    # Without a record of the rows nobody knows what the model learned from: that is no pass.
    if not learned:
        others = ["no source's rows are recorded"]
    bound = f"only {', '.join(gate.allowed)}"
    return Verdict(
        "data/other_licenses",
        float(len(others)),
        bound,
        _verdict(not others, gate.blocks),
        gate.blocks,
        "; ".join(others),
    )


def _verdict(inside: bool, blocks: bool) -> Literal["pass", "warn", "fail"]:
    return "pass" if inside else "fail" if blocks else "warn"


def _bound(gate: Gate) -> str:
    if gate.min is not None and gate.max is not None:
        return f"{gate.min:g} .. {gate.max:g}"
    return f">= {gate.min:g}" if gate.min is not None else f"<= {gate.max:g}"
