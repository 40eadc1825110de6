"""Pure tensor functions. B batch, R response, N predicted tokens, H hidden size, V vocabulary."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chatloom.kernels import log_softmax, vocabulary_library

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
        (N) float32. Logits exist for `LOGITS_CHUNK` tokens at a time. Where the head trains, (N, V) numbers of its
        precision are kept for the backward pass.
    """
    logprobs, _ = _LinearLogprobs.apply(hidden, _ordinary(head), targets, temperature, False)
    return cast(Tensor, logprobs)


def logprobs_and_entropies(
    hidden: Tensor, head: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """As `gather_logprobs`; and (N) the entropy in nats of each distribution, through which no gradient flows."""
    logprobs, entropies = _LinearLogprobs.apply(hidden, _ordinary(head), targets, temperature, True)
    return logprobs, entropies


class _LinearLogprobs(torch.autograd.Function):
    """log_softmax(hidden head^T / temperature) at the targets, without keeping float32 logits.

    With r = one-hot(target) - probabilities, d logprob / d hidden = r head / temperature: taken in the forward pass,
    where r is at hand. Where the head trains, r is kept in the head's precision: d logprob / d head = r hidden /
    temperature.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.temperature, ctx.head_shape = temperature, head.shape
        differentiable, head_trains = any(ctx.needs_input_grad[:2]), ctx.needs_input_grad[1]
        logprobs, entropies = (hidden.new_zeros(len(targets), dtype=torch.float32) for _ in range(2))
        gradient = torch.empty_like(hidden) if differentiable else hidden.new_empty(0)
        kept = []
        for rows in _chunk_slices(len(targets)):
            logits = F.linear(hidden[rows], head)
            logprobs[rows], entropies[rows], residual = _log_softmax(
                logits, targets[rows], temperature, with_entropy=with_entropy, with_residual=differentiable
            )
            if residual is not None:
                gradient[rows] = residual @ head / temperature
                kept += [residual] if head_trains else []
        ctx.save_for_backward(hidden, targets, gradient, *kept)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, targets, gradient, *kept = ctx.saved_tensors
        weights = upstream[0][:, None]
        hidden_grad = (gradient * weights).to(hidden.dtype)
        if not ctx.needs_input_grad[1]:
            return hidden_grad, None, None, None, None
        weighted = (hidden * (weights / ctx.temperature)).to(hidden.dtype)
        head_grad = weighted.new_zeros(ctx.head_shape)
        for rows, residual in zip(_chunk_slices(len(targets)), kept, strict=True):
            head_grad.addmm_(residual.T, weighted[rows])
        return hidden_grad, head_grad, None, None, None


def _ordinary(weight: Tensor) -> Tensor:
    """A weight in slices, which PyTorch's own operations gather (`chatloom.parallel.gemini`), gathered by one."""
    if type(weight) in (Tensor, nn.Parameter):
        return weight
    return weight.view_as(weight).as_subclass(Tensor)


def _chunk_slices(count: int) -> list[slice]:
    return [slice(start, start + LOGITS_CHUNK) for start in range(0, count, LOGITS_CHUNK)]


def _log_softmax(
    logits: Tensor, targets: Tensor, temperature: float, *, with_entropy: bool, with_residual: bool
) -> tuple[Tensor, Tensor | float, Tensor | None]:
    """Of softmax(logits / temperature), logits (N, V): (N) log-probabilities of `targets`, (N) entropies, and (N, V)
    one-hot(target) - probabilities like the logits, which may be overwritten."""
    library = vocabulary_library(logits)
    if library is not None:
        logprobs, entropies = log_softmax(library, logits, targets, temperature, keep=with_residual)
        return logprobs, entropies, logits if with_residual else None
    scaled = logits.float() if temperature == 1.0 else logits.float().div_(temperature)
    normalizer = scaled.logsumexp(-1)
    logprobs = scaled.gather(1, targets[:, None]).squeeze(1) - normalizer
    if not (with_entropy or with_residual):
        return logprobs, 0.0, None
    probabilities = torch.softmax(scaled, dim=-1)
    entropy = normalizer - torch.linalg.vecdot(probabilities, scaled) if with_entropy else 0.0
    if not with_residual:
        return logprobs, entropy, None
    ones = torch.ones_like(logprobs)[:, None]
    return logprobs, entropy, probabilities.neg_().scatter_add_(1, targets[:, None], ones).to(logits.dtype)
