"""Guards: histories made by hand, and held-out answers of the tiny model."""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from chatloom.config import Action, Guards, Lora, Optimizer
from chatloom.data.prepared import PreparedRow
from chatloom.errors import InputError
from chatloom.models.adapters import Role
from chatloom.models.checkpoint import ChatModel
from chatloom.models.head import ScalarHead
from chatloom.models.rollouts import native
from chatloom.ppo.guards import Answers, GuardStop, answer, check, held_out_metrics, paired_t
from chatloom.ppo.roles import Roles
from tests.test_ppo import params


def limits(**actions: Action) -> Guards:
    """Every guard off but those given."""
    off = {"kl": "off", "length_collapse": "off", "reward_hacking": "off", "engine_gap": "off"}
    numbers = {"window": 2, "max_kl": 50.0, "min_length_share": 0.3, "max_held_out_fall": 3.0, "max_engine_gap": 0.1}
    return Guards.model_validate(off | numbers | {"held_out_prompts": 2, "held_out_every": 1} | actions)


def history(
    *,
    kl: list[float] | None = None,
    tokens: list[float] | None = None,
    score: list[float] | None = None,
    held_out: dict[int, tuple[float, float]] | None = None,
    engine_gap: list[float] | None = None,
) -> list[dict[str, float]]:
    """Metrics of steps; `held_out` gives score_t and chrf_t of the steps at which they were measured."""
    num_steps = max(len(values or []) for values in (kl, tokens, score, engine_gap))
    rows = []
    for i in range(num_steps):
        row = {
            "objective/kl": (kl or [0.0] * num_steps)[i],
            "objective/response_tokens": (tokens or [10.0] * num_steps)[i],
            "objective/score": (score or [0.0] * num_steps)[i],
        }
        if held_out and i + 1 in held_out:
            row |= dict(zip(("held_out/score_t", "held_out/chrf_t"), held_out[i + 1], strict=True))
        if engine_gap:
            row["rollout/engine_gap"] = engine_gap[i]
        rows.append(row)
    return rows


def found(rows: list[dict[str, float]], wanted: Guards) -> bool:
    return check(rows, wanted) is not None


def test_kl_beyond_the_limit() -> None:
    wanted = limits(kl="stop")
    assert not found(history(kl=[1.0, 49.0, 50.0]), wanted)
    assert not found(history(kl=[51.0, 49.0]), wanted), "only the last step counts"
    stop = check(history(kl=[1.0, 50.5]), wanted)
    assert isinstance(stop, InputError), "which the stage turns into one line and exit status 1"
    for part in (
        "train_ppo.guards.kl",
        "50.5 nats",
        "max_kl = 50",
        "after step 2 with its state saved",
        "kl.init_coef",
        "'warn' to go on",
    ):
        assert part in str(stop)
    assert found(history(kl=[math.nan]), wanted)


def test_length_collapse_compares_the_first_and_the_last_steps() -> None:
    wanted = limits(length_collapse="stop")
    assert found(history(tokens=[20, 20, 6, 5.8]), wanted)  # 5.9 of 20 is under 0.3
    assert not found(history(tokens=[20, 20, 6.2, 5.8]), wanted)  # 6 of 20 is not
    assert not found(history(tokens=[20, 20, 20, 2]), wanted), "one short step is noise: 11 of 20"
    assert not found(history(tokens=[20, 20, 1]), wanted), "the two windows still overlap"
    assert not found(history(tokens=[2, 2, 40, 40]), wanted)


def test_reward_hacking_needs_a_rise_in_training_and_a_fall_outside() -> None:
    wanted = limits(reward_hacking="stop")
    rising = [0.0, 0.2, 0.6, 0.8]
    assert "likeness to reference answers fell by 3.5" in str(
        check(history(score=rising, held_out={2: (0.0, 0.0), 4: (1.0, -3.5)}), wanted)
    )
    assert "the reward model's score fell by 4" in str(check(history(score=rising, held_out={4: (-4.0, 1.0)}), wanted))
    assert found(history(score=rising, held_out={2: (0.0, -3.5)}), wanted), "the last measurement holds until the next"
    assert not found(history(score=rising, held_out={2: (0.0, -3.5), 4: (0.0, -1.0)}), wanted)
    assert not found(history(score=rising, held_out={4: (2.0, -2.9)}), wanted)
    assert not found(history(score=[0.8, 0.6, 0.2, 0.0], held_out={4: (0.0, -9.0)}), wanted), "nothing was gained"
    assert not found(history(score=rising), wanted), "never measured"


def test_an_engine_that_samples_from_something_else() -> None:
    wanted = limits(engine_gap="stop")
    assert not found(history(engine_gap=[0.02, 0.1]), wanted)
    assert not found(history(kl=[1.0, 2.0]), wanted), "the engine tells no logprobs"
    assert found(history(engine_gap=[0.02, 0.11]), wanted)
    assert found(history(engine_gap=[math.nan]), wanted)
    assert not found(history(engine_gap=[5.0, 0.02]), wanted), "only the last step counts"


def test_off_is_silent_and_warn_says_it_once(caplog: pytest.LogCaptureFixture) -> None:
    rows = history(kl=[1.0, 60.0, 70.0, 1.0, 80.0])
    with caplog.at_level(logging.WARNING):
        for step in range(1, 6):
            assert check(rows[:step], limits()) is None
        assert not caplog.records
        for step in range(1, 6):
            assert check(rows[:step], limits(kl="warn")) is None
    assert [record.message.split(":")[1].split(" the")[0] for record in caplog.records] == [" at step 2", " at step 5"]


def test_no_step_no_finding() -> None:
    assert check([], limits(kl="stop", length_collapse="stop", reward_hacking="stop")) is None


def test_the_decision_depends_on_the_history_alone() -> None:
    """So a resumed run, whose checkpoint holds it, stops where an uninterrupted one does."""
    rows, wanted = history(kl=[1.0, 10.0, 55.0]), limits(kl="stop")
    first, second = check(rows, wanted), check(copy.deepcopy(rows), wanted)
    assert isinstance(first, GuardStop)
    assert str(first) == str(second)


def test_paired_t_by_hand() -> None:
    # Differences 1, 2, 3: mean 2, standard deviation 1, standard error 1 / sqrt 3.
    assert paired_t([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == pytest.approx(2 * math.sqrt(3))
    assert paired_t([1.0, 2.0], [1.0, 2.0]) == 0
    assert paired_t([0.0, 1.0], [1.0, 2.0]) < -1000, "all alike is as sure as can be, and finite"
    metrics = held_out_metrics(
        Answers([[5], [6]], [1.0, 3.0], [10.0, 20.0], [0.5, 1.5]),
        Answers([[7], [8]], [0.0, 0.0], [20.0, 40.0], [0.0, 0.0]),
    )
    # Differences 1 and 3: mean 2, error 1. Differences -10 and -20: mean -15, error 5.
    assert metrics == pytest.approx(
        {"held_out/score": 2, "held_out/score_t": 2, "held_out/chrf": 15, "held_out/chrf_t": -3, "held_out/kl": 1}
    )


def test_held_out_answers_are_greedy_scored_and_compared(chat: ChatModel, lora: Lora, optimizer: Optimizer) -> None:
    head = ScalarHead(chat.model.config.hidden_size, torch.Generator().manual_seed(0))
    policy, scorer = Role(chat.model), Role(chat.model, None, head)
    roles = Roles(policy, policy, scorer, scorer, chat, native(2))
    rows = [PreparedRow(f"r{i}", "en", [], [5 + i, 6], [False, False], ["the tea"], [[9, 2]]) for i in range(3)]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    p = params(lora, optimizer)
    first = answer(roles, roles.policy, rows, p)
    assert torch.equal(torch.get_rng_state(), before), "a look at held-out rows must not change the run"
    assert first == answer(roles, roles.ref_policy, rows, p)

    answers = [greedy(chat, row.prompt_ids, p.max_new_tokens) for row in rows]
    model = eager(chat)
    for row, response, score in zip(rows, answers, first.scores, strict=True):
        with torch.no_grad():
            hidden = model.model(torch.tensor([row.prompt_ids + response])).last_hidden_state[0, -1]
        assert score == pytest.approx(float(head(hidden).detach()), abs=1e-4)
    texts = [chat.tokenizer.decode(response, skip_special_tokens=True).strip() for response in answers]
    own = [replace(row, responses=[text]) for row, text in zip(rows, texts, strict=True)]
    assert answer(roles, roles.policy, own, p).chrf == pytest.approx([100.0] * 3), "each is its own reference"
    assert max(first.chrf) < 50
    assert first.kl == [0.0] * 3, "the policy is its reference still"


def eager(chat: ChatModel) -> Any:
    model = copy.deepcopy(chat.model)
    model.set_attn_implementation("eager")
    return model


def greedy(chat: ChatModel, prompt: list[int], limit: int) -> list[int]:
    """The likeliest tokens, without a cache."""
    model, ids = eager(chat), list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + limit and ids[-1] not in chat.stop_ids:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]
