"""SFT with the project's own loop."""

from __future__ import annotations

import statistics
from pathlib import Path

import torch

from bench.ours.arithmetic import matmul_flops_per_s, model_flops
from bench.ours.training import StepLog, device_of, training_values
from bench.presets import preset_params
from bench.side import Training, print_result, read_job, read_rows
from chatloom.batches import steps
from chatloom.config import TrainSftParams
from chatloom.data.examples import Example
from chatloom.models.adapters import trainable
from chatloom.sft import train_sft


def main() -> None:
    job = read_job(Training)
    params = TrainSftParams.model_validate(training_values(job, preset_params(job.preset).train_sft.model_dump()))
    device = device_of(job)
    examples = [Example.of_response(row.prompt_ids, row.response_ids[0]) for row in read_rows(job, job.num_rows)]
    policy = trainable(Path(job.checkpoint), "sft", params, device)
    log = StepLog("train/loss")

    before = matmul_flops_per_s(device.dtype)
    train_sft(policy, examples, {}, params, device.device, log)
    after = matmul_flops_per_s(device.dtype)

    timed = [example for step in list(steps(examples, params))[1:] for rows in step for example in rows]
    details = {"flops": model_flops(policy.model, timed)} if job.method == "full" else {}
    print_result(
        work=sum(len(example.input_ids) for example in timed),
        unit="tokens",
        seconds=log.clock.seconds,
        threads=torch.get_num_threads(),
        loss=statistics.fmean(log.values["train/loss"]),
        matmul_flops_per_s=(before + after) / 2,
        parameters=sum(p.numel() for p in policy.model.parameters()),
        **details,
    )


if __name__ == "__main__":
    main()
