"""What a stage's run in MLflow says of the bytes it read and made, and of what it cost."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from chatloom.config import Params
from chatloom.errors import InputError
from chatloom.registry.hashes import dvc_md5

TOKENS = ("tokens", "calibration_tokens")
"""Metrics of a stage that count the tokens it computed on."""


def hash_inputs(stage: str, params: Params, pipeline: Path = Path("dvc.yaml")) -> str | None:
    """One hash of the deps and params that `dvc.yaml` lists for `stage`; None where it lists no such stage.

    Runs of equal inputs should make equal bytes: `chatloom verify` names those that did not.
    """
    listed = listed_stage(stage, pipeline)
    if listed is None:
        return None
    values = params.model_dump(mode="json", by_alias=True)
    found: dict[str, Any] = {dep: dvc_md5(Path(dep)) for dep in listed["deps"]}
    found |= {f"params {key}": value_at(values, key) for key in listed["params"]}
    return hashlib.sha256(json.dumps(found, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def hash_outs(stage: str, pipeline: Path = Path("dvc.yaml")) -> dict[str, str]:
    """The hash of each out and metrics file of `stage` that is there, as DVC will record it."""
    listed = listed_stage(stage, pipeline) or {}
    hashes = {out: dvc_md5(Path(out)) for kind in ("outs", "metrics") for out in listed.get(kind, [])}
    return {out: md5 for out, md5 in hashes.items() if md5 is not None}


def require_writable(stage: str, pipeline: Path = Path("dvc.yaml")) -> None:
    """Before hours of work: what the stage makes can be put where `dvc.yaml` says.

    Raises:
        InputError: naming the folder that cannot be written.
    """
    listed = listed_stage(stage, pipeline) or {}
    for out in (Path(out) for kind in ("outs", "metrics") for out in listed.get(kind, [])):
        folder = next(parent for parent in out.parents if parent.exists())
        if not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(f"{folder.absolute()}: cannot be written, and {out} goes there; give the right to write")


def measure_cost(metrics: dict[str, float]) -> dict[str, float]:
    """What the stage took until now, as metrics: wall time, processor and accelerator hours, peak memory, tokens.

    Where several processes train, each is taken to cost what this one does; peaks are of one process.

    Args:
        metrics: of the stage; it knows its tokens.
    """
    wall = _seconds_since_start()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cost = {
        "cost/wall_s": wall,
        "cost/cpu_hours": processes * sum(usage.ru_utime + usage.ru_stime for usage in usages) / 3600,
        "cost/peak_gib": max(usage.ru_maxrss for usage in usages) / 2**20,  # Linux counts KiB
    }
    torch = sys.modules.get("torch")  # a stage that did not load it used no accelerator
    if torch is not None and torch.cuda.is_initialized():
        cost |= {
            "cost/gpu_hours": processes * wall / 3600,
            "cost/gpu_peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        }
    tokens = sum(metrics.get(name, 0.0) for name in TOKENS)
    return cost | ({"cost/tokens": tokens} if tokens else {})


def _seconds_since_start() -> float:
    """Since this process was started, by the clock that nobody sets."""
    stat = Path("/proc/self/stat").read_text(encoding="utf-8")
    ticks = int(stat.rpartition(")")[2].split()[19])  # field 22 of proc(5), counted from the boot
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def listed_stage(stage: str, pipeline: Path) -> dict[str, Any] | None:
    """What `dvc.yaml` says of `stage`; None where there is no such file, or no such stage in it."""
    if not pipeline.is_file():
        return None
    found: dict[str, Any] | None = yaml.safe_load(pipeline.read_text(encoding="utf-8"))["stages"].get(stage)
    return found


def value_at(values: dict[str, Any], key: str) -> Any:
    """The value of a dotted key."""
    inside: Any = values
    for part in key.split("."):
        inside = inside[part]
    return inside
