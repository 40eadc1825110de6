"""PPO with TRL's experimental PPOTrainer: policy, reference, reward and value as four models in bfloat16."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig
from trl.experimental.ppo import PPOConfig, PPOTrainer

from bench.peers.training import StepClock
from bench.side import Ppo, print_result, read_job, read_rows


def main() -> None:
    job = read_job(Ppo)
    rows = [{"input_ids": row.prompt_ids} for row in read_rows(job, job.num_prompts)]
    torch.manual_seed(job.seed)
    dtype = getattr(torch, job.dtype)
    tokenizer = AutoTokenizer.from_pretrained(job.checkpoint, padding_side="left")
    declared = GenerationConfig.from_pretrained(job.checkpoint).eos_token_id
    stop = declared if isinstance(declared, int) else declared[0]

    def scorer() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(job.checkpoint, num_labels=1, dtype=dtype)

    steps = StepClock()
    with tempfile.TemporaryDirectory() as output:
        trainer = PPOTrainer(
            args=PPOConfig(
                output_dir=output,
                use_cpu=True,
                total_episodes=job.steps * job.batch_size,
                per_device_train_batch_size=job.batch_size,
                gradient_accumulation_steps=1,
                num_mini_batches=1,
                num_ppo_epochs=job.ppo_epochs,
                response_length=job.max_new_tokens,
                stop_token_id=stop if job.natural else None,
                temperature=1.0,
                learning_rate=job.lr,
                lr_scheduler_type="constant",
                weight_decay=0.0,
                adam_beta2=0.95,
                kl_coef=0.05,
                seed=job.seed,
                num_sample_generations=0,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
            ),
            processing_class=tokenizer,
            model=AutoModelForCausalLM.from_pretrained(job.checkpoint, dtype=dtype),
            ref_model=AutoModelForCausalLM.from_pretrained(job.checkpoint, dtype=dtype),
            reward_model=scorer(),
            value_model=scorer(),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows[: job.batch_size]),
            callbacks=[steps],
        )
        trainer.train()
    print_result(
        work=job.batch_size * (job.steps - 1),
        unit="episodes",
        seconds=steps.clock.seconds,
        threads=torch.get_num_threads(),
        first_kl=next(row["objective/kl"] for row in trainer.state.log_history if "objective/kl" in row),
        weights=str(next(trainer.model.parameters()).dtype),
    )


if __name__ == "__main__":
    main()
