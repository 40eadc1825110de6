from __future__ import annotations

import math

import pytest
import torch

from chatloom.serving.logits import Penalties, keep_top, logprobs_of, penalize


def test_repetition_divides_what_is_likely_and_multiplies_what_is_not() -> None:
    logits = torch.tensor([2.0, -2.0, 0.0, 4.0, 1.0])
    penalize(logits, Penalties(repetition=2.0), [0, 1], {3: 5})
    assert logits.tolist() == [1.0, -4.0, 0.0, 2.0, 1.0]


def test_presence_once_frequency_as_often_as_it_came() -> None:
    logits = torch.tensor([2.0, -2.0, 0.0, 4.0, 1.0])
    penalize(logits, Penalties(presence=0.5, frequency=0.25), [0], {1: 1, 3: 4})
    # The prompt does not count: 0 stays. 1: -2 - 0.5 - 0.25; 3: 4 - 0.5 - 4 * 0.25.
    assert logits.tolist() == [2.0, -2.75, 0.0, 2.5, 1.0]


def test_before_the_first_token_only_the_prompt_is_there() -> None:
    logits = torch.tensor([2.0, 1.0])
    penalize(logits, Penalties(repetition=4.0, presence=1.0), [0], {})
    assert logits.tolist() == [0.5, 1.0]


@pytest.mark.parametrize(("count", "left"), [(1, [3]), (2, [1, 3]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])])
def test_top_k(count: int, left: list[int]) -> None:
    logits = torch.tensor([0.0, 2.0, -1.0, 5.0])
    keep_top(logits, count)
    assert [place for place, value in enumerate(logits.tolist()) if value != -math.inf] == left


def test_logprobs() -> None:
    # Odds of 1 : 2 : 5.
    told = logprobs_of(torch.tensor([1.0, 2.0, 5.0]).log().bfloat16().float(), 1, 2)
    assert math.exp(told.sampled) == pytest.approx(2 / 8, rel=1e-2)
    assert [token for token, _ in told.top] == [2, 1]
    assert math.exp(told.top[0][1]) == pytest.approx(5 / 8, rel=1e-2)
    assert logprobs_of(torch.zeros(4), 0, 0).top == ()
