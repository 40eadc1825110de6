"""How much arithmetic a training step needs, and how much this machine can do."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from chatloom.data.examples import Example


def training_flops(
    linear_weights: int, head_weights: int, attention_width: int, layers: int, examples: Sequence[Example]
) -> float:
    """Floating-point operations of forward and backward passes over `examples`, every weight training.

    A multiply-add counts two; the backward pass is two forward passes. Attention counts its causal half, the output
    embedding the predicted tokens alone, and nothing that is recomputed or padded counts: this is the useful work.

    Args:
        linear_weights: of the trunk's linear layers.
        attention_width: heads times the size of one.
    """
    tokens = sum(len(example.input_ids) for example in examples)
    squares = sum(len(example.input_ids) ** 2 for example in examples)
    predicted = sum(example.num_predicted for example in examples)
    forward = 2 * linear_weights * tokens + 2 * head_weights * predicted + 2 * layers * attention_width * squares
    return 3.0 * forward


def model_flops(model: Any, examples: Sequence[Example]) -> float:
    """`training_flops` of a LLaMA."""
    linear = sum(module.weight.numel() for module in model.model.modules() if isinstance(module, nn.Linear))
    config = model.config
    width = config.num_attention_heads * config.head_dim
    return training_flops(linear, model.lm_head.weight.numel(), width, config.num_hidden_layers, examples)


def matmul_flops_per_s(dtype: torch.dtype, size: int = 2048, repeats: int = 20) -> float:
    """Median rate of a square matrix product."""
    left, right = torch.randn(2, size, size).to(dtype)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - started)
    return 2.0 * size**3 / statistics.median(seconds)
