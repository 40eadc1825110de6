"""Which rows make up which optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from chatloom.config import Training
from chatloom.parallel.ranks import ALONE, Ranks, shares

T = TypeVar("T")


def num_steps(num_rows: int, params: Training, ranks: Ranks = ALONE) -> int:
    """Optimizer steps of a training: the last step of an epoch may be smaller."""
    steps = params.num_epochs * -(-num_rows // _rows_per_step(params, ranks))
    return min(steps, params.max_steps) if params.max_steps is not None else steps


def steps(
    rows: Sequence[T], params: Training, ranks: Ranks = ALONE, size: Callable[[T], int] = lambda row: 1
) -> Iterator[list[list[T]]]:
    """The microbatches of each optimizer step; every row once an epoch, in an order drawn from the seed.

    Which rows make up a step depends on their number alone, and not on how many ranks share them. Every rank gets its
    share of them in as many microbatches as the others; where rows run out, the last ones are empty.

    Args:
        size: of a row in tokens, by which ranks get equal work.
    """
    generator = torch.Generator().manual_seed(params.seed)
    per_step = _rows_per_step(params, ranks)
    left = num_steps(len(rows), params, ranks)
    while left:
        order = torch.randperm(len(rows), generator=generator).tolist()
        for start in range(0, len(order), per_step):
            if left == 0:
                return
            left -= 1
            step = [rows[i] for i in order[start : start + per_step]]
            yield microbatches(step, [size(row) for row in step], params.batch_size, ranks)


def microbatches(rows: Sequence[T], sizes: Sequence[int], batch_size: int, ranks: Ranks) -> list[list[T]]:
    """This rank's share of `rows` in as many microbatches as every other rank's, the last ones being empty."""
    parts = shares(sizes, ranks.data_size)
    own = chunks([rows[i] for i in parts[ranks.data_rank]], batch_size)
    most = -(-max(map(len, parts)) // batch_size)
    return own + [[] for _ in range(most - len(own))]


def chunks(rows: Sequence[T], size: int) -> list[list[T]]:
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


def _rows_per_step(params: Training, ranks: Ranks) -> int:
    return params.batch_size * params.accumulation_steps * ranks.data_size
