"""What the trainers of the peer share: settings, a clock on their steps, and the run of SFT and reward training."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig, TrainerCallback

from bench.side import Clock, Training, print_result


class StepClock(TrainerCallback):  # type: ignore[misc]
    """A trainer's steps on a `Clock`."""

    def __init__(self) -> None:
        self.clock = Clock()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.step_ends()


def train(
    job: Training,
    rows: list[dict[str, Any]],
    *,
    trainer: type[Any],
    config: type[Any],
    count: Callable[[Any], int],
    unit: str,
    **settings: Any,
) -> None:
    """Train over `rows` and print the result.

    Args:
        trainer: of the peer, and `config` the class of its arguments.
        count: units of work in a row.
        settings: of this kind of trainer alone.
    """
    steps = StepClock()
    counts: list[int] = []
    with tempfile.TemporaryDirectory() as output:
        run = trainer(
            model=job.checkpoint,
            args=config(**common_settings(output, job), **settings),
            train_dataset=Dataset.from_list(rows),
            peft_config=lora_config(job, AutoConfig.from_pretrained(job.checkpoint).num_hidden_layers),
            callbacks=[steps],
        )
        run.data_collator = counting(run.data_collator, count, counts)
        done = run.train()
    print_result(
        work=sum(counts[1:]),
        unit=unit,
        seconds=steps.clock.seconds,
        threads=torch.get_num_threads(),
        loss=done.training_loss,
        weights=str(next(run.model.parameters()).dtype),
    )


def common_settings(output: str, job: Training) -> dict[str, Any]:
    """The hyperparameters that both sides have, and nothing written or reported; the rest is the peer's default."""
    return {
        "output_dir": output,
        "use_cpu": True,
        "num_train_epochs": 1,
        "per_device_train_batch_size": job.batch_size,
        "learning_rate": job.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "max_length": job.max_length,
        "seed": job.seed,
        "save_strategy": "no",
        "report_to": "none",
        **job.trainer,
    }


def lora_config(job: Training, num_layers: int) -> LoraConfig | None:
    """The adapter of `job`, None where the whole model trains."""
    if job.method == "full":
        return None
    layers = job.lora["layers"]
    return LoraConfig(
        r=job.lora["rank"],
        lora_alpha=job.lora["alpha"],
        lora_dropout=0.0,
        target_modules=job.lora["target_modules"],
        layers_to_transform=None if layers is None else list(range(num_layers - layers, num_layers)),
    )


def counting(collator: Callable[[list[Any]], Any], count: Callable[[Any], int], counts: list[int]) -> Any:
    """`collator`, noting in `counts` what `count` says of each batch: padding is not in yet."""

    def collate(rows: list[Any]) -> Any:
        counts.append(sum(map(count, rows)))
        return collator(rows)

    return collate
