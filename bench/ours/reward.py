"""Reward training with the project's own loop, on pairs."""

from __future__ import annotations

import statistics
from pathlib import Path

import torch

from bench.ours.training import StepLog, device_of, training_values
from bench.presets import preset_params
from bench.side import Row, Training, print_result, read_job, read_rows
from chatloom.batches import steps
from chatloom.config import TrainRewardParams
from chatloom.data.comparisons import IMPORTED, Comparison
from chatloom.models.reward_model import new_reward_model
from chatloom.reward import train_reward


def main() -> None:
    job = read_job(Training)
    values = training_values(job, preset_params(job.preset).train_reward.model_dump())
    params = TrainRewardParams.model_validate({**values, "margin": 0.0, "centering": 0.0})
    device = device_of(job)
    pairs = [comparison(row, number) for number, row in enumerate(read_rows(job, job.num_rows))]
    reward_model = new_reward_model(Path(job.checkpoint), params, device)
    log = StepLog("train/loss")
    train_reward(reward_model, pairs, [], params, device.device, log)
    timed = [pair for step in list(steps(pairs, params))[1:] for rows in step for pair in rows]
    print_result(
        work=len(timed),
        unit="pairs",
        seconds=log.clock.seconds,
        threads=torch.get_num_threads(),
        loss=statistics.fmean(log.values["train/loss"]),
    )


def comparison(row: Row, number: int) -> Comparison:
    """The row's best response over its worst."""
    return Comparison(
        id=str(number),
        lang="en",
        messages=[],
        prompt_ids=row.prompt_ids,
        responses=["", ""],
        response_ids=[row.response_ids[0], row.response_ids[-1]],
        ranks=[0, 1],
        origins=[IMPORTED, IMPORTED],
        holdout=False,
    )


if __name__ == "__main__":
    main()
