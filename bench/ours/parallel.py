"""SFT with the project's own loop, by one strategy in its processes; each of them writes what it saw."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bench.machine import resident
from bench.ours.training import StepLog, optimizer
from bench.presets import preset_params
from chatloom import batches, packing
from chatloom.config import Parallel, Strategy, TrainSftParams
from chatloom.data.examples import Example, Examples
from chatloom.data.prepared import read_split
from chatloom.device import resolve_device
from chatloom.models.adapters import trainable
from chatloom.parallel.launch import is_worker, run_worker, start_workers
from chatloom.parallel.ranks import connect
from chatloom.sft import train_sft

JOB = "CHATLOOM_BENCH_JOB"


@dataclass(frozen=True, kw_only=True)
class Job:
    checkpoint: str
    split: str
    """Folder of prepared rows, which are mapped and read as the stage reads them."""
    strategy: Strategy
    processes: int
    rows_per_step: int
    """Of all processes together."""
    steps: int
    started: float
    """When the command was given (`time.time`)."""
    out: str
    """Folder in which each process leaves `<rank>.json`."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """By one process; `seconds` and what is of them begin with the end of the first step."""

    to_start: float
    """Seconds from the command to the moment when all processes were connected and had the model."""
    to_first_step: float
    """Seconds from the command to the end of the first step."""
    seconds: float
    waited: float
    """Of them, for rows: drawing, reading and packing them."""
    peak_bytes: int
    imported_bytes: int
    """Resident when all was imported and nothing loaded."""
    most_tokens: int
    """Of one microbatch."""
    threads: int
    loss: float
    """Of the last step."""


class Waiting:
    """Seconds that the loop spent in what gives it rows."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def call(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started

        return timed

    def iterate(self, function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def timed(*args: Any, **kwargs: Any) -> Iterator[Any]:
            following = self.call(function(*args, **kwargs).__next__)
            while True:
                try:
                    yield following()
                except StopIteration:
                    return

        return timed


def train(job: Job) -> None:
    """Train as the stage does, and write what was seen."""
    params = params_of(job)
    device = resolve_device("cpu", "bfloat16", 0)
    log, waiting = StepLog("train/loss"), Waiting()
    first_step_over, most_tokens = 0.0, 0

    def step_ends(step: int, metrics: Mapping[str, float]) -> None:
        nonlocal first_step_over
        log(step, metrics)
        if step == 1:
            first_step_over, waiting.seconds = time.time(), 0.0

    def packed(rows: Sequence[Example], where: torch.device) -> packing.Packed:
        nonlocal most_tokens
        found = packing.pack(rows, where)
        most_tokens = max(most_tokens, sum(found.lengths))
        return found

    with connect("train_sft", params.parallel, device.device) as ranks:
        if job.strategy.startswith("colossalai"):
            importlib.import_module("chatloom.parallel.zero")  # else its modules would count as what training needs
        imported = resident("VmRSS")
        policy = trainable(Path(job.checkpoint), "sft", params, device)
        connected = time.time()
        examples = Examples(read_split(Path(job.split)))
        with (
            patch("chatloom.sft.steps", waiting.iterate(batches.steps)),
            patch("chatloom.sft.pack", waiting.call(packed)),
        ):
            train_sft(policy, examples, {}, params, device.device, step_ends, None, ranks)
    seen = Seen(
        to_start=connected - job.started,
        to_first_step=first_step_over - job.started,
        seconds=log.clock.seconds,
        waited=waiting.seconds,
        peak_bytes=resident("VmHWM"),
        imported_bytes=imported,
        most_tokens=most_tokens,
        threads=torch.get_num_threads(),
        loss=log.values["train/loss"][-1],
    )
    Path(job.out, f"{ranks.rank}.json").write_text(json.dumps(asdict(seen)), encoding="utf-8")


def params_of(job: Job) -> TrainSftParams:
    changes = {
        "method": "full",
        "optimizer": optimizer(2e-5),
        "parallel": Parallel(strategy=job.strategy, num_processes=job.processes, tensor_size=1, hostfile=None),
        "batch_size": job.rows_per_step // job.processes,
        "accumulation_steps": 1,
        "num_epochs": 1,
        "max_steps": job.steps,
    }
    return TrainSftParams.model_validate(preset_params("default").train_sft.model_dump() | changes)


def main() -> None:
    if is_worker():
        run_worker(lambda: train(Job(**json.loads(os.environ[JOB]))))
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    job = Job(**json.loads(text))
    if job.processes == 1:
        train(job)
        return
    os.environ[JOB] = text
    sys.exit(start_workers("bench.ours.parallel", params_of(job).parallel))


if __name__ == "__main__":
    main()
