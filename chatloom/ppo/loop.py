"""PPO with a PTX loss (Ouyang 2022): rollout -> experience -> update -> log."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import chain, islice
from typing import TypeVar

import torch
from torch import Tensor

from chatloom.batches import chunks, microbatches
from chatloom.config import TrainPpoParams
from chatloom.data.examples import Example
from chatloom.data.prepared import PreparedRow
from chatloom.optim import ParameterGroup, Updates, lr_factor, require_finite
from chatloom.packing import Packed, pack
from chatloom.parallel.ranks import ALONE, Ranks
from chatloom.parallel.strategies import open_updates
from chatloom.ppo import guards
from chatloom.ppo.experience import Experience, Rollout, make_experience, roll_out
from chatloom.ppo.kl import KlController, k3
from chatloom.ppo.losses import policy_loss, value_loss
from chatloom.ppo.preflight import require_first_step_parity
from chatloom.ppo.roles import Roles, set_aside
from chatloom.progress import Log, progress
from chatloom.resume import Checkpoints, weights_hash

T = TypeVar("T")
OnSamples = Callable[[int, Rollout, Experience], None]
OnHeldOut = Callable[[int, guards.Answers], None]


def train_ppo(
    roles: Roles,
    prompts: Sequence[list[int]],
    ptx: Sequence[Example],
    params: TrainPpoParams,
    log: Log,
    on_samples: OnSamples,
    checkpoints: Checkpoints | None = None,
    *,
    held_out: Sequence[PreparedRow] = (),
    on_held_out: OnHeldOut | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Train policy and value in place.

    With several ranks each samples, scores and learns from its share of the sequences. What is a number a token or less
    every rank has of all of them: so whitening, KL, its controller and the guards see the whole step on each.

    Args:
        roles, prompts, ptx, params, held_out: the same on every rank.
        prompts: templated prompts, drawn from anew each pass.
        ptx: supervised examples mixed into each optimizer step.
        log: called with (step, metrics) after each step; with 0 and what the reference answers before the first.
        on_samples: called every `params.sample_every` steps with what was sampled.
        checkpoints: where the state is saved and found again; None starts afresh and saves none.
        held_out: rows with a reference answer, looked at every `params.guards.held_out_every` steps.
        on_held_out: called with what they were answered, at each look and with 0 before the first step.
        ranks: who train it together.

    Raises:
        GuardStop: where a guard of `params.guards` whose action is `stop` finds something; the state is saved then.
        InputError: where a loss or a gradient is not finite, before any weight is touched by it.
    """
    generator = torch.Generator().manual_seed(params.seed)
    ranks.require_same(
        params=lambda: [params],
        rows=lambda: chain(prompts, ptx, held_out),
        # One backbone, or two models.
        weights=lambda: [
            weights_hash(model) for model in dict.fromkeys((roles.policy.model, roles.reward_model.model))
        ],
    )
    groups = [
        ParameterGroup(roles.policy.parameters(), params.optimizer.lr),
        ParameterGroup(roles.value_model.parameters(), params.value_lr),
    ]
    optimizer = open_updates(groups, params.optimizer, params.parallel, ranks, roles.policy.model)
    controller = KlController.start(params.kl)
    heads = [role.head for role in (roles.reward_model, roles.value_model) if role.head is not None]
    done, history = 0, []
    # The reference is part of the key: KL to anything but the original SFT model would be another run.
    saved = checkpoints.load(reference=weights_hash(roles.ref_policy.model)) if checkpoints is not None else None
    if saved is not None:
        done, state = saved
        history, controller.coef = state["history"], state["kl_coef"]
        optimizer.load_state_dict(*state["optimizer"])
        generator.set_state(state["generator"])
        for head, weights in zip(heads, state["heads"], strict=True):
            head.load_state_dict(weights)
        if stop := guards.check(history, params.guards):
            raise stop  # what stopped it is still so: a retry must not go on step by step
    baseline = guards.answer(roles, roles.ref_policy, held_out, params, ranks) if held_out else None
    if baseline is not None and saved is None:
        log(0, guards.held_out_metrics(baseline, baseline))
        if on_held_out is not None:
            on_held_out(0, baseline)
    updates = done * params.ppo_epochs * params.num_minibatches
    prompt_batches = islice(_cycle(prompts, params.rollout_batch, params.seed), done, None)
    ptx_batches = islice(_cycle(ptx, params.ptx_batch, params.seed + 1), updates, None) if params.ptx_coef > 0 else None
    with progress("train_ppo", params.num_steps, done) as advance, checkpoints or nullcontext():
        for step in range(done + 1, params.num_steps + 1):
            started = time.monotonic()
            rollout = roll_out(roles, next(prompt_batches), params, generator, ranks)
            rolled_out = time.monotonic()
            experience = make_experience(roles, rollout, params, controller.coef, ranks)
            if step == 1:
                require_first_step_parity(roles, experience, params)
            scored = time.monotonic()
            factor = lr_factor(step - 1, params.num_steps, params.optimizer)
            with set_aside(roles, params.placement):
                update = _update(roles, experience, ptx_batches, params, optimizer, factor, generator, step, ranks)

            metrics = {**experience.metrics(), **update, "objective/kl_coef": controller.coef}
            controller.update(metrics["objective/kl"], len(rollout.responses))
            tokens, now = sum(map(len, rollout.responses)), time.monotonic()
            metrics |= {
                "time/rollout": rolled_out - started,
                "time/experience": scored - rolled_out,
                "time/update": now - scored,
                "time/tokens_per_s": tokens / (rolled_out - started),
            }
            if baseline is not None and step % params.guards.held_out_every == 0:
                answers = guards.answer(roles, roles.policy, held_out, params, ranks)
                metrics |= guards.held_out_metrics(answers, baseline)
                if on_held_out is not None:
                    on_held_out(step, answers)
            log(step, metrics)
            history.append(metrics)
            if step % params.sample_every == 0 or step in (1, params.num_steps):
                on_samples(step, rollout, experience)
            advance(
                policy_loss=metrics["policy/loss"],
                tokens_per_s=metrics["time/tokens_per_s"],
                score=metrics["objective/score"],
                kl=metrics["objective/kl"],
            )
            stop = guards.check(history, params.guards)
            if checkpoints is not None and (stop or checkpoints.due(step)):
                state = {
                    "history": history,
                    "kl_coef": controller.coef,
                    "optimizer": optimizer.state_dict(),
                    "generator": generator.get_state(),
                    "heads": [head.state_dict() for head in heads],
                }
                checkpoints.save(step, state)
            if stop:
                raise stop
    optimizer.finish()
    return _summary(history, params)


def _update(
    roles: Roles,
    experience: Experience,
    ptx_batches: Iterator[list[Example]] | None,
    params: TrainPpoParams,
    optimizer: Updates,
    factor: float,
    generator: torch.Generator,
    step: int,
    ranks: Ranks,
) -> dict[str, float]:
    """`ppo_epochs` passes over the experience; the metrics are means over all its tokens."""
    totals: dict[str, float] = defaultdict(float)
    norms = 0.0
    num_optimizer_steps = params.ppo_epochs * params.num_minibatches
    size = len(experience.examples) // params.num_minibatches
    lengths = [len(example.input_ids) for example in experience.examples]
    for _ in range(params.ppo_epochs):
        order = torch.randperm(len(experience.examples), generator=generator).tolist()
        for minibatch in chunks(order, size):
            num_tokens = sum(experience.examples[i].num_predicted for i in minibatch)
            for own in microbatches(minibatch, [lengths[i] for i in minibatch], params.batch_size, ranks):
                _backward_ppo(roles, experience, own, num_tokens, params, optimizer, totals, step)
            if ptx_batches is not None:
                _backward_ptx(roles, next(ptx_batches), params, optimizer, totals, step, ranks)
            norms += optimizer.step(factor, "train_ppo", step)
    totals = {name: ranks.sum(total) for name, total in totals.items()} | {"policy/grad_norm": norms}
    tokens = totals.pop("tokens")
    counted = {"policy/clip_frac", "policy/approx_kl", "policy/entropy", "value/clip_frac"}
    return {name: total / (tokens if name in counted else num_optimizer_steps) for name, total in totals.items()}


def _backward_ppo(
    roles: Roles,
    experience: Experience,
    rows: list[int],
    num_tokens: int,
    params: TrainPpoParams,
    optimizer: Updates,
    totals: dict[str, float],
    step: int,
) -> None:
    """Gradients of policy and value for some rows of a minibatch of `num_tokens` response tokens."""
    packed, below = experience.pack(rows, roles.policy.model)
    mask = experience.response_mask[rows]
    old_logprobs, advantages = experience.old_logprobs[rows][mask], experience.advantages[rows][mask]

    # One backward a role, right after its forward: both may live on one backbone, where one adapter is on at a time.
    logprobs, entropy = roles.policy.logprobs_and_entropy(packed, params.temperature, below)
    policy = policy_loss(logprobs, old_logprobs, advantages, params.clip_range)
    _backward(policy.loss / num_tokens, 1.0, optimizer, totals, "policy/loss", step)

    values = roles.value_model.values(packed, below)
    value = value_loss(values, experience.values[rows][mask], experience.returns[rows][mask], params.value_clip_range)
    _backward(value.loss / num_tokens, params.vf_coef, optimizer, totals, "value/loss", step)

    totals["policy/clip_frac"] += float(policy.clipped)
    totals["policy/approx_kl"] += float(k3(old_logprobs, logprobs.detach()).sum())
    totals["policy/entropy"] += float(entropy.sum())
    totals["value/clip_frac"] += float(value.clipped)
    totals["tokens"] += len(logprobs)


def _backward_ptx(
    roles: Roles,
    examples: list[Example],
    params: TrainPpoParams,
    optimizer: Updates,
    totals: dict[str, float],
    step: int,
    ranks: Ranks,
) -> None:
    """The gradient of ptx_coef * cross-entropy joins that of PPO in the same optimizer step."""
    num_tokens = sum(example.num_predicted for example in examples)
    own = ranks.share([len(example.input_ids) for example in examples])
    packed: Packed = pack([examples[i] for i in own], roles.chat.device)
    loss = -roles.policy.logprobs(packed).sum() / num_tokens
    _backward(loss, params.ptx_coef, optimizer, totals, "ptx/loss", step)


def _backward(loss: Tensor, coef: float, optimizer: Updates, totals: dict[str, float], name: str, step: int) -> None:
    """Add the gradient of coef * loss; the total counts the loss itself."""
    totals[name] += require_finite(loss, "train_ppo", step)
    optimizer.backward(coef * loss)


def _cycle(rows: Sequence[T], size: int, seed: int) -> Iterator[list[T]]:
    """Batches without end: every row once a pass, each pass in its own order."""
    generator = torch.Generator().manual_seed(seed)
    batch: list[T] = []
    while True:
        for i in torch.randperm(len(rows), generator=generator).tolist():
            batch.append(rows[i])
            if len(batch) == size:
                yield batch
                batch = []


def _summary(history: Sequence[dict[str, float]], params: TrainPpoParams) -> dict[str, float]:
    """First and last quarter of the run side by side: a single step's mean over a small batch is mostly noise."""
    quarter = max(len(history) // 4, 1)
    names = ("objective/score", "objective/kl", "objective/response_tokens", "objective/stopped", "policy/entropy")

    def mean(rows: Sequence[dict[str, float]], name: str) -> float:
        return sum(row[name] for row in rows) / len(rows)

    first = {f"{name}_first": mean(history[:quarter], name) for name in names}
    last = {f"{name}_last": mean(history[-quarter:], name) for name in names}
    seconds = sum(sum(row[f"time/{part}"] for part in ("rollout", "experience", "update")) for row in history)
    return {
        "steps": len(history),
        "tokens": round(sum(row["objective/response_tokens"] for row in history) * params.rollout_batch),
        **first,
        **last,
        "objective/kl_coef": history[-1]["objective/kl_coef"],
        "time/episodes_per_s": len(history) * params.rollout_batch / seconds,
        "time/tokens_per_s_mean": mean(history, "time/tokens_per_s"),
    }
