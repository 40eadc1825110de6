"""PPO as a whole: roles, experience and loop against double loops, eager attention and plain gradient descent."""

from __future__ import annotations

import copy
import dataclasses
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from chatloom.config import (
    Guards,
    Kl,
    Lora,
    Optimizer,
    Parallel,
    TrainPpoParams,
    load_preset,
    read_yaml,
    validate_params,
)
from chatloom.data.comparisons import Comparison
from chatloom.data.examples import Example
from chatloom.data.prepared import PreparedRow
from chatloom.errors import InputError
from chatloom.models.adapters import Role, add_adapter, merge_adapter
from chatloom.models.checkpoint import load_on
from chatloom.models.head import ScalarHead
from chatloom.models.reward_model import ADAPTER, save_reward_model, score_responses
from chatloom.packing import pack
from chatloom.ppo.experience import Rollout, make_experience, roll_out
from chatloom.ppo.guards import GuardStop
from chatloom.ppo.kl import along
from chatloom.ppo.loop import train_ppo
from chatloom.ppo.roles import Roles, load_roles
from chatloom.resume import Checkpoints
from chatloom.reward import score_comparisons
from tests.conftest import CPU, ROOT
from tests.test_ppo_maths import gae_oracle

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14, 15]]


def params(lora: Lora, optimizer: Optimizer, **changes: object) -> TrainPpoParams:
    values = {
        "method": "lora",
        "lora": lora,
        "optimizer": optimizer,
        "value_lr": 1e-3,
        "parallel": Parallel(strategy="none", num_processes=1, tensor_size=1, hostfile=None),
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
        "checkpoint_every": 10,
        "seed": 0,
    }
    return TrainPpoParams.model_validate(read_yaml(ROOT / "params.yaml")["train_ppo"] | values | changes)


def descent(p: TrainPpoParams) -> TrainPpoParams:
    """With so large an eps, Adam's first step is minus the gradient itself: its scale shows, not its sign alone."""
    huge = p.optimizer.model_copy(update={"lr": 1e6, "adam_eps": 1e6})
    return p.model_copy(update={"optimizer": huge, "value_lr": 1e6, "num_steps": 1, "ppo_epochs": 1})


def stopping(roles: Roles) -> Roles:
    """With a fifth of the vocabulary as stop tokens, the tokenizer's own EOS not among them: lengths differ."""
    eos = roles.chat.tokenizer.eos_token_id
    chat = dataclasses.replace(roles.chat, stop_ids=tuple(t for t in range(60) if t != eos))
    return dataclasses.replace(roles, chat=chat)


def reward_role(checkpoint: Path, lora: Lora) -> Role:
    """A LoRA reward model on `checkpoint`, not trained but no longer what it started as."""
    model = load_on(checkpoint, CPU, lora.base_bits).model
    add_adapter(model, ADAPTER, lora, seed=3)
    role = Role(model, ADAPTER, ScalarHead(model.config.hidden_size, torch.Generator().manual_seed(1)))
    for parameter in role.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7))
    assert role.head is not None
    role.head.normalize(torch.tensor([0.0, 0.5, 1.5]))
    return role


def make_reward_model(checkpoint: Path, folder: Path, lora: Lora) -> Path:
    """The same, saved."""
    folder.mkdir()
    save_reward_model(folder, reward_role(checkpoint, lora), lora, checkpoint)
    return folder


@pytest.fixture
def models(checkpoint: Path, tmp_path: Path, lora: Lora) -> tuple[Path, Path]:
    """An SFT checkpoint and a LoRA reward model on it."""
    return checkpoint, make_reward_model(checkpoint, tmp_path / "reward", lora)


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


@dataclasses.dataclass
class Row:
    """What one sequence should give, worked out alone, by the model's own eager attention, in float64."""

    old: list[float]
    ref: list[float]
    values: list[float]
    entropy: list[float]
    score: float
    exact_kl: float
    """Of the policy's next-token distributions from the reference's, summed over the response."""


def oracle_rows(roles: Roles, rollout: Rollout, temperature: float) -> list[Row]:
    def plain(role: Role) -> Any:
        model = merge_adapter(copy.deepcopy(role.model), role.adapter or "none")
        model.set_attn_implementation("eager")
        return model

    policy, ref, value, reward = map(plain, (roles.policy, roles.ref_policy, roles.value_model, roles.reward_model))
    assert roles.value_model.head is not None
    assert roles.reward_model.head is not None
    rows = []
    for prompt, response in zip(rollout.prompts, rollout.responses, strict=True):
        ids, first = torch.tensor([prompt + response]), len(prompt) - 1
        with torch.no_grad():
            logprobs = [(m(ids).logits[0].double() / temperature).log_softmax(-1) for m in (policy, ref)]
            values = roles.value_model.head(value.model(ids).last_hidden_state[0])
            score = roles.reward_model.head(reward.model(ids).last_hidden_state[0, -1])
        old, ref_own = ([float(lp[first + t, token]) for t, token in enumerate(response)] for lp in logprobs)
        entropy = [-float((logprobs[0][first + t].exp() * logprobs[0][first + t]).sum()) for t in range(len(response))]
        exact_kl = kl_divergence(*(Categorical(logits=lp[first:-1]) for lp in logprobs)).sum()
        rows.append(Row(old, ref_own, values[first:-1].tolist(), entropy, float(score), float(exact_kl)))
    return rows


def test_experience_equals_a_double_loop_over_sequences_and_tokens(
    models: tuple[Path, Path], lora: Lora, optimizer: Optimizer
) -> None:
    p = params(lora, optimizer, missing_stop_penalty=3.0)
    roles = stopping(load_roles(*models, p, CPU))
    for parameter in [*roles.policy.parameters(), *roles.value_model.parameters()]:
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(11))
    rollout = roll_out(roles, PROMPTS, p, torch.Generator().manual_seed(0))
    experience = make_experience(roles, rollout, p, kl_coef=0.2)
    assert sorted({len(response) for response in rollout.responses})[0] < p.max_new_tokens

    rows = oracle_rows(roles, rollout, p.temperature)
    advantages, returns = [], []
    for row, response in zip(rows, rollout.responses, strict=True):
        penalty = 0.0 if response[-1] in roles.chat.stop_ids else 3.0
        rewards = [-0.2 * (old - ref) for old, ref in zip(row.old, row.ref, strict=True)]
        rewards[-1] += row.score - penalty
        own = gae_oracle(rewards, row.values, p.gamma, p.lam)
        advantages.append(own)
        returns.append([a + v for a, v in zip(own, row.values, strict=True)])
    flat = [a for own in advantages for a in own]
    mean = sum(flat) / len(flat)
    std = math.sqrt(sum((a - mean) ** 2 for a in flat) / len(flat) + 1e-8)
    for i, row in enumerate(rows):
        length = len(row.old)
        for name, expected in {
            "old_logprobs": row.old,
            "ref_logprobs": row.ref,
            "values": row.values,
            "kl": [old - ref for old, ref in zip(row.old, row.ref, strict=True)],
            "advantages": [(a - mean) / std for a in advantages[i]],
            "returns": returns[i],
        }.items():
            actual = getattr(experience, name)[i]
            assert actual[:length].tolist() == pytest.approx(expected, abs=1e-3), name
            assert not actual[length:].any(), name

    exact_kl = along(roles.policy, roles.ref_policy, rollout.prompts, rollout.responses, p.temperature)
    assert min(exact_kl) > 1e-4
    assert exact_kl == pytest.approx([row.exact_kl for row in rows], rel=1e-3)

    scores = [row.score for row in rows]
    penalties = [0.0 if response[-1] in roles.chat.stop_ids else 3.0 for response in rollout.responses]
    assert 0 < sum(penalties) < 3.0 * len(rows), "some stopped and some did not"
    tokens = [r for own in returns for r in own]
    errors = [r - v for own, row in zip(returns, rows, strict=True) for r, v in zip(own, row.values, strict=True)]
    spread = sum((r - sum(tokens) / len(tokens)) ** 2 for r in tokens)
    assert experience.metrics() == pytest.approx(
        {
            "objective/score": sum(scores) / 4,
            "objective/score_with_penalty": (sum(scores) - sum(penalties)) / 4,
            "objective/kl": sum(sum(row.old) - sum(row.ref) for row in rows) / 4,
            "objective/kl_k3": sum(math.exp(r - o) - 1 + o - r for w in rows for o, r in zip(w.old, w.ref, strict=True))
            / 4,
            "objective/response_tokens": sum(map(len, rollout.responses)) / 4,
            "objective/stopped": penalties.count(0.0) / 4,
            "value/explained_variance": 1 - sum(e * e for e in errors) / spread,
        },
        abs=2e-3,
    )


def test_a_response_scores_the_same_in_reward_training_ppo_and_evaluation(
    models: tuple[Path, Path], lora: Lora, optimizer: Optimizer
) -> None:
    p = params(lora, optimizer)
    roles = load_roles(*models, p, CPU)
    rollout = roll_out(roles, PROMPTS, p, torch.Generator().manual_seed(0))
    expected = make_experience(roles, rollout, p, 0.1).scores.tolist()
    for prompt, response, score in zip(rollout.prompts, rollout.responses, expected, strict=True):
        comparison = Comparison("c", "en", [], prompt, ["x"], [response], [0], ["sampled"], False)
        assert score_comparisons(roles.reward_model, [comparison], CPU.device)[0].tolist() == pytest.approx(
            [score], abs=1e-5
        )
        assert score_responses(roles.reward_model, [prompt], [response]) == pytest.approx([score], abs=1e-5)


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
        shared.engine,
    )
    apart = make_experience(separate, rollout, p, 0.1)
    for name in ("old_logprobs", "ref_logprobs", "values", "scores", "advantages", "returns"):
        torch.testing.assert_close(getattr(together, name), getattr(apart, name), atol=2e-4, rtol=1e-3, msg=name)


def test_a_response_without_a_configured_stop_token_is_penalised(
    models: tuple[Path, Path], lora: Lora, optimizer: Optimizer
) -> None:
    """The tokenizer's EOS, where it is not among the configured stop tokens, neither ends a response nor saves it."""
    p = params(lora, optimizer, missing_stop_penalty=3.0)
    roles = load_roles(*models, p, CPU)
    eos = roles.chat.tokenizer.eos_token_id
    chat = dataclasses.replace(roles.chat, stop_ids=(8, 9))
    roles = dataclasses.replace(roles, chat=chat)
    rollout = Rollout([[5], [6], [7], [8]], [[10, eos], [10, 8], [eos, 9], [8, 10]], [False, True, True, False], None)
    assert make_experience(roles, rollout, p, 0.1).penalties.tolist() == [3.0, 0.0, 0.0, 3.0]

    roles = stopping(roles)
    rollout = roll_out(roles, PROMPTS * 4, p, torch.Generator().manual_seed(0))
    assert set(rollout.stopped) == {True, False}
    for response, stopped in zip(rollout.responses, rollout.stopped, strict=True):
        assert stopped == (response[-1] in roles.chat.stop_ids)
        assert stopped or len(response) == p.max_new_tokens
        assert not set(response[:-1]) & set(roles.chat.stop_ids)


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


def parameters_after_one_step(
    models: tuple[Path, Path], p: TrainPpoParams, ptx: list[Example] | None = None
) -> tuple[list[Tensor], list[dict[str, float]]]:
    """Of policy and value, after a single step of plain gradient descent."""
    roles = stopping(load_roles(*models, p, CPU))
    _, logged = run(roles, descent(p), ptx)
    assert logged[0]["objective/response_tokens"] < p.max_new_tokens, "lengths differ"
    return [w.detach().clone() for w in [*roles.policy.parameters(), *roles.value_model.parameters()]], logged


def test_ptx_joins_the_same_optimizer_step_at_its_scale(
    models: tuple[Path, Path], lora: Lora, optimizer: Optimizer
) -> None:
    """With PTX the one step that is taken moves the policy further by minus ptx_coef times the supervised gradient."""
    without = params(lora, optimizer, method="full", num_minibatches=1)
    ptx = [Example.of_response([5], [9, 9, 2]), Example.of_response([6, 7], [8, 2])]
    plain, _ = parameters_after_one_step(models, without)
    mixed, logged = parameters_after_one_step(
        models, without.model_copy(update={"ptx_coef": 0.25, "ptx_batch": 2}), ptx
    )

    model = load_on(models[0], CPU).model.requires_grad_(True)
    model.set_attn_implementation("eager")
    losses = []
    for example in ptx:
        logits = model(torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
        losses += [-logits[t - 1, token] for t, token in enumerate(example.input_ids) if example.loss_mask[t]]
    loss = torch.stack(losses).mean()
    loss.backward()
    expected = [w.grad for w in model.parameters()]
    for number, (a, b) in enumerate(zip(plain, mixed, strict=True)):
        moved = -0.25 * expected[number] if number < len(expected) else torch.zeros_like(a)  # the value model stays
        torch.testing.assert_close(b - a, moved, atol=1e-5, rtol=1e-3)
    assert logged[0]["ptx/loss"] == pytest.approx(float(loss.detach()), abs=1e-5)


def test_eight_microbatches_of_one_equal_one_of_eight(
    models: tuple[Path, Path], lora: Lora, optimizer: Optimizer
) -> None:
    first, *others = (
        parameters_after_one_step(models, params(lora, optimizer, batch_size=size, rollout_batch=8, num_minibatches=1))[
            0
        ]
        for size in (8, 3, 1)
    )
    start = load_roles(*models, params(lora, optimizer), CPU)
    assert any(not torch.equal(a, b) for a, b in zip(first, start.policy.parameters(), strict=False))
    for other in others:
        for a, b in zip(first, other, strict=True):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)


def test_metrics_of_an_update_are_means_over_response_tokens(
    models: tuple[Path, Path], lora: Lora, optimizer: Optimizer
) -> None:
    p = descent(params(lora, optimizer, num_minibatches=1))
    roles = stopping(load_roles(*models, p, CPU))
    before = dataclasses.replace(roles, policy=roles.ref_policy)
    seen: list[Rollout] = []
    logged: list[dict[str, float]] = []
    train_ppo(roles, PROMPTS, [], p, lambda _, m: logged.append(dict(m)), lambda _, rollout, __: seen.append(rollout))
    rows = oracle_rows(before, seen[0], p.temperature)
    entropies = [value for row in rows for value in row.entropy]
    assert len({len(row.entropy) for row in rows}) > 1, "a mean of means would be another number"
    assert logged[0]["policy/entropy"] == pytest.approx(sum(entropies) / len(entropies), abs=1e-4)
    # The one update is made at ratio 1: nothing is clipped, no KL to what was sampled, and advantages average to 0.
    for name in ("policy/approx_kl", "policy/clip_frac", "value/clip_frac", "policy/loss"):
        assert logged[0][name] == pytest.approx(0, abs=1e-5), name


@pytest.mark.parametrize("layers", [None, 1])
def test_training_on_a_shared_backbone_equals_training_separate_models(
    layers: int | None, checkpoint: Path, tmp_path: Path, lora: Lora, optimizer: Optimizer
) -> None:
    """With adapters on the upper layers only, too, where the roles share what lies below."""
    lora = lora.model_copy(update={"layers": layers})
    p = params(lora, optimizer, ptx_coef=0.3, ptx_batch=1)
    reward = make_reward_model(checkpoint, tmp_path / "reward", lora)
    shared, template = (load_roles(checkpoint, reward, p, CPU) for _ in range(2))

    def alone(role: Role) -> Role:
        return Role(copy.deepcopy(role.model), role.adapter, role.head)

    separate = Roles(
        alone(template.policy),
        alone(template.ref_policy),
        alone(template.reward_model),
        alone(template.value_model),
        template.chat,
        template.engine,
    )
    ptx = [Example.of_response([5], [9, 9, 2])]
    metrics = [run(roles, p, ptx)[1] for roles in (shared, separate)]
    for one, other in zip(*metrics, strict=True):
        for name in one.keys() - {key for key in one if key.startswith("time/")}:
            assert one[name] == pytest.approx(other[name], abs=1e-5), name
    for role in ("policy", "value_model"):
        for a, b in zip(getattr(shared, role).parameters(), getattr(separate, role).parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_params_have_the_eps_that_ppo_needs() -> None:
    for preset in [None, *(ROOT / "params").glob("*.yaml")]:
        values = read_yaml(ROOT / "params.yaml") if preset is None else load_preset(preset, ROOT / "params.yaml")
        assert validate_params(values, str(preset)).train_ppo.optimizer.adam_eps == 1e-5


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


def test_a_gradient_that_is_not_finite_stops_the_run(
    models: tuple[Path, Path], lora: Lora, optimizer: Optimizer
) -> None:
    p = params(lora, optimizer)
    roles = load_roles(*models, p, CPU)
    trained = [*roles.policy.parameters(), *roles.value_model.parameters()]
    before = [parameter.detach().clone() for parameter in trained]
    trained[0].register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
    with pytest.raises(InputError, match=r"train_ppo: the gradient norm is inf at step 1; lower train_ppo\.optimizer"):
        run(roles, p)
    assert all(torch.equal(a, b) for a, b in zip(trained, before, strict=True))


def test_a_guard_that_stops_has_the_state_saved_and_stops_a_retry_too(
    models: tuple[Path, Path], tmp_path: Path, lora: Lora, optimizer: Optimizer
) -> None:
    """At the first step whose KL is positive; held-out rows are looked at and do not change the run."""
    guards = Guards.model_validate(read_yaml(ROOT / "params.yaml")["train_ppo"]["guards"])
    p = params(lora, optimizer.model_copy(update={"lr": 1e-2}), num_steps=5, guards=guards)
    strict = guards.model_copy(update={"kl": "stop", "max_kl": 1e-4, "held_out_every": 1})
    rows = [PreparedRow(f"r{i}", "en", [], [5 + i, 6], [False, False], ["the tea"], [[9, 2]]) for i in range(2)]

    def run_to_the_end(p: TrainPpoParams, held_out: list[PreparedRow], folder: str) -> list[dict[str, float]]:
        logged: list[dict[str, float]] = []
        states = Checkpoints(tmp_path / folder, {}, every=100)
        silent = (lambda _, m: logged.append(dict(m)), lambda *_: None, states)
        with suppress(GuardStop):
            train_ppo(load_roles(*models, p, CPU), PROMPTS, [], p, *silent, held_out=held_out)
        return [{name: value for name, value in m.items() if not name.startswith("time/")} for m in logged]

    whole = run_to_the_end(p, [], "whole")
    watched = p.model_copy(update={"guards": strict})
    baseline, *stopped = run_to_the_end(watched, rows, "stopped")
    assert (baseline["held_out/score_t"], baseline["held_out/kl"]) == (0, 0)
    last = next(i for i, m in enumerate(whole) if m["objective/kl"] > 1e-4)
    assert 0 < last < 4 == len(whole) - 1
    assert "held_out/chrf_t" in stopped[-1]
    assert [{k: v for k, v in m.items() if not k.startswith("held_out/")} for m in stopped] == whole[: last + 1]
    assert run_to_the_end(watched, rows, "stopped") == [], "a retry stops at once"
    assert run_to_the_end(p, [], "stopped") == whole[last + 1 :], "and without the guard it goes on exactly"
