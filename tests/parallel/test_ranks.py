"""Who takes which rows."""

from __future__ import annotations

from datetime import timedelta
from itertools import chain

import pytest
import torch

from chatloom.batches import microbatches, num_steps, steps
from chatloom.config import Parallel, TrainSftParams
from chatloom.device import own_gpu
from chatloom.errors import InputError
from chatloom.parallel.ranks import ALONE, Ranks, connect, shares
from tests.loopback import free_port
from tests.parallel.parity import train_sft_params


def test_shares_by_hand() -> None:
    """Dealt from the largest on: 9 and 4 to the first, 7 and 5 to the second, then 3, 2."""
    assert shares([5, 9, 2, 7, 4, 3], 2) == [[1, 4, 5], [0, 2, 3]]
    assert shares([5, 9, 2, 7, 4, 3], 1) == [[0, 1, 2, 3, 4, 5]]
    assert shares([1], 3) == [[0], [], []]


def test_a_process_loads_its_model_on_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long before the processes are connected: all on the first one would not fit."""
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_gpu() == torch.device("cuda", 3)
    monkeypatch.delenv("LOCAL_RANK")
    assert own_gpu() == torch.device("cuda", 0)


def test_every_rank_has_as_many_microbatches() -> None:
    found = [microbatches("abcde", [1] * 5, 2, Ranks(rank, 2)) for rank in (0, 1)]
    assert found == [[["a", "d"], ["e"]], [["b", "c"], []]]


@pytest.mark.parametrize("size", [2, 4])
def test_a_step_has_the_same_rows_whatever_the_number_of_ranks(size: int) -> None:
    rows = list(range(37))
    alone = list(steps(rows, params(1)))
    shared = [list(steps(rows, params(size), Ranks(rank, size), lambda row: row % 7 + 1)) for rank in range(size)]
    assert len(alone) == num_steps(37, params(size), Ranks(0, size)) == 10
    for number, whole in enumerate(alone):
        parts = [of_rank[number] for of_rank in shared]
        assert len({len(part) for part in parts}) == 1
        assert sorted(chain(*chain(*parts))) == sorted(chain(*whole))
    for first in (0, 5):
        epoch = [row for of_rank in shared for step in of_rank[first : first + 5] for micro in step for row in micro]
        assert sorted(epoch) == rows


def params(size: int) -> TrainSftParams:
    return train_sft_params("full", "ddp" if size > 1 else "none", size).model_copy(
        update={"num_epochs": 2, "max_steps": None}
    )


def test_alone_nothing_is_sent() -> None:
    assert ALONE.sum(0.1) == 0.1
    assert ALONE.gather("a") == ["a"]
    assert ALONE.spread(["a", "b"], [1, 2], lambda own: [item * 2 for item in own]) == ["aa", "bb"]
    ALONE.require_same(what=lambda: pytest.fail("nobody to compare with"))


def test_another_number_of_processes_than_params_say_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    two = Parallel(strategy="ddp", num_processes=2, tensor_size=1, hostfile=None)
    with (
        pytest.raises(InputError, match=r"train_sft\.parallel\.num_processes = 2, and 3 processes were started"),
        connect("train_sft", two, torch.device("cpu")),
    ):
        pass


@pytest.mark.parametrize("rank", ["0", "1"])
def test_ranks_that_do_not_come_are_told_where_they_were_waited_for(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    port = str(free_port())
    environment = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("chatloom.parallel.ranks.MEETING", timedelta(seconds=1))
    two = Parallel(strategy="ddp", num_processes=2, tensor_size=1, hostfile=None)
    with (
        pytest.raises(InputError, match=rf"rank {rank} did not meet all 2 ranks at 127\.0\.0\.1:{port} within 1 s"),
        connect("train_sft", two, torch.device("cpu")),
    ):
        pass
