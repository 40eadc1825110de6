"""Rewards and generalised advantage estimation. All tensors are (B, R); results are zero beyond a row's response."""

from __future__ import annotations

import torch
from torch import Tensor


def token_rewards(scores: Tensor, kl: Tensor, response_mask: Tensor, kl_coef: float) -> Tensor:
    """-kl_coef * kl at each token; the score (B) once, at the last token of the response."""
    rewards = -kl_coef * kl.masked_fill(~response_mask, 0)
    last = response_mask.sum(1) - 1
    rewards[torch.arange(len(scores), device=scores.device), last] += scores
    return rewards


def gae(rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns (Schulman 2016), V beyond the end of a response being 0.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  returns = A + V, from unwhitened A.
    """
    # Filled, not multiplied: what stands beyond the end may be anything, NaN included.
    rewards, values = rewards.masked_fill(~response_mask, 0), values.masked_fill(~response_mask, 0)
    next_value = torch.zeros_like(values[:, 0])
    next_advantage = torch.zeros_like(next_value)
    advantages = torch.zeros_like(values)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # Beyond a row's end rewards and values are 0, so delta and the advantage are 0 there too.
        next_advantage = delta + gamma * lam * next_advantage
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values
