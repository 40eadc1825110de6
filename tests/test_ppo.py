"""PPO: rules 3 to 13 and 15, each against a double loop, an enumeration or a number worked out by hand."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from chatloom.config import Kl, Lora, Optimizer, Parallel, TrainPpoParams
from chatloom.data.examples import Example
from chatloom.device import Device
from chatloom.errors import InputError
from chatloom.models.adapters import Role, add_adapter, merge_adapter
from chatloom.models.checkpoint import load_on
from chatloom.models.head import ScalarHead
from chatloom.models.reward_model import ADAPTER, save_reward_model
from chatloom.packing import pack
from chatloom.ppo import kl
from chatloom.ppo.advantages import gae, token_rewards
from chatloom.ppo.experience import make_experience, roll_out
from chatloom.ppo.kl import KlController
from chatloom.ppo.loop import train_ppo
from chatloom.ppo.losses import policy_loss, value_loss
from chatloom.ppo.roles import Roles, load_roles
from chatloom.tensors import gather_logprobs, lengths_mask, logprobs_and_entropies, masked_mean, whiten
from tests.conftest import CPU

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14, 15]]


def params(lora: Lora, optimizer: Optimizer, **changes: object) -> TrainPpoParams:
    values = {
        "method": "lora",
        "lora": lora,
        "optimizer": optimizer.model_copy(update={"adam_eps": 1e-5}),
        "value_lr": 1e-3,
        "parallel": Parallel(strategy="none", num_processes=1),
        "num_steps": 2,
        "rollout_batch": 4,
        "generation_batch": 4,
        "ppo_epochs": 2,
        "num_minibatches": 2,
        "batch_size": 2,
        "max_new_tokens": 6,
        "temperature": 0.7,
        "missing_stop_penalty": 1.0,
        "gamma": 0.9,
        "lam": 0.8,
        "clip_range": 0.2,
        "value_clip_range": 0.2,
        "vf_coef": 0.1,
        "ptx_coef": 0.0,
        "ptx_batch": 0,
        "kl": Kl(init_coef=0.1, target=6.0, horizon=100),
        "sample_every": 1,
        "seed": 0,
    }
    return TrainPpoParams.model_validate(values | changes)


@pytest.fixture
def models(checkpoint: Path, tmp_path: Path, lora: Lora) -> tuple[Path, Path]:
    """An SFT checkpoint and a LoRA reward model on it."""
    model = load_on(checkpoint, CPU).model
    add_adapter(model, ADAPTER, lora, seed=3)
    role = Role(model, ADAPTER, ScalarHead(model.config.hidden_size, torch.Generator().manual_seed(1)))
    for parameter in role.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7))
    assert role.head is not None
    role.head.normalize(torch.tensor([0.0, 0.5, 1.5]))
    reward = tmp_path / "reward"
    reward.mkdir()
    save_reward_model(reward, role, lora, checkpoint)
    return checkpoint, reward


# --- pure functions ---


def test_masked_mean_and_whiten_see_only_the_mask() -> None:
    values = torch.tensor([[1.0, 2.0, 99.0], [3.0, 77.0, 55.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert float(masked_mean(values, mask)) == pytest.approx(2.0)
    # Mean 2, population variance 2/3.
    expected = torch.tensor([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]) / math.sqrt(2 / 3 + 1e-8)
    torch.testing.assert_close(whiten(values, mask), expected)


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


# --- the gradient of KL in the reward, by enumeration over a vocabulary of 6 and responses of 2 tokens ---


def test_k1_in_the_reward_has_the_gradient_of_the_kl() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    second = torch.randn(6, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    ref_first = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(-1)
    ref_second = torch.randn(6, 6, generator=generator, dtype=torch.float64).log_softmax(-1)

    def enumerate_all() -> tuple[Tensor, Tensor]:
        """Exact KL(pi || ref), and the policy-gradient surrogate with the k1 sum as (negative) reward."""
        exact, surrogate = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        log_first, log_second = first.log_softmax(-1), second.log_softmax(-1)
        for a, b in itertools.product(range(6), range(6)):
            logprob = log_first[a] + log_second[a, b]
            k1 = kl.k1(log_first[a], ref_first[a]) + kl.k1(log_second[a, b], ref_second[a, b])
            exact = exact + logprob.exp() * k1
            surrogate = surrogate + logprob.exp().detach() * k1.detach() * logprob
        return exact, surrogate

    exact, surrogate = enumerate_all()
    expected = torch.autograd.grad(exact, [first, second], retain_graph=True)
    actual = torch.autograd.grad(surrogate, [first, second])
    for a, b in zip(expected, actual, strict=True):
        torch.testing.assert_close(a, b)


def test_k3_is_unbiased_and_never_negative() -> None:
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    estimates = kl.k3(p.log(), q.log())
    assert bool((estimates >= 0).all())
    assert float((p * estimates).sum()) == pytest.approx(float((p * (p / q).log()).sum()))


# --- roles and experience ---


@pytest.mark.parametrize("method", ["lora", "full"])
def test_before_the_first_update_ratio_is_one_and_kl_zero(
    method: str, models: tuple[Path, Path], lora: Lora, optimizer: Optimizer
) -> None:
    p = params(lora, optimizer, method=method)
    roles = load_roles(*models, p, CPU)
    rollout = roll_out(roles, PROMPTS, p, torch.Generator().manual_seed(0))
    experience = make_experience(roles, rollout, p, 0.1)
    assert float(experience.kl.abs().max()) == 0.0
    again = roles.policy.logprobs(pack(experience.examples), p.temperature)
    torch.testing.assert_close(again, experience.old_logprobs[experience.response_mask], atol=1e-6, rtol=0)


def test_old_logprobs_are_those_of_the_distribution_that_was_sampled(
    models: tuple[Path, Path], lora: Lora, optimizer: Optimizer
) -> None:
    p = params(lora, optimizer)
    roles = load_roles(*models, p, CPU)
    rollout = roll_out(roles, PROMPTS, p, torch.Generator().manual_seed(0))
    experience = make_experience(roles, rollout, p, 0.1)
    plain = copy.deepcopy(load_on(models[0], CPU).model)
    plain.set_attn_implementation("eager")
    for row, (prompt, response) in enumerate(zip(rollout.prompts, rollout.responses, strict=True)):
        with torch.no_grad():
            logits = plain(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / p.temperature
        expected = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).squeeze(1)
        actual = experience.old_logprobs[row][experience.response_mask[row]]
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_the_value_model_starts_as_the_reward_model_gain_and_bias_included(
    models: tuple[Path, Path], lora: Lora, optimizer: Optimizer
) -> None:
    for method in ("lora", "full"):
        roles = load_roles(*models, params(lora, optimizer, method=method), CPU)
        # Its value before a token is what the reward model would score the text up to there.
        example = Example.of_response([5, 6, 7], [8, 9])
        values = roles.value_model.values(pack([example]))
        scores = [float(roles.reward_model.scores(pack([Example([5, 6, 7, 8][:n], [False] * n)]))) for n in (3, 4)]
        assert values.tolist() == pytest.approx(scores, abs=1e-4)


def test_shared_backbone_equals_separate_models(models: tuple[Path, Path], lora: Lora, optimizer: Optimizer) -> None:
    p = params(lora, optimizer)
    shared = load_roles(*models, p, CPU)
    for parameter in shared.policy.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(11))
    rollout = roll_out(shared, PROMPTS, p, torch.Generator().manual_seed(0))
    assert shared.policy.model is shared.ref_policy.model is shared.reward_model.model is shared.value_model.model
    together = make_experience(shared, rollout, p, 0.1)

    def alone(role: Role) -> Role:
        model = copy.deepcopy(role.model)
        return Role(merge_adapter(model, role.adapter or "none"), None, role.head)

    separate = Roles(
        alone(shared.policy),
        alone(shared.ref_policy),
        alone(shared.reward_model),
        alone(shared.value_model),
        shared.chat,
    )
    apart = make_experience(separate, rollout, p, 0.1)
    for name in ("old_logprobs", "ref_logprobs", "values", "scores", "advantages", "returns"):
        torch.testing.assert_close(getattr(together, name), getattr(apart, name), atol=2e-4, rtol=1e-3, msg=name)


def test_a_response_without_a_configured_stop_token_is_penalised(
    models: tuple[Path, Path], lora: Lora, optimizer: Optimizer
) -> None:
    p = params(lora, optimizer, missing_stop_penalty=3.0)
    roles = load_roles(*models, p, CPU)
    rollout = roll_out(roles, PROMPTS, p, torch.Generator().manual_seed(0))
    assert rollout.stopped == [response[-1] in roles.chat.stop_ids for response in rollout.responses]
    rollout = type(rollout)(rollout.prompts, rollout.responses, [True, False, False, True])
    assert make_experience(roles, rollout, p, 0.1).penalties.tolist() == [0.0, 3.0, 3.0, 0.0]


# --- the loop ---


def run(
    roles: Roles, p: TrainPpoParams, ptx: list[Example] | None = None
) -> tuple[dict[str, float], list[dict[str, float]]]:
    logged: list[dict[str, float]] = []
    summary = train_ppo(roles, PROMPTS, ptx or [], p, lambda _, m: logged.append(dict(m)), lambda *_: None)
    return summary, logged


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_loop_trains_policy_and_value_and_nothing_else(
    method: str, models: tuple[Path, Path], lora: Lora, optimizer: Optimizer
) -> None:
    p = params(lora, optimizer, method=method, ptx_coef=0.5, ptx_batch=2)
    roles = load_roles(*models, p, CPU)
    probe = pack([Example.of_response([5, 6, 7], [8, 9, 2])])
    before = [
        value.detach().clone()
        for value in (
            roles.policy.logprobs(probe),
            roles.value_model.values(probe),
            roles.ref_policy.logprobs(probe),
            roles.reward_model.scores(probe),
        )
    ]
    summary, logged = run(roles, p, [Example.of_response([5], [9, 9, 2]), Example.of_response([6, 7], [8, 2])])
    assert logged[0]["objective/kl"] == 0.0
    assert all(math.isfinite(value) for metrics in logged for value in metrics.values())
    assert summary["steps"] == 2
    assert not torch.equal(roles.policy.logprobs(probe), before[0])
    assert not torch.equal(roles.value_model.values(probe), before[1])
    assert torch.equal(roles.ref_policy.logprobs(probe), before[2]), "the reference is still the original one"
    assert torch.equal(roles.reward_model.scores(probe), before[3])


def test_ptx_joins_the_same_optimizer_step_at_its_scale(
    models: tuple[Path, Path], lora: Lora, optimizer: Optimizer
) -> None:
    """The gradient that PTX adds to the step is ptx_coef times the supervised one, by the model's own attention."""
    from chatloom.ppo import loop

    p = params(lora, optimizer, method="full", ptx_coef=0.25, ptx_batch=2)
    roles = load_roles(*models, p, CPU)
    ptx = [Example.of_response([5], [9, 9, 2]), Example.of_response([6, 7], [8, 2])]
    totals: dict[str, float] = dict.fromkeys(["ptx/loss"], 0.0)
    loop._backward_ptx(roles, ptx, p, totals, step=1)
    actual = [parameter.grad.clone() for parameter in roles.policy.parameters() if parameter.grad is not None]

    model = load_on(models[0], CPU).model.requires_grad_(True)
    model.set_attn_implementation("eager")
    losses = []
    for example in ptx:
        logits = model(torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
        losses += [-logits[t - 1, token] for t, token in enumerate(example.input_ids) if example.loss_mask[t]]
    (0.25 * torch.stack(losses).mean()).backward()
    expected = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(actual) == len(expected) > 0
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_microbatches_do_not_change_the_update(models: tuple[Path, Path], lora: Lora, optimizer: Optimizer) -> None:
    results = []
    for batch_size in (1, 4):
        p = params(lora, optimizer, batch_size=batch_size, num_minibatches=1, ppo_epochs=1, num_steps=1)
        roles = load_roles(*models, p, CPU)
        run(roles, p)
        results.append([parameter.detach().clone() for parameter in roles.policy.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


def test_a_policy_that_is_not_its_reference_is_refused(
    models: tuple[Path, Path], lora: Lora, optimizer: Optimizer
) -> None:
    p = params(lora, optimizer)
    roles = load_roles(*models, p, CPU)
    for parameter in roles.policy.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    with pytest.raises(InputError, match="before the first update the mean absolute KL to the reference"):
        run(roles, p)


def test_a_loss_that_is_not_finite_stops_the_run(models: tuple[Path, Path], lora: Lora, optimizer: Optimizer) -> None:
    p = params(lora, optimizer)
    roles = load_roles(*models, p, CPU)
    assert roles.reward_model.head is not None
    roles.reward_model.head.bias.fill_(float("nan"))
    with pytest.raises(InputError, match=r"train_ppo: the loss is nan at step 1; lower train_ppo\.optimizer\.lr"):
        run(roles, p)


def test_ppo_reaches_the_optimum_of_a_toy(chat_roles: Roles, lora: Lora, optimizer: Optimizer) -> None:
    """The reward is 1 for a token whose number ends in 2 (a tenth of them) and 0 otherwise; the optimum is 1."""
    p = params(
        lora,
        optimizer.model_copy(update={"lr": 2e-2, "max_grad_norm": 1.0}),
        method="full",
        num_steps=40,
        rollout_batch=32,
        generation_batch=32,
        batch_size=32,
        num_minibatches=1,
        ppo_epochs=4,
        max_new_tokens=1,
        temperature=1.0,
        missing_stop_penalty=0.0,
        gamma=1.0,
        lam=1.0,
        value_lr=1e-2,
        kl=Kl(init_coef=0.0, target=None, horizon=100),
    )
    summary, _ = run(chat_roles, p)
    assert summary["objective/score_last"] >= 0.95


@pytest.fixture
def chat_roles(checkpoint: Path) -> Roles:
    class FirstTokenReward(Role):
        def scores(self, packed: object, below: object = None) -> Tensor:
            targets = packed.targets.split(packed.num_predicted)  # type: ignore[attr-defined]
            return torch.tensor([float(int(row[0]) % 10 == 2) for row in targets])

    device = Device(torch.device("cpu"), torch.float32)
    chat = load_on(checkpoint, device)
    head = ScalarHead(chat.model.config.hidden_size, torch.Generator().manual_seed(0))
    policy = Role(load_on(checkpoint, device).model.requires_grad_(True))
    value = Role(load_on(checkpoint, device).model.requires_grad_(True), None, head)
    return Roles(policy, Role(chat.model), FirstTokenReward(chat.model, None, head), value, chat)
