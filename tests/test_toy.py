"""PPO's own loop on a toy whose best policy is known: pi* = pi_ref exp(score / beta) / Z, by enumeration."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch
from torch import Tensor

from chatloom.config import Kl, Lora, Optimizer
from chatloom.models.adapters import Role
from chatloom.models.checkpoint import load_on
from chatloom.models.head import ScalarHead
from chatloom.models.rollouts import native
from chatloom.packing import Packed
from chatloom.ppo.experience import roll_out
from chatloom.ppo.loop import train_ppo
from chatloom.ppo.roles import Roles
from tests.conftest import CPU
from tests.test_ppo import params

PROMPTS = [[5, 6, 7], [8, 9]]
BETA = 0.2
NUM_TOKENS = 300
WANTED = torch.arange(NUM_TOKENS) % 10 == 2


class CountsWanted(Role):
    """Scores a response by how many of its tokens are wanted ones: a tenth of the vocabulary."""

    def scores(self, packed: Packed, *_: object) -> Tensor:
        return torch.stack([WANTED[own].float().sum() for own in packed.targets.split(packed.num_predicted)])


def response_logprobs(model: object, prompt: list[int], stop: int, temperature: float = 1.0) -> Tensor:
    """(V, V) float64 log-probability of every response of two tokens; the row of `stop` holds one that ends there.

    By the model's own eager attention: every first token, then every second one after each.
    """
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")  # type: ignore[attr-defined]
    with torch.no_grad():
        rows = torch.cat([torch.tensor([prompt]).expand(NUM_TOKENS, -1), torch.arange(NUM_TOKENS)[:, None]], dim=1)
        logits = plain(rows).logits.double() / temperature  # type: ignore[operator]
    first, second = logits[0, len(prompt) - 1].log_softmax(-1), logits[:, -1].log_softmax(-1)
    both = first[:, None] + second
    both[stop] = -math.inf
    both[stop, 0] = first[stop]
    return both


def test_rollouts_follow_the_enumerated_distribution(checkpoint: Path, lora: Lora, optimizer: Optimizer) -> None:
    """Samples have the mean log-probability they should, and the likeliest responses come as often as they should."""
    chat = load_on(checkpoint, CPU)
    with torch.no_grad():
        chat.model.lm_head.weight.mul_(8)  # an untrained model likes every token about equally
    role = Role(chat.model)
    p = params(lora, optimizer, max_new_tokens=2, temperature=0.7, generation_batch=200)
    roles = Roles(role, role, role, role, chat, native(p.generation_batch))
    rollout = roll_out(roles, PROMPTS * 1500, p, torch.Generator().manual_seed(0))
    for number, prompt in enumerate(PROMPTS):
        (stop,) = chat.stop_ids
        logprobs = response_logprobs(chat.model, prompt, stop, p.temperature)
        sampled = torch.tensor([(*r, 0)[:2] for r in rollout.responses[number :: len(PROMPTS)]])
        found = logprobs[sampled[:, 0], sampled[:, 1]]
        finite, probabilities = logprobs[logprobs > -math.inf], logprobs.exp()
        mean = float((finite.exp() * finite).sum())
        deviation = float((finite.exp() * (finite - mean) ** 2).sum().sqrt())
        assert deviation > 1, "else the test would not see much"
        assert abs(float(found.mean()) - mean) < 4 * deviation / math.sqrt(len(found))
        for place in probabilities.flatten().topk(5).indices.tolist():
            share = float(probabilities.flatten()[place])
            times = int((sampled[:, 0] * NUM_TOKENS + sampled[:, 1] == place).sum())
            assert abs(times - share * len(sampled)) < 4 * math.sqrt(share * (1 - share) * len(sampled))


def test_ppo_reaches_the_kl_regularised_optimum_of_a_toy(checkpoint: Path, lora: Lora, optimizer: Optimizer) -> None:
    """E[score] - beta KL(pi || pi_ref), exactly, before and after, against its greatest value beta log Z."""
    p = params(
        lora,
        optimizer.model_copy(update={"lr": 1e-2, "max_grad_norm": 1.0, "schedule": "linear"}),
        method="full",
        num_steps=40,
        rollout_batch=64,
        generation_batch=64,
        batch_size=64,
        num_minibatches=1,
        ppo_epochs=4,
        max_new_tokens=2,
        temperature=1.0,
        missing_stop_penalty=0.0,
        gamma=1.0,
        lam=1.0,
        value_lr=1e-2,
        kl=Kl(init_coef=BETA, target=None, horizon=100),
    )
    chat, policy, value = (load_on(checkpoint, CPU) for _ in range(3))
    (stop,) = chat.stop_ids
    head = ScalarHead(chat.model.config.hidden_size, torch.Generator().manual_seed(0))
    roles = Roles(
        policy=Role(policy.model.requires_grad_(True)),
        ref_policy=Role(chat.model),
        reward_model=CountsWanted(chat.model),
        value_model=Role(value.model.requires_grad_(True), None, head),
        chat=chat,
        engine=native(p.generation_batch),
    )
    score = WANTED.double()[:, None] + WANTED.double()
    score[stop] = float(WANTED[stop])
    before = [response_logprobs(chat.model, prompt, stop) for prompt in PROMPTS]
    assert all(math.isclose(float(logprobs.exp().sum()), 1.0) for logprobs in before)

    def objective(logprobs: Tensor, ref_logprobs: Tensor) -> float:
        kl = torch.where(logprobs > -math.inf, logprobs - ref_logprobs, 0.0)
        return float((logprobs.exp() * (score - BETA * kl)).sum())

    train_ppo(roles, PROMPTS, [], p, lambda *_: None, lambda *_: None)
    after = [response_logprobs(policy.model, prompt, stop) for prompt in PROMPTS]
    start = sum(objective(ref, ref) for ref in before)
    end = sum(objective(own, ref) for own, ref in zip(after, before, strict=True))
    best = sum(float(BETA * (ref + score / BETA).logsumexp((0, 1))) for ref in before)
    assert start < 0.3 * best
    assert (end - start) / (best - start) >= 0.95
