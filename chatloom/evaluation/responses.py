"""What two policies answer to the same prompts, and who wins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from chatloom.batches import chunks
from chatloom.config import EvaluateParams
from chatloom.data.examples import Example
from chatloom.data.prepared import PreparedRow
from chatloom.evaluation.intervals import Interval, bootstrap_mean
from chatloom.models.adapters import Role
from chatloom.models.checkpoint import ChatModel
from chatloom.models.generation import generate
from chatloom.models.reward_model import score_responses
from chatloom.models.sampling import Sampling
from chatloom.packing import pack

ROWS_AT_ONCE = 4


@dataclass(frozen=True)
class Answers:
    texts: list[str]
    ids: list[list[int]]
    scores: list[float]
    """By the reward model."""


def answer(chat: ChatModel, rows: Sequence[PreparedRow], reward_model: Role, params: EvaluateParams) -> Answers:
    """One sampled response a row from `chat`, scored; the same seed for every model, so that luck is shared."""
    prompts = [row.prompt_ids for row in rows]
    ids = generate(
        chat.model,
        prompts,
        Sampling(params.max_new_tokens, params.temperature),
        stop_ids=chat.stop_ids,
        generator=torch.Generator().manual_seed(params.seed),
        batch_size=params.generation_batch,
    )
    texts = [chat.tokenizer.decode(response, skip_special_tokens=True).strip() for response in ids]
    return Answers(texts, ids, score_responses(reward_model, prompts, ids))


@torch.no_grad()
def kl_per_sequence(
    policy: Role, ref_policy: Role, rows: Sequence[PreparedRow], response_ids: Sequence[list[int]], temperature: float
) -> list[float]:
    """Of each response sampled from `policy`, sum over tokens of log pi - log pi_ref (k1, nats)."""
    device = policy.model.lm_head.weight.device
    examples = [Example.of_response(row.prompt_ids, ids) for row, ids in zip(rows, response_ids, strict=True)]
    sums: list[float] = []
    for some in chunks(examples, ROWS_AT_ONCE):
        packed = pack(some, device)
        difference = policy.logprobs(packed, temperature) - ref_policy.logprobs(packed, temperature)
        sums += [float(part.sum()) for part in difference.split(packed.num_predicted)]
    return sums


def win_rate(ours: Sequence[float], theirs: Sequence[float], params: EvaluateParams) -> Interval:
    """Share of prompts on which ours scores higher, ties counting half, with a bootstrap interval over prompts."""
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(ours, theirs, strict=True)]
    return bootstrap_mean(wins, params.bootstrap_samples, params.seed)
