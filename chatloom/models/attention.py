"""Attention that honours packing: one causal block a sequence, at the cost of the sequences alone."""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import CDLL
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from chatloom.kernels import attention_backward, attention_library

NAME = "chatloom"

KERNEL_UP_TO = 768
"""Tokens of a sequence: up to here the kernel's gradients take less time than PyTorch's (measured with AVX512)."""


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
    if query.requires_grad and max(lengths) <= KERNEL_UP_TO:
        library = attention_library(query, query.shape[-1], query.shape[1] // key.shape[1])
        if library is not None:
            scale = scaling if scaling is not None else query.shape[-1] ** -0.5
            output = _KernelBackward.apply(query, key, value, lengths, scale, library)
            return output, None
    blocks = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        for q, k, v in _split(lengths, query, key, value)
    ]
    return torch.cat(blocks, dim=2).transpose(1, 2), None


class _KernelBackward(torch.autograd.Function):
    """PyTorch's flash attention on a CPU, with our own gradient.

    PyTorch's sets up a matrix product for each head and block: milliseconds a call, whatever the length. The forward
    pass stays what it is without gradients, so that a model scores alike in training and out of it.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float, library: CDLL
    ) -> Tensor:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        blocks = [flash(*block, 0.0, True, scale=scale) for block in _split(lengths, query, key, value)]
        output = torch.cat([block[0].transpose(1, 2) for block in blocks], dim=1)  # (1, T, heads, D)
        logsumexp = torch.cat([block[1][0] for block in blocks], dim=-1)  # (heads, T)
        ctx.lengths, ctx.scale, ctx.library = lengths, scale, library
        ctx.save_for_backward(query, key, value, output, logsumexp)
        return output

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, logsumexp = ctx.saved_tensors
        states = tuple(state[0].transpose(0, 1).contiguous() for state in (query, key, value))
        gradients = attention_backward(
            ctx.library, states, output[0], upstream[0][0].contiguous(), logsumexp, ctx.lengths, ctx.scale
        )
        return *(gradient.transpose(0, 1)[None] for gradient in gradients), None, None, None


def _split(lengths: tuple[int, ...], *states: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """(1, heads, length, D) of each sequence."""
    return zip(*(state.split(lengths, dim=2) for state in states), strict=True)


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
