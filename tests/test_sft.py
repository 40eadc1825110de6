"""The SFT loop (rules 10 and 18)."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from chatloom.batches import num_steps, steps
from chatloom.config import Lora, Optimizer, Parallel, Strategy, TrainSftParams, read_yaml
from chatloom.data.examples import Example
from chatloom.data.prepared import PreparedRow
from chatloom.errors import InputError
from chatloom.evaluation.perplexity import mean_loss
from chatloom.models.adapters import Role, add_adapter
from chatloom.models.checkpoint import ChatModel
from chatloom.optim import lr_factor
from chatloom.packing import pack
from chatloom.parallel.strategies import require_divisible, require_runnable
from chatloom.sft import sft_loss, train_sft
from tests.conftest import ROOT

CPU = torch.device("cpu")
EXAMPLES = [Example.of_response([5 + i, 6, 7], [20 + i, 21, 2]) for i in range(6)]


def params(lora: Lora, optimizer: Optimizer, **changes: object) -> TrainSftParams:
    values = {
        "method": "full",
        "lora": lora,
        "optimizer": optimizer.model_copy(update={"lr": 1e-2}),
        "parallel": Parallel(strategy="none", num_processes=1, tensor_size=1, hostfile=None),
        "batch_size": 2,
        "accumulation_steps": 2,
        "num_epochs": 20,
        "max_steps": None,
        "eval_every": 10,
        "eval_rows": 8,
        "activation_checkpointing": False,
        "checkpoint_every": 10,
        "seed": 0,
    }
    return TrainSftParams.model_validate(read_yaml(ROOT / "params.yaml")["train_sft"] | values | changes)


def test_loss_is_the_models_own_on_the_answers_tokens(chat: ChatModel) -> None:
    """transformers' own loss, by eager attention on padded rows with label -100 where nothing counts."""
    rows = [
        Example.of_response([5, 6, 7], [20, 21, 2]),
        Example([8, 9, 22, 2, 10, 23, 2], [False, False, True, True, False, True, True]),
        Example.of_response([11], [2]),
    ]
    width = max(len(row.input_ids) for row in rows)
    padding = [width - len(row.input_ids) for row in rows]
    labels = [
        [token if keep else -100 for token, keep in zip(row.input_ids, row.loss_mask, strict=True)] for row in rows
    ]
    model = copy.deepcopy(chat.model)
    model.set_attn_implementation("eager")
    expected = model(
        input_ids=torch.tensor([row.input_ids + [99] * n for row, n in zip(rows, padding, strict=True)]),
        attention_mask=torch.tensor([[1] * (width - n) + [0] * n for n in padding]),
        labels=torch.tensor([own + [-100] * n for own, n in zip(labels, padding, strict=True)]),
    ).loss
    num_tokens = sum(row.num_predicted for row in rows)
    actual = sft_loss(Role(chat.model), pack(rows), num_tokens)
    assert float(actual.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_training_lowers_the_loss_it_reports(method: str, chat: ChatModel, lora: Lora, optimizer: Optimizer) -> None:
    policy = Role(chat.model)
    if method == "lora":
        add_adapter(chat.model, "sft", lora, seed=0)
        policy = Role(chat.model, "sft")
    before = mean_loss(policy, EXAMPLES, CPU)
    assert before == pytest.approx(math.log(300), rel=0.1), "a random model knows nothing of 300 tokens"
    logged: list[tuple[int, dict[str, float]]] = []
    metrics = train_sft(
        policy,
        EXAMPLES,
        {"en": EXAMPLES},
        params(lora, optimizer, method=method),
        CPU,
        lambda s, m: logged.append((s, dict(m))),
    )
    assert metrics["eval/loss_en_before"] == pytest.approx(before)
    assert metrics["eval/loss_en"] == pytest.approx(mean_loss(policy, EXAMPLES, CPU))
    assert metrics["eval/loss_en"] < before - 0.05
    assert logged[0] == (0, {"eval/loss_en": metrics["eval/loss_en_before"]})
    assert [step for step, m in logged if "train/loss" in m] == list(range(1, 41))


def test_activation_checkpointing_changes_memory_and_not_the_result(
    chat: ChatModel, lora: Lora, optimizer: Optimizer
) -> None:
    other = copy.deepcopy(chat.model)
    other.activation_checkpointing_enable()
    other.train()
    ends = []
    for model in (chat.model, other):
        p = params(lora, optimizer, max_steps=3)
        train_sft(Role(model), EXAMPLES, {}, p, CPU, lambda *_: None)
        ends.append(mean_loss(Role(model), EXAMPLES, CPU))
    assert ends[0] == pytest.approx(ends[1], abs=1e-5)


def test_a_loss_that_is_not_finite_names_stage_step_and_remedy(
    chat: ChatModel, lora: Lora, optimizer: Optimizer
) -> None:
    before = chat.model.lm_head.weight.detach().clone()
    with torch.no_grad():
        chat.model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(InputError, match=r"train_sft: the loss is nan at step 1; lower train_sft\.optimizer\.lr"):
        train_sft(Role(chat.model), EXAMPLES, {}, params(lora, optimizer), CPU, lambda *_: None)
    assert torch.equal(chat.model.lm_head.weight, before)


def test_every_row_once_an_epoch_and_the_last_step_may_be_small(lora: Lora, optimizer: Optimizer) -> None:
    p = params(lora, optimizer, num_epochs=2)
    rows = list(range(7))
    made = list(steps(rows, p))
    assert len(made) == num_steps(7, p) == 4
    assert [[len(micro) for micro in step] for step in made] == [[2, 2], [2, 1], [2, 2], [2, 1]]
    first, second = ([row for step in made[i : i + 2] for micro in step for row in micro] for i in (0, 2))
    assert sorted(first) == sorted(second) == rows
    assert first != second
    assert made == list(steps(rows, p)), "the order comes from the seed"
    assert len(list(steps(rows, params(lora, optimizer, max_steps=3)))) == 3


def test_learning_rate_by_hand(optimizer: Optimizer) -> None:
    cosine = optimizer.model_copy(update={"warmup_steps": 2, "schedule": "cosine"})
    factors = [lr_factor(step, 6, cosine) for step in range(6)]
    assert factors == pytest.approx([1 / 3, 2 / 3, 1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])
    linear = optimizer.model_copy(update={"schedule": "linear"})
    assert [lr_factor(step, 4, linear) for step in range(4)] == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_earlier_assistant_turns_count_in_a_row() -> None:
    row = PreparedRow("r", "en", [], [1, 2, 3, 4], [False, True, True, False], ["a"], [[5, 6]])
    example = Example.of_row(row)
    assert example.input_ids == [1, 2, 3, 4, 5, 6]
    assert example.loss_mask == [False, True, True, False, True, True]


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (3, "tensor_size = 3 does not divide the model's 4 attention heads; give one that does"),
        (4, "tensor_size = 4 does not divide the model's 2 key and value heads"),
    ],
)
def test_a_tensor_size_that_does_not_fit_the_model_is_named(chat: ChatModel, size: int, message: str) -> None:
    require_divisible(chat.model.config, 2)
    with pytest.raises(InputError, match=message):
        require_divisible(chat.model.config, size)


@pytest.mark.parametrize(
    ("section", "method", "strategy", "message"),
    [
        ("train_ppo", "full", "colossalai_hybrid", r"PPO samples from whole weights, .* set colossalai_zero2"),
        ("train_reward", "lora", "colossalai_hybrid", r"'colossalai_hybrid' and train_reward\.method = 'lora'"),
        ("train_ppo", "full", "colossalai_gemini", r"PPO samples from whole weights, .* set colossalai_zero2"),
        ("train_sft", "lora", "colossalai_gemini", r"'colossalai_gemini' and train_sft\.method = 'lora'"),
        ("train_sft", "full", "colossalai_gemini_auto", r"there is no GPU; set colossalai_gemini"),
    ],
)
def test_a_strategy_that_cannot_run_is_refused(section: str, method: str, strategy: Strategy, message: str) -> None:
    runs = Parallel(strategy="colossalai_zero2", num_processes=4, tensor_size=1, hostfile=None)
    require_runnable(section, method, runs, CPU)
    size = 2 if strategy == "colossalai_hybrid" else 1
    with pytest.raises(InputError, match=message):
        require_runnable(section, method, runs.model_copy(update={"strategy": strategy, "tensor_size": size}), CPU)
