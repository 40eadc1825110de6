"""What ranks saved of an optimizer's state, put together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from chatloom.errors import InputError
from chatloom.optim import saved_state


def part(master: Tensor) -> dict[str, Any]:
    return {
        "masters": [master],
        "moments": {0: {"exp_avg": master, "exp_avg_sq": 2 * master, "step": torch.tensor(3.0)}},
    }


def test_slices_of_three_ranks_make_a_matrix() -> None:
    """Six numbers in slices of two; and four in slices of two, the last of which is only padding."""
    parts = [part(torch.tensor(numbers)) for numbers in ([0.0, 1.0], [2.0, 3.0], [4.0, 5.0])]
    master, moments = saved_state(parts, 0, torch.empty(2, 3))
    assert master.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert moments["exp_avg_sq"].tolist() == [[0, 2, 4], [6, 8, 10]]
    assert moments["step"] == 3
    master, _ = saved_state(parts, 0, torch.empty(2, 2))
    assert master.tolist() == [[0, 1], [2, 3]]


def test_a_rank_that_saved_nothing_is_passed_over() -> None:
    master, _ = saved_state([part(torch.ones(2, 2)), {"masters": [], "moments": {}}], 0, torch.empty(2, 2))
    assert master.tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize("numbers", [3, 9])
def test_a_state_of_another_model_is_refused(numbers: int) -> None:
    parts = [part(torch.ones(3)), part(torch.ones(3))]
    with pytest.raises(InputError, match=rf"another model: its parameter 0 has 6 numbers, this one's {numbers}; start"):
        saved_state(parts, 0, torch.empty(numbers))
    with pytest.raises(InputError, match=r"another model: its parameter 1 has 0 numbers, this one's 4; start"):
        saved_state(parts, 1, torch.empty(4))
