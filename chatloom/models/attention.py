"""Attention that honours packing: one causal block a sequence, at the cost of the sequences alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "chatloom"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    lengths: tuple[int, ...] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over sequences laid end to end; the plain kind, under `attention_mask`, where there are no `lengths`.

    Args:
        query: (1, heads, T, D); `key` and `value` (1, key heads, T, D).
        lengths: tokens of each sequence, summing to T.

    Returns:
        (1, T, heads, D)
    """
    if lengths is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return output, None
    blocks = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    outputs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True) for q, k, v in blocks
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
