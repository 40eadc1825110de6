"""PPO's pure functions, each against a double loop, an enumeration or a number worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from chatloom.config import Kl
from chatloom.ppo import kl
from chatloom.ppo.advantages import gae, token_rewards
from chatloom.ppo.kl import KlController
from chatloom.ppo.losses import policy_loss, value_loss
from chatloom.tensors import gather_logprobs, lengths_mask, logprobs_and_entropies, masked_mean, whiten


def test_masked_mean_and_whiten_see_only_the_mask() -> None:
    values = torch.tensor([[1.0, 2.0, 99.0], [3.0, 77.0, 55.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert float(masked_mean(values, mask)) == pytest.approx(2.0)
    # Mean 2, population variance 2/3.
    expected = torch.tensor([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]) / math.sqrt(2 / 3 + 1e-8)
    torch.testing.assert_close(whiten(values, mask), expected)


def test_what_stands_beyond_the_end_of_a_response_changes_nothing() -> None:
    mask = lengths_mask(torch.tensor([3, 1, 2]), 3)
    generator = torch.Generator().manual_seed(0)
    token_kl, values = torch.randn(3, 3, generator=generator), torch.randn(3, 3, generator=generator)

    def run(padding: float) -> list[Tensor]:
        dirty_kl, dirty_values = (tensor.masked_fill(~mask, padding) for tensor in (token_kl, values))
        rewards = token_rewards(torch.tensor([1.0, -2.0, 3.0]), dirty_kl, mask, kl_coef=0.1)
        advantages, returns = gae(rewards.masked_fill(~mask, padding), dirty_values, mask, gamma=0.9, lam=0.7)
        return [rewards, advantages, returns, whiten(dirty_values, mask), masked_mean(dirty_values, mask)]

    for padding in (5.0, float("inf"), float("nan")):
        for clean, dirty in zip(run(0.0), run(padding), strict=True):
            assert torch.equal(clean, dirty)


def test_logprobs_and_entropy_divide_by_the_temperature() -> None:
    hidden, head = torch.tensor([[1.0]]), torch.tensor([[0.0], [math.log(2.0)]])
    # Logits 0 and log 2; at temperature 0.5 the odds are squared: 1 to 4.
    logprobs, entropies = logprobs_and_entropies(hidden, head, torch.tensor([1]), 0.5)
    assert float(logprobs) == pytest.approx(math.log(0.8))
    assert float(entropies) == pytest.approx(-(0.8 * math.log(0.8) + 0.2 * math.log(0.2)))


def test_chunked_logits_change_neither_values_nor_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(7, 4, generator=generator), torch.randn(5, 4, generator=generator)
    targets = torch.tensor([0, 1, 2, 3, 4, 0, 1])

    def run() -> list[Tensor]:
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        logprobs = gather_logprobs(h, w, targets)
        logprobs.sum().backward()
        assert h.grad is not None
        assert w.grad is not None
        return [logprobs.detach(), h.grad, w.grad]

    whole = run()
    monkeypatch.setattr("chatloom.tensors.LOGITS_CHUNK", 3)
    for a, b in zip(whole, run(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_score_is_added_once_at_the_last_response_token() -> None:
    mask = lengths_mask(torch.tensor([3, 1]), 3)
    token_kl = torch.tensor([[0.5, -0.5, 1.0], [2.0, 9.0, 9.0]])
    rewards = token_rewards(torch.tensor([10.0, 20.0]), token_kl, mask, kl_coef=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 0.05, 9.9], [19.8, 0.0, 0.0]]))


def gae_oracle(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The definition as a double sum: A_t = sum_k (gamma lam)^k delta_{t+k}."""
    following = [*values[1:], 0.0]
    delta = [r + gamma * v1 - v0 for r, v0, v1 in zip(rewards, values, following, strict=True)]
    return [sum((gamma * lam) ** k * delta[t + k] for k in range(len(delta) - t)) for t in range(len(delta))]


def test_gae_equals_the_double_sum_and_ignores_what_is_beyond_the_end() -> None:
    lengths = [4, 2, 1]
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(3, 4, generator=generator), torch.randn(3, 4, generator=generator)
    mask = lengths_mask(torch.tensor(lengths), 4)
    advantages, returns = gae(rewards * mask, values, mask, gamma=0.9, lam=0.7)
    for row, length in enumerate(lengths):
        own = values[row, :length].tolist()
        expected = gae_oracle(rewards[row, :length].tolist(), own, 0.9, 0.7)
        assert advantages[row, :length].tolist() == pytest.approx(expected, abs=1e-5)
        assert returns[row, :length].tolist() == pytest.approx(
            [a + v for a, v in zip(expected, own, strict=True)], abs=1e-5
        )
        assert not advantages[row, length:].any()


def test_losses_by_hand() -> None:
    old = torch.zeros(4)
    ratios = torch.tensor([1.5, 1.5, 0.5, 1.1])
    advantages = torch.tensor([1.0, -1.0, 1.0, 2.0])
    # max(-A rho, -A clip(rho)): -1.2 (clipped), 1.5, -0.5, -2.2.
    policy = policy_loss(ratios.log(), old, advantages, clip_range=0.2)
    assert float(policy.loss) == pytest.approx(-1.2 + 1.5 - 0.5 - 2.2)
    assert int(policy.clipped) == 1
    # V = 1 against R = 0, V_old = 0.5: plain 1, clipped to 0.7 it is 0.49. V = 0 against R = 1: plain 1, at 0.3 0.49.
    value = value_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0]), clip_range=0.2)
    assert float(value.loss) == pytest.approx(0.5 * (1.0 + 1.0))
    assert int(value.clipped) == 0
    # V moved away past the range from R: the clipped branch is the larger one. V = 2, V_old = 0.5, R = 2.
    far = value_loss(torch.tensor([2.0]), torch.tensor([0.5]), torch.tensor([2.0]), clip_range=0.2)
    assert float(far.loss) == pytest.approx(0.5 * 1.3**2)
    assert int(far.clipped) == 1


def test_adaptive_kl_by_hand() -> None:
    controller = KlController.start(Kl(init_coef=0.1, target=6.0, horizon=100))
    controller.update(6.6, 10)  # 10 % over: * (1 + 0.1 * 10 / 100)
    assert controller.coef == pytest.approx(0.101)
    controller.update(60.0, 10)  # clipped to 20 %
    assert controller.coef == pytest.approx(0.101 * 1.02)
    controller.update(0.0, 10)
    assert controller.coef == pytest.approx(0.101 * 1.02 * 0.98)
    fixed = KlController.start(Kl(init_coef=0.1, target=None, horizon=100))
    fixed.update(60.0, 10)
    assert fixed.coef == 0.1


# --- the gradient of the whole estimator, by enumeration: 6 tokens, one of which ends a response of at most 2 ---

RESPONSES = [(5,), *((a, b) for a in range(5) for b in range(6))]
SCORES = torch.linspace(-1, 2, len(RESPONSES), dtype=torch.float64).sin()


class Table:
    """A policy over RESPONSES: logits of the first token, and of the second after each first one."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.first = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
        self.second = torch.randn(6, 6, generator=generator, dtype=torch.float64, requires_grad=True)

    def logprobs(self) -> Tensor:
        """(31, 2), zero where a response has ended."""
        first, second = self.first.log_softmax(-1), self.second.log_softmax(-1)
        ended = torch.zeros((), dtype=torch.float64)
        return torch.stack([torch.stack([first[r[0]], second[r] if len(r) > 1 else ended]) for r in RESPONSES])


@pytest.mark.parametrize(("estimator", "is_right"), [(kl.k1, True), (kl.k3, False)])
def test_the_estimator_has_the_gradient_of_reward_minus_kl(estimator: Callable[..., Tensor], is_right: bool) -> None:
    """Weighted with each response's probability, rewards, advantages and policy loss as they are used have the gradient
    of E[score] - beta KL(pi || ref), with any baseline; and k3 in the reward would have another one."""
    policy, beta = Table(0), 0.3
    logprobs, ref_logprobs = policy.logprobs(), Table(1).logprobs().detach()
    probabilities = logprobs.sum(1).exp()
    assert float(probabilities.detach().sum()) == pytest.approx(1)
    exact = (probabilities * (SCORES - beta * (logprobs - ref_logprobs).sum(1))).sum()
    expected = torch.autograd.grad(exact, [policy.first, policy.second], retain_graph=True)

    mask = lengths_mask(torch.tensor([len(r) for r in RESPONSES]), 2)
    old_logprobs = logprobs.detach()
    rewards = token_rewards(SCORES, estimator(old_logprobs, ref_logprobs), mask, beta)
    baseline = torch.tensor([[0.7, math.cos(r[0])] for r in RESPONSES], dtype=torch.float64)
    advantages, _ = gae(rewards, baseline, mask, gamma=1.0, lam=1.0)
    weighted = advantages * probabilities.detach()[:, None]
    loss = policy_loss(logprobs[mask], old_logprobs[mask], weighted[mask], clip_range=0.2).loss
    actual = torch.autograd.grad(-loss, [policy.first, policy.second])
    agree = [torch.allclose(a, b, atol=1e-12) for a, b in zip(expected, actual, strict=True)]
    assert agree == [is_right, is_right]


def test_k3_is_unbiased_and_never_negative() -> None:
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    estimates = kl.k3(p.log(), q.log())
    assert bool((estimates >= 0).all())
    assert float((p * estimates).sum()) == pytest.approx(float((p * (p / q).log()).sum()))
