"""SFT with TRL's SFTTrainer: completion-only, mixed bfloat16, everything that the job does not say at its default."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig
from trl import SFTConfig, SFTTrainer

from bench.peers.training import StepClock, common_settings, counting, lora_config
from bench.side import Row, Training, print_result, read_job, read_rows


def main() -> None:
    job = read_job(Training)
    rows = [tokens(row) for row in read_rows(job, job.num_rows)]
    steps = StepClock()
    counts: list[int] = []
    with tempfile.TemporaryDirectory() as output:
        trainer = SFTTrainer(
            model=job.checkpoint,
            args=SFTConfig(**common_settings(output, job), completion_only_loss=True),
            train_dataset=Dataset.from_list(rows),
            peft_config=lora_config(job, AutoConfig.from_pretrained(job.checkpoint).num_hidden_layers),
            callbacks=[steps],
        )
        trainer.data_collator = counting(trainer.data_collator, lambda row: len(row["input_ids"]), counts)
        done = trainer.train()
    print_result(
        work=sum(counts[1:]),
        unit="tokens",
        seconds=steps.clock.seconds,
        threads=torch.get_num_threads(),
        loss=done.training_loss,
        weights=str(next(trainer.model.parameters()).dtype),
    )


def tokens(row: Row) -> dict[str, Any]:
    prompt, response = row.prompt_ids, row.response_ids[0]
    return {"input_ids": prompt + response, "completion_mask": [0] * len(prompt) + [1] * len(response)}


if __name__ == "__main__":
    main()
