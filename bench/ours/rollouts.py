"""Rollouts with the project's own engine."""

from __future__ import annotations

from pathlib import Path

import torch

from bench.ours.training import device_of
from bench.side import Rollouts, measure_rollouts, read_job
from chatloom.models.checkpoint import load_on
from chatloom.models.generation import generate
from chatloom.models.sampling import Sampling


def main() -> None:
    job = read_job(Rollouts)
    chat = load_on(Path(job.checkpoint), device_of(job))
    generator = torch.Generator().manual_seed(job.seed)

    def roll_out(prompts: list[list[int]], max_new_tokens: int) -> list[int]:
        responses = generate(
            chat.model,
            prompts,
            Sampling(max_new_tokens, temperature=1.0),
            stop_ids=chat.stop_ids if job.natural else (),
            generator=generator,
            batch_size=job.batch_size,
        )
        return [len(response) for response in responses]

    measure_rollouts(job, roll_out, torch.get_num_threads())


if __name__ == "__main__":
    main()
