"""Attention that honours packing: one causal block a sequence, at the cost of the sequences alone."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "chatloom"

FLOAT32_BACKWARD_UP_TO = 320
"""Tokens of a sequence; with more, the conversion costs more than it saves (measured with AVX512-BF16)."""


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
    return torch.cat([_causal(q, k, v, scaling) for q, k, v in blocks], dim=2).transpose(1, 2), None


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Causal attention of one sequence."""
    short = query.shape[2] <= FLOAT32_BACKWARD_UP_TO
    if query.requires_grad and short and query.dtype == torch.bfloat16 and query.device.type == "cpu":
        output: Tensor = _Float32Backward.apply(query, key, value, scale)
        return output
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)


class _Float32Backward(torch.autograd.Function):
    """PyTorch's flash attention on a CPU, whose gradient is taken in float32.

    Its bfloat16 kernel sets up a product of its own for each head and block, milliseconds a call whatever the length.
    The forward pass stays what it is without gradients, so that a model scores alike in training and out of it.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        output, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, True, scale=scale
        )
        ctx.scale = scale
        ctx.save_for_backward(query, key, value, output, logsumexp)
        return cast(Tensor, output)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        *states, logsumexp = ctx.saved_tensors
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            upstream[0].float(), *(state.float() for state in states), logsumexp, 0.0, True, scale=ctx.scale
        )
        query_grad, key_grad, value_grad = (gradient.to(states[0].dtype) for gradient in gradients)
        return query_grad, key_grad, value_grad, None


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
