"""What a run took, stage by stage: hours as they were measured, energy and price as rates make of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from chatloom.config import Cost


@dataclass(frozen=True)
class StageCost:
    stage: str
    wall_s: float
    cpu_hours: float
    """Of all cores, busy ones only."""
    gpu_hours: float
    peak_gib: float
    """Resident memory of its largest process."""
    tokens: float
    """Trained on, sampled or calibrated with; 0 where the stage counts none."""
    kwh: float
    price: float


def stage_costs(runs: Mapping[str, Mapping[str, Any]], rates: Cost) -> list[StageCost]:
    """Of each stage whose run is known, in their order; a stage taken from DVC's cache costs what its run did then.

    Args:
        runs: as in the lineage, each with its `cost`.
    """
    costs = []
    for stage, run in runs.items():
        measured: Mapping[str, float] = run["cost"]
        cpu, gpu = measured.get("cpu_hours", 0.0), measured.get("gpu_hours", 0.0)
        costs.append(
            StageCost(
                stage=stage,
                wall_s=measured.get("wall_s", 0.0),
                cpu_hours=cpu,
                gpu_hours=gpu,
                peak_gib=measured.get("peak_gib", 0.0),
                tokens=measured.get("tokens", 0.0),
                kwh=(cpu * rates.cpu_watts + gpu * rates.gpu_watts) / 1000,
                price=cpu * rates.cpu_hour + gpu * rates.gpu_hour,
            )
        )
    return costs


def total_cost(costs: list[StageCost]) -> StageCost:
    """The sum; of memory the largest."""
    return StageCost(
        stage="all",
        wall_s=sum(cost.wall_s for cost in costs),
        cpu_hours=sum(cost.cpu_hours for cost in costs),
        gpu_hours=sum(cost.gpu_hours for cost in costs),
        peak_gib=max((cost.peak_gib for cost in costs), default=0.0),
        tokens=sum(cost.tokens for cost in costs),
        kwh=sum(cost.kwh for cost in costs),
        price=sum(cost.price for cost in costs),
    )
