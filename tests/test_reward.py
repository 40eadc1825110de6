"""Reward training: the ranking loss, its normalisation, accuracy (rule 14)."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch

from chatloom.config import Lora, Optimizer, Parallel, TrainRewardParams, read_yaml
from chatloom.data.comparisons import (
    Comparison,
    imported,
    in_holdout,
    ranked_by_reference,
    read_comparisons,
    write_comparisons,
)
from chatloom.data.prepared import PreparedRow
from chatloom.models.adapters import Role, add_adapter
from chatloom.models.checkpoint import ChatModel
from chatloom.models.head import ScalarHead
from chatloom.reward import (
    accuracy,
    microbatch_loss,
    normalize,
    pair_margins,
    ranking_loss,
    score_comparisons,
    train_reward,
)
from tests.conftest import ROOT

CPU = torch.device("cpu")


def params(lora: Lora, optimizer: Optimizer, **changes: object) -> TrainRewardParams:
    values = {
        "method": "full",
        "lora": lora,
        "optimizer": optimizer,
        "parallel": Parallel(strategy="none", num_processes=1, tensor_size=1, hostfile=None),
        "batch_size": 2,
        "accumulation_steps": 1,
        "num_epochs": 12,
        "max_steps": None,
        "eval_every": 10,
        "eval_rows": 8,
        "activation_checkpointing": False,
        "checkpoint_every": 10,
        "seed": 0,
        "margin": 0.0,
        "centering": 0.0,
    }
    return TrainRewardParams.model_validate(read_yaml(ROOT / "params.yaml")["train_reward"] | values | changes)


def comparison(first: int, ranks: list[int], origin: str = "imported") -> Comparison:
    """One response a rank; a response's tokens tell its rank, so that there is something to learn."""
    ids = [[20 + rank, 30 + rank, 2] for rank in ranks]
    texts = [str(rank) for rank in ranks]
    message = [{"role": "user", "content": "q"}]
    return Comparison(f"c{first}", "en", message, [first, 6, 7], texts, ids, ranks, [origin] * len(ranks), False)


def test_ranking_loss_by_hand() -> None:
    scores = torch.tensor([1.0, 0.0, -1.0])
    # Pairs (0,1), (0,2), (1,2) of one prompt, weight 1/3: softplus(-1), softplus(-2), softplus(-1).
    softplus = [math.log1p(math.exp(-1)), math.log1p(math.exp(-2)), math.log1p(math.exp(-1))]
    index = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2])
    loss = ranking_loss(scores, *index, torch.full((3,), 1 / 3))
    assert float(loss) == pytest.approx(sum(softplus) / 3, abs=1e-6)
    # A margin of 1 moves every difference down by 1; centering adds (s_i + s_j)^2 = 1, 0, 1.
    shifted = [math.log1p(math.exp(0)), math.log1p(math.exp(-1)), math.log1p(math.exp(0))]
    full = ranking_loss(scores, *index, torch.full((3,), 1 / 3), margin=1.0, centering=0.1)
    assert float(full) == pytest.approx((sum(shifted) + 0.1 * 2) / 3, abs=1e-6)


def test_k_ranked_loss_equals_the_sum_over_pairs_one_by_one(chat: ChatModel, lora: Lora, optimizer: Optimizer) -> None:
    role = Role(chat.model, None, ScalarHead(chat.model.config.hidden_size, torch.Generator().manual_seed(0)))
    rows = [comparison(10, [0, 1, 2, 3]), comparison(11, [0, 1]), comparison(12, [0, 1, 1])]
    expected = 0.0
    for row in rows:
        scores = score_comparisons(role, [row], CPU)[0].tolist()
        pairs = [(i, j) for i, j in combinations(range(len(scores)), 2) if row.ranks[i] < row.ranks[j]]
        expected += sum(math.log1p(math.exp(scores[j] - scores[i])) for i, j in pairs) / len(pairs)
    actual = microbatch_loss(role, rows, params(lora, optimizer), CPU)
    assert float(actual.detach()) == pytest.approx(expected, abs=1e-5)


def test_one_pair_by_hand_on_the_heads_own_scores(chat: ChatModel, lora: Lora, optimizer: Optimizer) -> None:
    """The head reads one number of the last hidden state; the loss is a softplus of what eager attention has there."""
    head = ScalarHead(chat.model.config.hidden_size)
    head.weight.data = torch.zeros(chat.model.config.hidden_size).index_fill(0, torch.tensor([3]), 1.0)
    row = comparison(10, [0, 1])
    model = copy.deepcopy(chat.model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        scores = [
            float(model.model(torch.tensor([row.prompt_ids + ids])).last_hidden_state[0, -1, 3].double())
            for ids in row.response_ids
        ]
    loss = microbatch_loss(Role(chat.model, None, head), [row], params(lora, optimizer, margin=0.5), CPU)
    assert abs(scores[0] - scores[1]) > 0.01
    assert float(loss.detach()) == pytest.approx(math.log1p(math.exp(scores[1] - scores[0] + 0.5)), abs=1e-5)


def test_eight_microbatches_of_one_prompt_equal_one_of_eight(chat: ChatModel, lora: Lora, optimizer: Optimizer) -> None:
    """With unequal numbers of pairs, and an eps so large that Adam's step is minus the gradient itself."""
    rows = [comparison(100 + i, [0, 1, 2] if i % 2 else [0, 1]) for i in range(8)]
    descent = optimizer.model_copy(update={"lr": 1e6, "adam_eps": 1e6})
    ends = []
    for batch_size, accumulation_steps in ((8, 1), (1, 8)):
        head = ScalarHead(chat.model.config.hidden_size, torch.Generator().manual_seed(0))
        role = Role(copy.deepcopy(chat.model), None, head)
        p = params(
            lora, descent, batch_size=batch_size, accumulation_steps=accumulation_steps, max_steps=1, centering=0.1
        )
        train_reward(role, rows, [], p, CPU, lambda *_: None)
        ends.append([parameter.detach() for parameter in role.parameters()])
    for one, eight in zip(*ends, strict=True):
        torch.testing.assert_close(one, eight, atol=2e-6, rtol=1e-4)


def test_loss_is_float32_on_a_bfloat16_trunk(chat: ChatModel, lora: Lora, optimizer: Optimizer) -> None:
    role = Role(chat.model.to(torch.bfloat16), None, ScalarHead(chat.model.config.hidden_size))
    assert microbatch_loss(role, [comparison(10, [0, 1])], params(lora, optimizer), CPU).dtype == torch.float32


def test_head_starts_as_the_paper_says() -> None:
    """N(0, 1 / sqrt(h + 1)), offset 0 (Stiennon 2020): over 2**16 draws the deviation is known to 1 %."""
    head = ScalarHead(2**16, torch.Generator().manual_seed(0))
    assert float(head.weight.detach().std()) == pytest.approx(1 / 256, rel=0.01)
    assert float(head.weight.detach().mean()) == pytest.approx(0, abs=4 / 256 / 256)
    assert (float(head.offset.detach()), float(head.gain), float(head.bias)) == (0, 1, 0)


def test_only_sampled_responses_are_the_reference_of_the_scale(chat: ChatModel) -> None:
    head = ScalarHead(chat.model.config.hidden_size, torch.Generator().manual_seed(0))
    role = Role(chat.model, None, head)
    mixed = replace(comparison(10, [0, 1, 2]), origins=["reference", "sampled", "sampled"])
    rows = [comparison(9, [0, 1], "imported"), mixed, comparison(11, [0, 1], "sampled")]
    with torch.no_grad():
        assert normalize(role, rows, CPU) == 4
        imported_scores, mixed_scores, sampled_scores = score_comparisons(role, rows, CPU)
    reference = [*mixed_scores.tolist()[1:], *sampled_scores.tolist()]
    mean = sum(reference) / 4
    assert mean == pytest.approx(0, abs=1e-4)
    assert math.sqrt(sum((score - mean) ** 2 for score in reference) / 4) == pytest.approx(1, abs=1e-3)
    assert float(imported_scores.mean()) != pytest.approx(0, abs=1e-2)


def test_ties_are_no_pairs() -> None:
    assert comparison(1, [0, 1, 1]).pairs == [(0, 1), (0, 2)]
    assert comparison(1, [0, 0]).pairs == []
    assert len(comparison(1, [0, 1, 2, 3]).pairs) == 4 * 3 // 2


def test_scoring_a_comparison_reads_its_prompt_with_each_response() -> None:
    row = replace(comparison(1, [0, 1]), prompt_ids=[5, 6], response_ids=[[7, 8, 2], [2]])
    assert row.num_tokens == 2 + 3 + 2 + 1


def test_accuracy_counts_pairs_and_halves_ties() -> None:
    assert accuracy([[1.0, -1.0], [0.0], [2.0]]) == pytest.approx((1 + 0 + 0.5 + 1) / 4)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_training_learns_the_order_and_normalises(
    method: str, chat: ChatModel, lora: Lora, optimizer: Optimizer
) -> None:
    head = ScalarHead(chat.model.config.hidden_size, torch.Generator().manual_seed(0))
    role = Role(chat.model, None, head)
    if method == "lora":
        add_adapter(chat.model, "reward", lora, seed=0)
        role = Role(chat.model, "reward", head)
    rows = [comparison(100 + i, [0, 1, 2], "sampled") for i in range(8)]
    held_out = [comparison(200 + i, [0, 1, 2]) for i in range(4)]
    logged: list[tuple[int, dict[str, float]]] = []
    fast = optimizer.model_copy(update={"lr": 1e-2})
    metrics = train_reward(
        role, rows, held_out, params(lora, fast, method=method), CPU, lambda step, m: logged.append((step, dict(m)))
    )
    assert metrics["eval/accuracy"] == 1.0
    assert logged[0][0] == 0
    assert logged[0][1]["eval/accuracy"] < 1
    assert logged[-2][1]["train/loss"] < 0.2 < logged[1][1]["train/loss"]
    assert logged[1][1]["time/tokens_per_s"] > 0
    scores = torch.cat([s.detach() for s in score_comparisons(role, rows, CPU)])
    assert float(scores.mean()) == pytest.approx(0, abs=1e-4)
    assert float(scores.std(unbiased=False)) == pytest.approx(1, abs=1e-3)
    assert all(margin > 0 for row in pair_margins(role, held_out, CPU) for margin in row)


# --- comparisons ---


def row(*responses: str) -> PreparedRow:
    ids = [[ord(c) % 250 for c in text] for text in responses]
    message = [{"role": "user", "content": "q"}]
    return PreparedRow("r1", "zh", message, [1, 2], [False, False], list(responses), ids)


def test_samples_rank_below_the_reference_by_likeness() -> None:
    reference = row("今天天气很好，我们去公园散步吧。")
    samples = ["今天天气很好，我们去公园。", "hello", "今天天气很好，我们去公园。"]
    found = ranked_by_reference(reference, samples, [[1], [2], [1]], min_gap=1.0, include_reference=True, holdout=False)
    assert found is not None
    assert found.responses == [reference.responses[0], samples[0], "hello"], "a repeated sample counts once"
    assert found.ranks == [0, 1, 2]
    assert found.origins == ["reference", "sampled", "sampled"]


def test_samples_that_all_tie_make_no_comparison() -> None:
    found = ranked_by_reference(
        row("abc"), ["xyz", "uvw"], [[1], [2]], min_gap=5.0, include_reference=False, holdout=False
    )
    assert found is None


def test_comparisons_round_trip(tmp_path: object) -> None:
    from pathlib import Path

    folder = Path(str(tmp_path))
    rows = [imported(row("best", "worse", "worst"), holdout=True), comparison(5, [0, 1, 1])]
    write_comparisons(folder, rows)
    assert read_comparisons(folder) == rows


def test_holdout_is_by_hash_and_about_its_share() -> None:
    sides = [in_holdout(f"row-{i}", 0.2, seed=1) for i in range(2000)]
    assert sides == [in_holdout(f"row-{i}", 0.2, seed=1) for i in range(2000)]
    assert 0.17 < sum(sides) / 2000 < 0.23
    assert not any(in_holdout(f"row-{i}", 0.0, seed=1) for i in range(50))
