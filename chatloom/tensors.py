"""Pure tensor functions. B batch, R response, N predicted tokens, H hidden size, V vocabulary."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS_CHUNK = 256
"""Tokens whose (tokens, V) float32 logits exist at the same time."""


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the True places of `mask`, whatever stands elsewhere; both of one shape."""
    return values.masked_fill(~mask, 0).sum() / mask.sum()


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """(values - mean) / sqrt(var + 1e-8) over the mask, zero elsewhere; the population variance."""
    mean = masked_mean(values, mask)
    var = masked_mean((values - mean) ** 2, mask)
    return ((values - mean) * torch.rsqrt(var + 1e-8)).masked_fill(~mask, 0)


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
    logprobs, _ = _LinearLogprobs.apply(hidden, head, targets, temperature, False)
    return cast(Tensor, logprobs)


def logprobs_and_entropies(
    hidden: Tensor, head: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """As `gather_logprobs`; and (N) the entropy in nats of each distribution, through which no gradient flows."""
    logprobs, entropies = _LinearLogprobs.apply(hidden, head, targets, temperature, True)
    return logprobs, entropies


class _LinearLogprobs(torch.autograd.Function):
    """log_softmax(hidden head^T / temperature) at the targets, without keeping logits.

    d logprob / d hidden = (head[target] - p head) / temperature needs the probabilities p, which are at hand in the
    forward pass: it is taken there, and a frozen head costs two products, not four. Where the head trains, p is made
    again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.temperature = temperature
        keep_gradient = ctx.needs_input_grad[0] and not ctx.needs_input_grad[1]
        logprobs, entropies = (hidden.new_zeros(len(targets), dtype=torch.float32) for _ in range(2))
        gradient = torch.empty_like(hidden) if keep_gradient else hidden.new_empty(0)
        for rows in _chunk_slices(len(targets)):
            logits = _scaled_logits(hidden[rows], head, temperature)
            normalizer = logits.logsumexp(-1)
            logprobs[rows] = logits.gather(1, targets[rows, None]).squeeze(1) - normalizer
            if not (with_entropy or keep_gradient):
                continue
            probabilities = torch.softmax(logits, dim=-1)
            if with_entropy:
                entropies[rows] = normalizer - torch.linalg.vecdot(probabilities, logits)
            if keep_gradient:
                expected = probabilities.to(head.dtype) @ head
                gradient[rows] = (head[targets[rows]] - expected) / temperature
        ctx.save_for_backward(hidden, head, targets, gradient)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, head, targets, gradient = ctx.saved_tensors
        weights = upstream[0][:, None]
        if not ctx.needs_input_grad[1]:
            return (gradient * weights).to(hidden.dtype), None, None, None, None
        hidden_grad = torch.empty_like(hidden)
        head_grad = torch.zeros_like(head)
        for rows in _chunk_slices(len(targets)):
            probabilities = torch.softmax(_scaled_logits(hidden[rows], head, ctx.temperature), dim=-1)
            logits_grad = probabilities.mul_(-weights[rows] / ctx.temperature)
            logits_grad.scatter_add_(1, targets[rows, None], weights[rows] / ctx.temperature)
            logits_grad = logits_grad.to(head.dtype)
            hidden_grad[rows] = logits_grad @ head
            head_grad.addmm_(logits_grad.T, hidden[rows])
        return hidden_grad, head_grad, None, None, None


def _chunk_slices(count: int) -> list[slice]:
    return [slice(start, start + LOGITS_CHUNK) for start in range(0, count, LOGITS_CHUNK)]


def _scaled_logits(hidden: Tensor, head: Tensor, temperature: float) -> Tensor:
    """(N, V) float32"""
    logits = F.linear(hidden, head).float()
    return logits if temperature == 1.0 else logits.div_(temperature)
