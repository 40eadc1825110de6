"""What every measured process shares: its job, its clock and its result.

The processes of the peers import this in environments of their own, so it needs nothing but the standard library.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

J = TypeVar("J", bound="Job")
PACKAGES = ("trl", "torch", "transformers", "peft", "accelerate", "datasets")


@dataclass(frozen=True, kw_only=True)
class Job:
    checkpoint: str
    """Folder of the model that both sides start from."""
    rows: str
    """JSON lines of `Row`: both sides get the same token ids."""
    preset: str
    """Of the project's params: our side has from it what the job does not say."""
    dtype: str
    threads: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Training(Job):
    """SFT and reward training, one epoch over the first `num_rows` rows."""

    num_rows: int
    batch_size: int
    """Rows of one optimizer step, in one microbatch."""
    lr: float
    method: str
    """`full` or `lora`."""
    lora: dict[str, Any]
    max_length: int
    """No row is longer; packing fills sequences up to it."""
    trainer: dict[str, Any]
    """More settings of the peer's trainer: empty means its defaults."""


@dataclass(frozen=True, kw_only=True)
class Rollouts(Job):
    num_prompts: int
    batch_size: int
    max_new_tokens: int
    natural: bool
    """Whether stop tokens end a response; otherwise each one has `max_new_tokens`."""


@dataclass(frozen=True, kw_only=True)
class Ppo(Rollouts):
    """`num_prompts` is all there are to draw from; a step draws `batch_size` of them."""

    reward_model: str
    """Folder of our untrained reward model; the peer makes its own from the checkpoint."""
    steps: int
    lr: float
    ppo_epochs: int


@dataclass(frozen=True)
class Row:
    prompt_ids: list[int]
    response_ids: list[list[int]]
    """Best first, each with its stop token."""


class Clock:
    """Seconds from the end of the first step to the end of the last: loading and warming up do not count."""

    def __init__(self) -> None:
        self._ends: list[float] = []

    def step_ends(self) -> None:
        self._ends.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        assert len(self._ends) > 1, "the first step warms up: at least two are needed"
        return self._ends[-1] - self._ends[0]


def read_job(kind: type[J]) -> J:
    """The job whose file is the process's one argument."""
    return kind(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))


def read_rows(job: Job, count: int) -> list[Row]:
    """The first `count` rows.

    Raises:
        ValueError: where there are fewer.
    """
    with Path(job.rows).open(encoding="utf-8") as file:
        rows = [Row(**json.loads(line)) for line, _ in zip(file, range(count), strict=False)]
    if len(rows) < count:
        raise ValueError(f"{job.rows} has {len(rows)} usable rows and {count} are needed; name a larger file")
    return rows


def print_result(*, work: float, unit: str, seconds: float, threads: int, **details: float | str) -> None:
    """The process's result as its last line of output.

    Args:
        work: units done in `seconds`.
        threads: that were really used for arithmetic.
    """
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {
        "work": work,
        "unit": unit,
        "seconds": seconds,
        "peak_bytes": peak,
        "threads": threads,
        "versions": versions,
        "details": details,
    }
    print(json.dumps(result, allow_nan=False), flush=True)


def measure_rollouts(job: Rollouts, roll_out: Callable[[list[list[int]], int], list[int]], threads: int) -> None:
    """Time `roll_out` on the job's prompts, once it has warmed up, and print the result.

    Args:
        roll_out: samples a response a prompt, each of so many tokens at most; their lengths, stop tokens included.
    """
    prompts = [row.prompt_ids for row in read_rows(job, job.num_prompts)]
    roll_out(prompts[: job.batch_size], 4)
    started = time.perf_counter()
    lengths = roll_out(prompts, job.max_new_tokens)
    seconds = time.perf_counter() - started
    tokens = sum(lengths)
    print_result(work=tokens, unit="tokens", seconds=seconds, threads=threads, response_tokens=tokens / len(lengths))
