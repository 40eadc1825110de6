"""Rules 1, 2, 10 and 19: masks from lengths, positions, normalisation, packing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from chatloom.config import Optimizer
from chatloom.data.examples import Example
from chatloom.errors import InputError
from chatloom.models.adapters import Role
from chatloom.models.checkpoint import ChatModel
from chatloom.models.head import ScalarHead
from chatloom.optim import MasterAdamW, ParameterGroup
from chatloom.packing import pack
from chatloom.sft import sft_loss

EXAMPLES = [
    Example.of_response([5, 6, 7], [8, 9]),
    Example.of_response([10, 11], [12, 13, 14, 2]),
    Example.of_response([15, 16, 17, 18, 19], [2]),
]


def test_pack_lays_out_by_hand_computed_indices() -> None:
    packed = pack(EXAMPLES[:2])
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 2]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]]
    assert packed.lengths == (5, 6)
    assert packed.predictors.tolist() == [2, 3, 6, 7, 8, 9]
    assert packed.targets.tolist() == [8, 9, 12, 13, 14, 2]
    assert packed.last.tolist() == [4, 10]
    assert packed.rows(torch.arange(1, 7)).tolist() == [[1, 2, 0, 0], [3, 4, 5, 6]]


def oracle_logprobs(chat: ChatModel, example: Example) -> list[float]:
    """Each predicted token's log-probability, one sequence at a time, by the model's own eager attention."""
    model = copy.deepcopy(chat.model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        logits = model(torch.tensor([example.input_ids])).logits[0].double()
    found = []
    for t, predicted in enumerate(example.loss_mask):
        if predicted:
            row = logits[t - 1]
            found.append(float(row[example.input_ids[t]] - torch.log(torch.exp(row - row.max()).sum()) - row.max()))
    return found


def test_packed_logprobs_equal_those_of_each_sequence_alone(chat: ChatModel) -> None:
    expected = [value for example in EXAMPLES for value in oracle_logprobs(chat, example)]
    actual = Role(chat.model).logprobs(pack(EXAMPLES))
    torch.testing.assert_close(actual.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=0)


def test_neighbours_cannot_change_a_loss_or_a_score(chat: ChatModel) -> None:
    head = ScalarHead(chat.model.config.hidden_size, torch.Generator().manual_seed(0))
    role = Role(chat.model, None, head)
    alone, among = pack(EXAMPLES[:1]), pack([EXAMPLES[0], Example.of_response([200] * 30, [201] * 9)])
    torch.testing.assert_close(role.logprobs(alone), role.logprobs(among)[:2], atol=1e-6, rtol=0)
    torch.testing.assert_close(role.scores(alone), role.scores(among)[:1], atol=1e-6, rtol=0)
    torch.testing.assert_close(role.values(alone), role.values(among)[:2], atol=1e-6, rtol=0)


def test_score_is_read_at_the_last_token_even_if_it_is_the_pad_token(chat: ChatModel) -> None:
    head = ScalarHead(chat.model.config.hidden_size, torch.Generator().manual_seed(0))
    example = Example.of_response([5, 6], [7, chat.pad_id])
    hidden = chat.model.model(torch.tensor([example.input_ids]), attention_mask=torch.ones(1, 1, 4, 4).tril().bool())
    expected = head(hidden.last_hidden_state[0, 3])
    torch.testing.assert_close(Role(chat.model, None, head).scores(pack([example]))[0], expected, atol=1e-6, rtol=0)


def gradients(chat: ChatModel, sizes: list[int]) -> list[Tensor]:
    model = copy.deepcopy(chat.model)
    rows = EXAMPLES * 3
    total = sum(example.num_predicted for example in rows[: sum(sizes)])
    start = 0
    for size in sizes:
        sft_loss(Role(model), pack(rows[start : start + size]), total).backward()
        start += size
    return [p.grad for p in model.parameters()]


def test_eight_microbatches_of_one_equal_one_of_eight(chat: ChatModel) -> None:
    for one, eight in zip(gradients(chat, [8]), gradients(chat, [1] * 8), strict=True):
        torch.testing.assert_close(one, eight, atol=1e-6, rtol=1e-4)


def test_bfloat16_weights_keep_small_updates(optimizer: Optimizer) -> None:
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    adam = MasterAdamW([ParameterGroup([weight], 1e-4)], optimizer)
    for _ in range(100):
        weight.sum().backward()
        adam.step(1.0, "train_sft", 1)
    # Each step moves by lr = 1e-4; bfloat16 near 1 has steps of 2^-8 and would have stayed at 1.
    torch.testing.assert_close(weight.float(), torch.full((4,), 0.99), atol=2**-8, rtol=0)
    assert float(weight[0].detach()) < 1


def test_a_gradient_that_is_not_finite_changes_nothing(optimizer: Optimizer) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    adam = MasterAdamW([ParameterGroup([weight], 0.1)], optimizer)
    (weight.sum() * float("nan")).backward()
    with pytest.raises(InputError, match=r"train_sft: the gradient norm is nan at step 3; lower train_sft\.opt"):
        adam.step(1.0, "train_sft", 3)
    assert weight.tolist() == [1.0, 1.0]
