"""One optimizer step where ColossalAI keeps most gradients in slices, one a rank, and heads are whole on every rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from chatloom.optim import clip, require_finite, sum_of_squares
from chatloom.parallel.ranks import Ranks


def step_slices(
    optimizers: Iterable[Any],
    slices: Sequence[Tensor],
    heads: Iterable[nn.Parameter],
    ranks: Ranks,
    max_grad_norm: float,
    lr_factor: float,
    stage: str,
    step: int,
) -> float:
    """Sum the heads' gradients over the ranks, clip the norm of slices and heads together, and step `optimizers`.

    Args:
        slices: gradients of this rank's slices, summed over the ranks already, times their number.

    Returns:
        The norm before clipping, the same on every rank.

    Raises:
        InputError: where a gradient is not finite; no weight has changed then.
    """
    whole = [head.grad for head in heads if head.grad is not None]
    ranks.sum_tensors(whole)
    for gradient in whole:  # like the slices' they are of a loss times the number of ranks
        gradient /= ranks.size
    squares = torch.tensor(ranks.sum(sum_of_squares(slices)) + sum_of_squares(whole))
    norm = require_finite(squares.sqrt(), stage, step, what="gradient norm")
    clip([*slices, *whole], norm, max_grad_norm)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor
        optimizer.step()
        optimizer.zero_grad()
    return norm
