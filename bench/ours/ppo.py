"""PPO with the project's own loop: adapters on one backbone, against an untrained reward model."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import torch

from bench.ours.training import StepLog, device_of, optimizer
from bench.presets import preset_params
from bench.side import Ppo, print_result, read_job, read_rows
from chatloom.config import TrainPpoParams
from chatloom.ppo.loop import train_ppo
from chatloom.ppo.roles import load_roles


def main() -> None:
    job = read_job(Ppo)
    defaults = preset_params(job.preset).train_ppo
    params = TrainPpoParams.model_validate(
        {
            **defaults.model_dump(),
            "method": "lora",
            "optimizer": optimizer(job.lr),
            "value_lr": job.lr,
            "num_steps": job.steps,
            "rollout_batch": job.batch_size,
            "generation_batch": job.batch_size,
            "ppo_epochs": job.ppo_epochs,
            "num_minibatches": 1,
            "batch_size": job.batch_size,
            "max_new_tokens": job.max_new_tokens,
            "temperature": 1.0,
            # The peer mixes no supervised rows in, and keeps its coefficient.
            "ptx_coef": 0.0,
            "kl": {**defaults.kl.model_dump(), "init_coef": 0.05, "target": None},
            "seed": job.seed,
        }
    )
    prompts = [row.prompt_ids for row in read_rows(job, job.num_prompts)]
    torch.manual_seed(job.seed)
    roles = load_roles(Path(job.checkpoint), Path(job.reward_model), params, device_of(job))
    if not job.natural:
        roles = replace(roles, chat=replace(roles.chat, stop_ids=()))
    log = StepLog("objective/kl", "objective/response_tokens")
    train_ppo(roles, prompts, [], params, log, lambda *_: None)
    print_result(
        work=job.batch_size * (job.steps - 1),
        unit="episodes",
        seconds=log.clock.seconds,
        threads=torch.get_num_threads(),
        response_tokens=statistics.fmean(log.values["objective/response_tokens"][1:]),
        first_kl=log.values["objective/kl"][0],
    )


if __name__ == "__main__":
    main()
