"""Rollouts with transformers' `generate`, batch after batch in the order that the rows have."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from bench.side import Rollouts, measure_rollouts, read_job


def main() -> None:
    job = read_job(Rollouts)
    torch.set_num_threads(job.threads)
    torch.manual_seed(job.seed)
    model = AutoModelForCausalLM.from_pretrained(job.checkpoint, dtype=getattr(torch, job.dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(job.checkpoint, padding_side="left")
    declared = GenerationConfig.from_pretrained(job.checkpoint).eos_token_id
    stop = [declared] if isinstance(declared, int) else declared
    # What a call leaves open is filled from the model's own: so this is the model's own.
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=stop if job.natural else None,
        pad_token_id=tokenizer.pad_token_id,
    )

    def roll_out(prompts: list[list[int]], max_new_tokens: int) -> list[int]:
        lengths: list[int] = []
        for start in range(0, len(prompts), job.batch_size):
            batch = tokenizer.pad({"input_ids": prompts[start : start + job.batch_size]}, return_tensors="pt")
            output = model.generate(**batch, max_new_tokens=max_new_tokens)
            responses = output[:, batch["input_ids"].shape[1] :].tolist()
            lengths += [length(row, stop if job.natural else []) for row in responses]
        return lengths

    measure_rollouts(job, roll_out, torch.get_num_threads())


def length(row: list[int], stop: list[int]) -> int:
    """Tokens up to the first stop token, itself included; all where there is none."""
    return next((place for place, token in enumerate(row, start=1) if token in stop), len(row))


if __name__ == "__main__":
    main()
