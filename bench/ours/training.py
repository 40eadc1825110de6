"""A benchmark's job as the project's own objects, and a clock on the steps of its loops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.side import Clock, Job, Training
from chatloom.config import Optimizer
from chatloom.device import Device, resolve_device


def device_of(job: Job) -> Device:
    return resolve_device("cpu", job.dtype, job.threads)


def training_values(job: Training, defaults: dict[str, Any]) -> dict[str, Any]:
    """A training section of params with the job's values: one epoch, a constant rate, nothing held out."""
    return {
        **defaults,
        "method": job.method,
        "lora": job.lora,
        "optimizer": optimizer(job.lr),
        "batch_size": job.batch_size,
        "accumulation_steps": 1,
        "num_epochs": 1,
        "max_steps": None,
        "activation_checkpointing": False,
        "seed": job.seed,
    }


def optimizer(lr: float) -> Optimizer:
    return Optimizer(lr=lr, weight_decay=0.0, adam_eps=1e-8, warmup_steps=0, schedule="constant", max_grad_norm=1.0)


class StepLog:
    """A loop's log: the end of each step on a `Clock`, and the metrics `names` of it.

    What is logged without them, such as a look at held-out rows, is of no step.
    """

    def __init__(self, *names: str) -> None:
        self.clock = Clock()
        self.values: dict[str, list[float]] = {name: [] for name in names}

    def __call__(self, _step: int, metrics: Mapping[str, float]) -> None:
        if self.values.keys() <= metrics.keys():
            self.clock.step_ends()
            for name, values in self.values.items():
                values.append(metrics[name])
