"""How well a model predicts held-out answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from chatloom.batches import chunks
from chatloom.data.examples import Example
from chatloom.models.adapters import Role
from chatloom.packing import ROWS_AT_ONCE, pack
from chatloom.parallel.ranks import ALONE, Ranks


@torch.no_grad()
def mean_loss(role: Role, examples: Sequence[Example], device: torch.device, ranks: Ranks = ALONE) -> float:
    """Cross-entropy in nats per predicted token, over all tokens of all examples, which `ranks` share."""
    batches = chunks(sorted(examples, key=lambda e: len(e.input_ids)), ROWS_AT_ONCE)
    sizes = [sum(len(example.input_ids) for example in rows) for rows in batches]
    sums = ranks.spread(batches, sizes, lambda own: [float(role.logprobs(pack(rows, device)).sum()) for rows in own])
    return -sum(sums) / sum(example.num_predicted for example in examples)


def losses_by_group(
    role: Role, groups: Mapping[str, Sequence[Example]], device: torch.device, ranks: Ranks = ALONE
) -> dict[str, float]:
    """`mean_loss` of each group (a language) that has examples."""
    return {name: mean_loss(role, examples, device, ranks) for name, examples in sorted(groups.items()) if examples}


def perplexity(loss: float) -> float:
    return math.exp(loss)
