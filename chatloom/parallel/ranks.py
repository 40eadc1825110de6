"""The processes that train one model together: who takes which rows, and what they tell each other."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from chatloom.config import Parallel
from chatloom.device import own_gpu
from chatloom.errors import InputError

T = TypeVar("T")
R = TypeVar("R")

MEETING = timedelta(minutes=10)
"""In which all ranks have to come together, whoever starts them."""
TIMEOUT = timedelta(minutes=30)
"""A rank that waits longer for the others gives up; one that died is noticed at once."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together. Alone, nothing is sent anywhere."""

    rank: int = 0
    size: int = 1
    tensor: int = 1
    """Neighbours that hold one model in slices: they take the same rows, which count once."""

    @property
    def data_rank(self) -> int:
        """Of those that take different rows."""
        return self.rank // self.tensor

    @property
    def data_size(self) -> int:
        return self.size // self.tensor

    def sum(self, value: float) -> float:
        """Over all ranks that take different rows; exact for counts below 2^53."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return total.item() / self.tensor

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return self.sum(flag) > 0

    def sum_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks; every rank ends with the same bits."""
        if self.size > 1:
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()

    def gather(self, value: T) -> list[T]:
        """What each rank brings, in their order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def share(self, sizes: Sequence[int]) -> list[int]:
        """Which of the items of these sizes are this rank's."""
        return shares(sizes, self.data_size)[self.data_rank]

    def spread(self, items: Sequence[T], sizes: Sequence[int], work: Callable[[list[T]], list[R]]) -> list[R]:
        """`work` done on all items, by each rank on its share; every rank gets all the results, in the items' order.

        Args:
            sizes: of each item, what it costs: tokens.
            work: one result an item.
        """
        own = self.share(sizes)
        done = work([items[i] for i in own]) if own else []
        assert len(done) == len(own), "one result an item"
        results: dict[int, R] = {}
        for part in self.gather(dict(zip(own, done, strict=True))):
            results |= part
        return [results[i] for i in range(len(items))]

    def require_same(self, **values: Callable[[], Iterable[object]]) -> None:
        """
        Args:
            values: by what they are; `repr` says everything of an item. Not asked for where there is one rank.

        Raises:
            InputError: on every rank, where they do not all bring the same value.
        """
        if self.size == 1:
            return
        for what, value in values.items():
            digest = hashlib.sha256()
            for item in value():
                digest.update(repr(item).encode())
            hashes = self.gather(digest.hexdigest())
            different = [rank for rank, other in enumerate(hashes) if other != hashes[0]]
            if different:
                raise InputError(
                    f"ranks 0 and {different[0]} have different {what}: every node needs the same files; share the "
                    "folder between the nodes, or copy it to each"
                )


ALONE = Ranks()


def shares(sizes: Sequence[int], num: int) -> list[list[int]]:
    """Indices of `sizes` in `num` parts whose lengths differ by one at most and whose sums are near each other.

    From the largest to the smallest they are dealt to and fro; each part keeps the order it found.
    """
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    parts: list[list[int]] = [[] for _ in range(num)]
    for place, i in enumerate(order):
        turn, seat = divmod(place, num)
        parts[num - 1 - seat if turn % 2 else seat].append(i)
    return [sorted(part) for part in parts]


@contextmanager
def connect(section: str, parallel: Parallel, device: torch.device) -> Iterator[Ranks]:
    """The ranks of `<section>.parallel`, connected while the block runs.

    A process finds the others by the environment that its launcher set (`chatloom.parallel.launch`).

    Raises:
        InputError: where there are not as many of them as `num_processes` says, or not all of them come.
    """
    if parallel.strategy == "none":
        yield ALONE
        return
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size != parallel.num_processes:
        raise InputError(
            f"{section}.parallel.num_processes = {parallel.num_processes}, and {size} processes were started; start "
            "the stage by its own command, or set WORLD_SIZE to that number"
        )
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(own_gpu())
        backend = "cpu:gloo,cuda:nccl"
    if "RANK" in os.environ:
        store, rank, size = _meet()
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    yield Ranks(dist.get_rank(), dist.get_world_size(), parallel.tensor_size)
    # After an error it is left to the end of the process: the other side may be gone.
    dist.destroy_process_group()


def _meet() -> tuple[Store, int, int]:
    """The store through which the ranks find each other, this one's rank, and their number, once all are there."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=MEETING)))
        store.set(f"here/{rank}", "yes")
        store.wait([f"here/{other}" for other in range(size)], MEETING)
    except dist.DistError as error:
        raise InputError(
            f"rank {os.environ['RANK']} did not meet all {os.environ['WORLD_SIZE']} ranks at {place} within "
            f"{MEETING.total_seconds():.0f} s; start the stage on every node, with the name of the first node, that "
            "the others can reach, as MASTER_ADDR"
        ) from error
    store.set_timeout(TIMEOUT)
    return PrefixStore("ranks", store), rank, size
