"""Rollouts with the project's own engine."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from bench.ours.training import device_of
from bench.side import Rollouts, print_result, read_job, read_rows
from chatloom.models.checkpoint import load_on
from chatloom.models.generation import generate
from chatloom.models.sampling import Sampling


def main() -> None:
    job = read_job(Rollouts)
    prompts = [row.prompt_ids for row in read_rows(job, job.num_prompts)]
    chat = load_on(Path(job.checkpoint), device_of(job))
    generator = torch.Generator().manual_seed(job.seed)

    def roll_out(rows: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        return generate(
            chat.model,
            rows,
            Sampling(max_new_tokens, temperature=1.0),
            stop_ids=chat.stop_ids if job.natural else (),
            generator=generator,
            batch_size=job.batch_size,
        )

    roll_out(prompts[: job.batch_size], 4)  # warms up
    started = time.perf_counter()
    responses = roll_out(prompts, job.max_new_tokens)
    seconds = time.perf_counter() - started
    tokens = sum(map(len, responses))
    print_result(
        work=tokens,
        unit="tokens",
        seconds=seconds,
        threads=torch.get_num_threads(),
        response_tokens=tokens / len(responses),
    )


if __name__ == "__main__":
    main()
