"""The scalar head that turns a hidden state into a score or a value."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class ScalarHead(nn.Module):
    """gain * (w . h + offset) + bias in float32 whatever the trunk's precision.

    `gain` and `bias` are no parameters: they are set once, after reward training, so that reference responses score
    mean 0 and standard deviation 1 (Stiennon 2020), and travel with the model.
    """

    gain: Tensor
    bias: Tensor

    def __init__(self, hidden_size: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        weight = torch.randn(hidden_size, generator=generator) * (hidden_size + 1) ** -0.5
        self.weight = nn.Parameter(weight)
        self.offset = nn.Parameter(torch.zeros(()))
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("bias", torch.zeros(()))

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., H) to (...)"""
        return self.gain * (hidden.float() @ self.weight + self.offset) + self.bias

    @torch.no_grad()
    def normalize(self, scores: Tensor) -> None:
        """Set gain and bias so that `scores`, made by this head on reference responses, would be mean 0 and std 1."""
        std = scores.std(unbiased=False).clamp_min(1e-6)
        self.bias.copy_((self.bias - scores.mean()) / std)
        self.gain.copy_(self.gain / std)

    def clone(self) -> ScalarHead:
        return copy.deepcopy(self)
