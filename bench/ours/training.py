"""A benchmark's job as the project's own objects."""

from __future__ import annotations

from typing import Any

from bench.side import Job, Training
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
