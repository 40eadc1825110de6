"""Reward training with TRL's RewardTrainer, everything that the job does not say at its default."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig
from trl import RewardConfig, RewardTrainer

from bench.peers.training import StepClock, common_settings, counting, lora_config
from bench.side import Row, Training, print_result, read_job, read_rows


def main() -> None:
    job = read_job(Training)
    pairs = [tokens(row) for row in read_rows(job, job.num_rows)]
    steps = StepClock()
    counts: list[int] = []
    with tempfile.TemporaryDirectory() as output:
        trainer = RewardTrainer(
            model=job.checkpoint,
            args=RewardConfig(**common_settings(output, job)),
            train_dataset=Dataset.from_list(pairs),
            peft_config=lora_config(job, AutoConfig.from_pretrained(job.checkpoint).num_hidden_layers),
            callbacks=[steps],
        )
        trainer.data_collator = counting(trainer.data_collator, lambda pair: 1, counts)
        done = trainer.train()
    print_result(
        work=sum(counts[1:]),
        unit="pairs",
        seconds=steps.clock.seconds,
        threads=torch.get_num_threads(),
        loss=done.training_loss,
        weights=str(next(trainer.model.parameters()).dtype),
    )


def tokens(row: Row) -> dict[str, Any]:
    """The row's best response over its worst."""
    return {
        "chosen_ids": row.prompt_ids + row.response_ids[0],
        "rejected_ids": row.prompt_ids + row.response_ids[-1],
    }


if __name__ == "__main__":
    main()
