"""How well a model predicts held-out answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from chatloom.batches import chunks
from chatloom.data.examples import Example
from chatloom.models.adapters import Role
from chatloom.packing import pack

ROWS_AT_ONCE = 4


@torch.no_grad()
def mean_loss(role: Role, examples: Sequence[Example], device: torch.device) -> float:
    """Cross-entropy in nats per predicted token, over all tokens of all examples."""
    total, count = 0.0, 0
    for rows in chunks(sorted(examples, key=lambda e: len(e.input_ids)), ROWS_AT_ONCE):
        logprobs = role.logprobs(pack(rows, device))
        total -= float(logprobs.sum())
        count += len(logprobs)
    return total / count


def losses_by_group(role: Role, groups: Mapping[str, Sequence[Example]], device: torch.device) -> dict[str, float]:
    """`mean_loss` of each group (a language) that has examples."""
    return {name: mean_loss(role, examples, device) for name, examples in sorted(groups.items()) if examples}


def perplexity(loss: float) -> float:
    return math.exp(loss)
