"""PPO's losses (Schulman 2017) as sums over tokens; the caller divides by the tokens of the whole optimizer step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clipped:
    loss: Tensor
    """scalar, sum over tokens"""
    clipped: Tensor
    """scalar, number of tokens where the clipped branch was the larger"""


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float) -> Clipped:
    """Sum of max(-A rho, -A clip(rho, 1 - eps, 1 + eps)), rho = exp(logprobs - old_logprobs); all (N)."""
    ratio = (logprobs - old_logprobs).exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    return Clipped(torch.maximum(plain, clipped).sum(), (clipped > plain).sum())


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> Clipped:
    """Half the sum of max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2); all (N)."""
    near = old_values + (values - old_values).clamp(-clip_range, clip_range)
    plain = (values - returns) ** 2
    clipped = (near - returns) ** 2
    return Clipped(0.5 * torch.maximum(plain, clipped).sum(), (clipped > plain).sum())
