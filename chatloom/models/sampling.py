"""From logits to tokens. B rows, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_TEMPERATURE = 1e-5
"""Below it the likeliest token is taken: it has all of the probability, and logits divided by it leave float32."""

SECTION = 256
"""Tokens whose probabilities are summed before the cumulative sum, so that only B * V / 256 numbers are float64."""


@dataclass(frozen=True)
class Sampling:
    max_new_tokens: int
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Below 1, only the likeliest tokens that sum to it. Rollouts need 1: logprobs are of the whole distribution."""


def sample(logits: Tensor, settings: Sequence[Sampling], uniforms: Sequence[float]) -> list[int]:
    """One token a row, each by its own settings and its own uniform number.

    A row's token depends on nothing else: who is in the batch beside it, and where, makes no difference.

    Args:
        logits: (B, V)
        settings: of each row.
        uniforms: in [0, 1), one a row; a greedy row does not use its own.
    """
    greedy = [s.temperature < LEAST_TEMPERATURE for s in settings]
    if all(greedy):
        return _integers(logits.argmax(-1))
    temperatures = [1.0 if likeliest else s.temperature for s, likeliest in zip(settings, greedy, strict=True)]
    scaled = logits.float()
    if any(temperature != 1 for temperature in temperatures):
        scaled = scaled / torch.tensor(temperatures, device=logits.device)[:, None]
    probabilities = torch.softmax(scaled, dim=-1)
    for row, setting in enumerate(settings):
        if setting.top_p < 1 and not greedy[row]:
            probabilities[row] = _nucleus(probabilities[row], setting.top_p)
    tokens = _invert_cdf(probabilities, torch.tensor(uniforms, dtype=torch.float64, device=logits.device))
    if any(greedy):
        tokens = torch.where(torch.tensor(greedy, device=logits.device), logits.argmax(-1), tokens)
    return _integers(tokens)


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """(V) with 0 for all but the likeliest tokens whose sum reaches `top_p`; at least one token stays."""
    ordered, index = probabilities.sort(descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p
    outside[0] = False  # in float32, a tiny top_p is 0
    ordered[outside] = 0
    return torch.zeros_like(probabilities).scatter_(-1, index, ordered)


def _invert_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """(B, V) weights and (B) in [0, 1) to (B) tokens: the first whose cumulative weight is above its share of the sum.

    torch.multinomial would draw V numbers a row, and a float64 cumulative sum over V is as slow: first the section of
    the vocabulary is found by its sum, then the token in it.
    """
    if pad := -probabilities.shape[-1] % SECTION:
        probabilities = F.pad(probabilities, (0, pad))
    sections = probabilities.unflatten(-1, (-1, SECTION))  # (B, V / 256, 256)
    section, share = _bisect(sections.sum(-1), uniforms)
    chosen = sections[torch.arange(len(sections), device=sections.device), section]
    return section * SECTION + _bisect(chosen, share)[0]


def _bisect(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N) and (B) to the place (B) where the cumulative weight passes its share, and how far into that place (B)."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    threshold = uniforms[:, None] * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, threshold, right=True).clamp_max(weights.shape[-1] - 1)
    width = weights.gather(-1, place).double()
    share = (threshold - cumulative.gather(-1, place) + width) / width
    return place.squeeze(1), share.squeeze(1).clamp(0, 1 - torch.finfo(torch.float64).eps)


def _integers(tokens: Tensor) -> list[int]:
    integers: list[int] = tokens.tolist()
    return integers
