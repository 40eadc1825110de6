"""Which rows make up which optimizer step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch

from chatloom.config import Training

T = TypeVar("T")


def num_steps(num_rows: int, params: Training) -> int:
    """Optimizer steps of a training: the last step of an epoch may be smaller."""
    per_step = params.batch_size * params.accumulation_steps
    steps = params.num_epochs * -(-num_rows // per_step)
    return min(steps, params.max_steps) if params.max_steps is not None else steps


def steps(rows: Sequence[T], params: Training) -> Iterator[list[list[T]]]:
    """The microbatches of each optimizer step; every row once an epoch, in an order drawn from the seed."""
    generator = torch.Generator().manual_seed(params.seed)
    per_step = params.batch_size * params.accumulation_steps
    left = num_steps(len(rows), params)
    while left:
        order = torch.randperm(len(rows), generator=generator).tolist()
        for start in range(0, len(order), per_step):
            if left == 0:
                return
            left -= 1
            step = [rows[i] for i in order[start : start + per_step]]
            yield chunks(step, params.batch_size)


def chunks(rows: Sequence[T], size: int) -> list[list[T]]:
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]
