"""KL between the policy and its reference: estimators, its exact value, and the controller of its coefficient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from chatloom.config import Kl
from chatloom.data.examples import Example
from chatloom.models.adapters import Role
from chatloom.packing import pack
from chatloom.tensors import LOGITS_CHUNK


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log pi - log pi_ref a token: unbiased, and the one whose sum in the reward has the KL's gradient."""
    return logprobs - ref_logprobs


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(r - 1) - log r with r = pi_ref / pi (Schulman 2020): unbiased, never negative; for display only."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - 1 - log_ratio


@torch.no_grad()
def along(
    policy: Role,
    ref_policy: Role,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    temperature: float,
) -> list[float]:
    """Of each response, the KL of the next-token distribution summed over its tokens, in nats.

    Exact, over the whole vocabulary, along this response: no sample of the policy is needed, and greedy ones are none.
    """
    sums = []
    for prompt, response in zip(prompts, responses, strict=True):
        packed = pack([Example.of_response(prompt, response)], policy.model.lm_head.weight.device)
        # (N, H) in pieces, since logits are (N, V)
        pieces = [role.hidden(packed)[packed.predictors].split(LOGITS_CHUNK) for role in (policy, ref_policy)]
        total = 0.0
        for ours, theirs in zip(*pieces, strict=True):
            p, q = (
                torch.log_softmax(F.linear(hidden, role.model.lm_head.weight).float() / temperature, dim=-1)
                for hidden, role in ((ours, policy), (theirs, ref_policy))
            )
            total += float((p.exp() * (p - q)).sum())
        sums.append(total)
    return sums


@dataclass
class KlController:
    """The coefficient, steered towards a KL per sequence (Ziegler 2019); its state is `coef` alone."""

    params: Kl
    coef: float

    @classmethod
    def start(cls, params: Kl) -> KlController:
        return cls(params, params.init_coef)

    def update(self, kl_per_sequence: float, num_episodes: int) -> None:
        """coef *= 1 + clip(KL / target - 1, -0.2, 0.2) * episodes / horizon; nothing without a target."""
        if self.params.target is None:
            return
        error = min(max(kl_per_sequence / self.params.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * num_episodes / self.params.horizon
