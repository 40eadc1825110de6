"""SFT with TRL's SFTTrainer: completion-only, mixed bfloat16, everything that the job does not say at its default."""

from __future__ import annotations

from typing import Any

from trl import SFTConfig, SFTTrainer

from bench.peers.training import train
from bench.side import Row, Training, read_job, read_rows


def main() -> None:
    job = read_job(Training)
    rows = [tokens(row) for row in read_rows(job, job.num_rows)]
    train(
        job,
        rows,
        trainer=SFTTrainer,
        config=SFTConfig,
        count=lambda row: len(row["input_ids"]),
        unit="tokens",
        completion_only_loss=True,
    )


def tokens(row: Row) -> dict[str, Any]:
    prompt, response = row.prompt_ids, row.response_ids[0]
    return {"input_ids": prompt + response, "completion_mask": [0] * len(prompt) + [1] * len(response)}


if __name__ == "__main__":
    main()
