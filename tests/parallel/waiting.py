"""Processes that connect, say who they are, and wait for a signal; run by tests/parallel/test_launch.py."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

import torch

from chatloom.config import Parallel
from chatloom.files import atomic_file
from chatloom.parallel.launch import is_worker, run_worker, start_workers
from chatloom.parallel.ranks import connect

PARALLEL = Parallel(
    strategy="ddp",
    num_processes=2,
    tensor_size=1,
    hostfile=os.environ["WAITING_HOSTS"] or None,
)


def main() -> None:
    folder = Path(os.environ["WAITING_FOLDER"])
    asked = {signal.SIGUSR1, signal.SIGUSR2}
    signal.pthread_sigmask(signal.SIG_BLOCK, asked)
    with connect("waiting", PARALLEL, torch.device("cpu")) as ranks:
        put(folder / f"{ranks.rank}.pid", os.getpid())
        while True:
            # The first rank waits in a collective, as a rank does whose neighbour is slow.
            if ranks.rank > 0 and signal.sigwait(asked) == signal.SIGUSR1:
                raise ZeroDivisionError(f"in the middle of rank {ranks.rank}")
            total = ranks.sum(ranks.rank + 1)
            if ranks.rank == 0:
                put(folder / "sum", total)


def put(path: Path, value: float) -> None:
    """Whole or not there: the reader looks at any time."""
    with atomic_file(path) as temporary:
        temporary.write_text(str(value))


if __name__ == "__main__":
    if is_worker():
        run_worker(main)
    else:
        logging.basicConfig()
        sys.exit(start_workers("tests.parallel.waiting", PARALLEL))
