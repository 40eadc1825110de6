"""What a request asks of logits beside sampling: penalties on tokens that are there already, and logprobs of what was
sampled. V vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Penalties:
    repetition: float = 1.0
    """Logits of tokens of the prompt and the answer are divided by it where positive, else multiplied (Keskar 2019)."""
    presence: float = 0.0
    """Taken off the logit of every token that the answer has."""
    frequency: float = 0.0
    """Taken off as often as the answer has the token."""

    @property
    def neutral(self) -> bool:
        return self.repetition == 1 and self.presence == self.frequency == 0


@dataclass(frozen=True)
class Logprobs:
    """Of one sampled token, under the model itself: before penalties, temperature and top-p."""

    sampled: float
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens with theirs, the likeliest first."""


def penalize(logits: Tensor, penalties: Penalties, prompt_ids: Sequence[int], answer: Mapping[int, int]) -> None:
    """Change (V) float32 logits in place.

    Args:
        answer: how often each token is in the answer so far.
    """
    if penalties.repetition != 1:
        seen = torch.tensor(sorted({*prompt_ids, *answer}), device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / penalties.repetition, values * penalties.repetition)
    if answer:
        ids = torch.tensor(list(answer), device=logits.device)
        counts = torch.tensor(list(answer.values()), device=logits.device)
        logits[ids] -= penalties.presence + penalties.frequency * counts


def keep_top(logits: Tensor, count: int) -> None:
    """Leave the `count` largest of (V) logits as they are, and those as large as the last of them; in place."""
    if count < len(logits):
        logits[logits < logits.topk(count).values[-1]] = float("-inf")


def logprobs_of(logits: Tensor, token: int, num_top: int) -> Logprobs:
    """Of `token` under (V) logits, and of the `num_top` likeliest."""
    logprobs = logits.float().log_softmax(-1)
    values, ids = logprobs.topk(num_top)
    return Logprobs(float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
