"""Rollout and experience: what one PPO step learns from. B batch, R longest response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chatloom.batches import chunks
from chatloom.config import TrainPpoParams
from chatloom.data.examples import Example
from chatloom.models.adapters import use_adapter
from chatloom.models.sampling import Sampling
from chatloom.models.trunk import Below, run_below
from chatloom.packing import Packed, pack
from chatloom.parallel.ranks import ALONE, Ranks
from chatloom.ppo import kl
from chatloom.ppo.advantages import gae, token_rewards
from chatloom.ppo.roles import Roles
from chatloom.tensors import lengths_mask, masked_mean, whiten


@dataclass(frozen=True)
class Rollout:
    prompts: list[list[int]]
    responses: list[list[int]]
    """Generated tokens, the stop token included."""
    stopped: list[bool]
    """Whether a response ended with a stop token, and not at the length limit."""
    engine_logprobs: list[list[float]] | None
    """Of each token, as the engine that sampled it tells; None where it does not."""

    @property
    def examples(self) -> list[Example]:
        return [Example.of_response(p, r) for p, r in zip(self.prompts, self.responses, strict=True)]


@dataclass(frozen=True)
class Experience:
    examples: list[Example]
    response_mask: Tensor
    """(B, R) True = generated token, stop token included"""
    old_logprobs: Tensor
    """(B, R)"""
    ref_logprobs: Tensor
    """(B, R)"""
    kl: Tensor
    """(B, R) old_logprobs - ref_logprobs"""
    values: Tensor
    """(B, R)"""
    scores: Tensor
    """(B) of the reward model, without penalties"""
    penalties: Tensor
    """(B) taken from the scores of responses without a stop token"""
    advantages: Tensor
    """(B, R) whitened over the whole rollout"""
    returns: Tensor
    """(B, R)"""
    below: dict[int, Tensor]
    """Of sequences (P + R, H), what the frozen lower layers of the shared backbone made of them; empty where there are
    none. Everything else here is of all sequences on every rank, this of those that the rank has met so far."""
    engine_gap: float | None
    """Mean |log-probability by the engine that sampled - old_logprobs| over all tokens; None where it tells none."""

    def pack(self, rows: Sequence[int], backbone: Any) -> tuple[Packed, Below | None]:
        """Some sequences in one pack, with what the lower layers make of it."""
        packed = pack([self.examples[i] for i in rows], self.response_mask.device)
        if all(i in self.below for i in rows):
            return packed, Below(backbone, torch.cat([self.below[i] for i in rows])[None])
        below = run_below(backbone, packed)
        if below is not None:
            self.below.update(zip(rows, below.split(packed.lengths), strict=True))
        return packed, below

    def metrics(self) -> dict[str, float]:
        lengths = self.response_mask.sum(1).float()
        k3 = kl.k3(self.old_logprobs, self.ref_logprobs)
        rewards = self.scores - self.penalties
        error = masked_mean((self.returns - self.values) ** 2, self.response_mask)
        spread = masked_mean((self.returns - masked_mean(self.returns, self.response_mask)) ** 2, self.response_mask)
        gap = {} if self.engine_gap is None else {"rollout/engine_gap": self.engine_gap}
        return gap | {
            "objective/score": float(self.scores.mean()),
            "objective/score_with_penalty": float(rewards.mean()),
            "objective/kl": float(self.kl.sum(1).mean()),
            "objective/kl_k3": float((k3 * self.response_mask).sum(1).mean()),
            "objective/response_tokens": float(lengths.mean()),
            "objective/stopped": float((self.penalties == 0).float().mean()),
            "value/explained_variance": float(1 - error / spread.clamp_min(1e-8)),
        }


def roll_out(
    roles: Roles,
    prompts: Sequence[list[int]],
    params: TrainPpoParams,
    generator: torch.Generator,
    ranks: Ranks = ALONE,
) -> Rollout:
    """Sample one response a prompt from the policy, with no warp but the temperature that logprobs use too."""
    use_adapter(roles.policy.model, roles.policy.adapter)
    sampled = roles.engine(
        roles.policy.model,
        prompts,
        Sampling(params.max_new_tokens, params.temperature),
        stop_ids=roles.chat.stop_ids,
        generator=generator,
        ranks=ranks,
    )
    stopped = [response[-1] in roles.chat.stop_ids for response in sampled.responses]
    return Rollout(list(prompts), sampled.responses, stopped, sampled.logprobs)


@torch.no_grad()
def make_experience(
    roles: Roles, rollout: Rollout, params: TrainPpoParams, kl_coef: float, ranks: Ranks = ALONE
) -> Experience:
    """Score the rollout with every role, by all ranks together, and turn it into advantages, on each of them."""
    device, examples = roles.chat.device, rollout.examples
    lower: dict[int, Tensor] = {}

    def look(rows: list[int]) -> list[tuple[Tensor, ...]]:
        """Of each sequence its old and reference logprobs and its values (R), and its score."""
        found: list[tuple[Tensor, ...]] = []
        for some in chunks(rows, params.batch_size):
            packed = pack([examples[i] for i in some], device)
            below = run_below(roles.policy.model, packed)
            old = roles.policy.logprobs(packed, params.temperature, below)
            ref = roles.ref_policy.logprobs(packed, params.temperature, below)
            values = roles.value_model.values(packed, below)
            scores = roles.reward_model.scores(packed, below)
            tokens = zip(
                *(per_token.cpu().split(packed.num_predicted) for per_token in (old, ref, values)), strict=True
            )
            found += [(*own, score) for own, score in zip(tokens, scores.cpu(), strict=True)]
            if below is not None:
                lower.update(zip(some, below.split(packed.lengths), strict=True))
        return found

    sizes = [len(example.input_ids) for example in examples]
    old, ref, values, scores = zip(*ranks.spread(range(len(examples)), sizes, look), strict=True)
    lengths = torch.tensor([len(response) for response in rollout.responses], device=device)
    mask = lengths_mask(lengths, int(lengths.max()))
    old_logprobs, ref_logprobs, old_values = (
        torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True).to(device) for rows in (old, ref, values)
    )
    score = torch.stack(scores).to(device)
    penalties = params.missing_stop_penalty * (~torch.tensor(rollout.stopped, device=device)).float()
    token_kl = kl.k1(old_logprobs, ref_logprobs)
    rewards = token_rewards(score - penalties, token_kl, mask, kl_coef)
    advantages, returns = gae(rewards, old_values, mask, params.gamma, params.lam)
    return Experience(
        examples=rollout.examples,
        response_mask=mask,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        kl=token_kl,
        values=old_values,
        scores=score,
        penalties=penalties,
        advantages=whiten(advantages, mask),
        returns=returns,
        below=lower,
        engine_gap=_mean_gap(rollout.engine_logprobs, old) if rollout.engine_logprobs is not None else None,
    )


def _mean_gap(told: Sequence[list[float]], logprobs: Sequence[Tensor]) -> float:
    ours = torch.cat(list(logprobs))
    return float((ours - ours.new_tensor([logprob for row in told for logprob in row])).abs().mean())
