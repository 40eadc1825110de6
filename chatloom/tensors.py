"""Pure tensor functions. B batch, R response, N predicted tokens, H hidden size, V vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS_CHUNK = 512
"""Tokens whose (tokens, V) float32 logits exist at the same time."""


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the True places of `mask`; both of one shape."""
    return (values * mask).sum() / mask.sum()


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """(values - mean) / sqrt(var + 1e-8) over the mask, zero elsewhere; the population variance."""
    mean = masked_mean(values, mask)
    var = masked_mean((values - mean) ** 2, mask)
    return (values - mean) * torch.rsqrt(var + 1e-8) * mask


def lengths_mask(lengths: Tensor, width: int) -> Tensor:
    """(B, width) bool, True on each row's first `lengths` places."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def gather_logprobs(hidden: Tensor, head: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of `targets`.

    Args:
        hidden: (N, H) hidden states at the predicting positions.
        head: (V, H) output embedding.
        targets: (N)
        temperature: of the distribution that is scored; the one that is sampled from.

    Returns:
        (N) float32. Logits exist for `LOGITS_CHUNK` tokens at a time, in the backward pass too.
    """
    if targets.numel() == 0:
        return hidden.new_zeros(0, dtype=torch.float32)
    parts = zip(hidden.split(LOGITS_CHUNK), targets.split(LOGITS_CHUNK), strict=True)
    if hidden.requires_grad and targets.numel() > LOGITS_CHUNK:
        return torch.cat([checkpoint(_logprobs, h, head, t, temperature, use_reentrant=False) for h, t in parts])
    return torch.cat([_logprobs(h, head, t, temperature) for h, t in parts])


def _logprobs(hidden: Tensor, head: Tensor, targets: Tensor, temperature: float) -> Tensor:
    logits = F.linear(hidden, head).float()
    if temperature != 1.0:
        logits = logits / temperature
    return -F.cross_entropy(logits, targets, reduction="none")


@torch.no_grad()
def entropies(hidden: Tensor, head: Tensor, temperature: float = 1.0) -> Tensor:
    """(N) entropy in nats of each next-token distribution."""
    parts = []
    for chunk in hidden.split(LOGITS_CHUNK):
        logprobs = torch.log_softmax(F.linear(chunk, head).float() / temperature, dim=-1)
        parts.append(-(logprobs.exp() * logprobs).sum(-1))
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)
