"""Reward training with TRL's RewardTrainer, everything that the job does not say at its default."""

from __future__ import annotations

from typing import Any

from trl import RewardConfig, RewardTrainer

from bench.peers.training import train
from bench.side import Row, Training, read_job, read_rows


def main() -> None:
    job = read_job(Training)
    pairs = [tokens(row) for row in read_rows(job, job.num_rows)]
    train(job, pairs, trainer=RewardTrainer, config=RewardConfig, count=lambda pair: 1, unit="pairs")


def tokens(row: Row) -> dict[str, Any]:
    """The row's best response over its worst."""
    return {
        "chosen_ids": row.prompt_ids + row.response_ids[0],
        "rejected_ids": row.prompt_ids + row.response_ids[-1],
    }


if __name__ == "__main__":
    main()
