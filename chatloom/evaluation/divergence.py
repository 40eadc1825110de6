"""How far a policy went from its reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from chatloom.batches import chunks
from chatloom.data.examples import Example
from chatloom.data.prepared import PreparedRow
from chatloom.models.adapters import Role
from chatloom.packing import ROWS_AT_ONCE, pack


@torch.no_grad()
def kl_per_sequence(
    policy: Role, ref_policy: Role, rows: Sequence[PreparedRow], response_ids: Sequence[list[int]], temperature: float
) -> list[float]:
    """Of each response sampled from `policy`, sum over tokens of log pi - log pi_ref (k1, nats)."""
    device = policy.model.lm_head.weight.device
    examples = [Example.of_response(row.prompt_ids, ids) for row, ids in zip(rows, response_ids, strict=True)]
    sums: list[float] = []
    for some in chunks(examples, ROWS_AT_ONCE):
        packed = pack(some, device)
        difference = policy.logprobs(packed, temperature) - ref_policy.logprobs(packed, temperature)
        sums += [float(part.sum()) for part in difference.split(packed.num_predicted)]
    return sums
