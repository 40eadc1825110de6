"""DVC stage `train_ppo`: PPO with a PTX loss against the reward model."""

from pathlib import Path

import torch

from chatloom.data.examples import Example
from chatloom.data.prepared import PreparedRow, read_split
from chatloom.device import resolve_device
from chatloom.errors import InputError
from chatloom.models import rollouts
from chatloom.models.adapters import merge_adapter
from chatloom.models.checkpoint import save_causal_lm
from chatloom.models.reward_model import read_probes
from chatloom.parallel.ranks import connect
from chatloom.parallel.strategies import require_runnable
from chatloom.ppo import preflight
from chatloom.ppo.experience import Experience, Rollout
from chatloom.ppo.guards import Answers
from chatloom.ppo.loop import train_ppo
from chatloom.ppo.roles import POLICY, load_roles
from stages.run import stage
from stages.training import start

SFT, REWARD = Path("models/sft"), Path("models/reward")
PROMPTS, PTX, EVAL = (Path("data/prepared", split) for split in ("ppo", "ptx", "eval"))
ROWS_SHOWN = 8
LOOKS = "held_out"
"""Table of what was answered to held-out prompts as the policy changed."""


def main() -> None:
    with stage("train_ppo") as run:
        params, runtime = run.params.train_ppo, run.params.runtime
        device = resolve_device(runtime.device, runtime.dtype, runtime.num_threads)
        require_runnable("train_ppo", params.method, params.parallel, device.device)
        rollouts.require_available(params.generation, device.device, "train_ppo.generation")
        prompts = [row.prompt_ids for row in read_split(PROMPTS)]
        ptx = [Example.of_row(row) for row in read_split(PTX)]
        for rows, path, needed in ((prompts, PROMPTS, True), (ptx, PTX, params.ptx_coef > 0)):
            if needed and not rows:
                raise InputError(f"{path} has no rows; give prepare_data.split_weights.{path.name} a larger share")
        run.dataset(PROMPTS, "ppo")
        run.dataset(PTX, "ptx")
        watched = held_out(params.guards.held_out_prompts) if params.guards.reward_hacking != "off" else []
        torch.manual_seed(params.seed)
        preflight.require_same_tokenizer(SFT, REWARD)
        preflight.require_same_base(REWARD, params.lora)
        longest_ptx = max((len(example.input_ids) for example in ptx), default=0)
        memory = preflight.estimate_memory(
            SFT, REWARD, params, device, longest_prompt=max(map(len, prompts)), longest_ptx=longest_ptx
        )
        preflight.require_memory(memory, preflight.available_memory(device.device), params)
        roles = load_roles(SFT, REWARD, params, device)
        preflight.require_own_pad_token(roles.chat)
        preflight.require_reward_parity(roles.reward_model, *read_probes(REWARD), device.device)

        def show(step: int, rollout: Rollout, experience: Experience) -> None:
            decode = roles.chat.tokenizer.decode
            prompts = rollout.prompts[:ROWS_SHOWN]
            run.table(
                "samples",
                {
                    "step": [step] * len(prompts),
                    "prompt": [decode(ids) for ids in prompts],
                    "response": [decode(ids) for ids in rollout.responses[:ROWS_SHOWN]],
                    "score": experience.scores[:ROWS_SHOWN].tolist(),
                    "kl": experience.kl[:ROWS_SHOWN].sum(1).tolist(),
                },
            )

        def keep(step: int, answers: Answers) -> None:
            run.table(
                LOOKS,
                {
                    "step": [step] * len(watched),
                    "question": [row.question for row in watched],
                    "response": roles.chat.tokenizer.batch_decode(answers.ids, skip_special_tokens=True),
                    "score": answers.scores,
                    "kl": answers.kl,
                    "prompt_ids": [row.prompt_ids for row in watched],
                    "response_ids": answers.ids,
                },
            )

        with connect("train_ppo", params.parallel, device.device) as ranks:
            checkpoints = run.checkpoints(params.checkpoint_every, ranks)
            metrics = train_ppo(
                roles,
                prompts,
                ptx,
                params,
                run.log,
                show,
                checkpoints,
                held_out=watched,
                on_held_out=keep,
                ranks=ranks,
            )
        if ranks.rank == 0:
            model = roles.policy.model
            if roles.policy.adapter is not None:
                model = merge_adapter(model, POLICY)
            with run.out("models/ppo") as folder:
                save_causal_lm(folder, model, SFT)
            # The gold reward model, which comes later, scores them too.
            run.report(f"train_ppo_{LOOKS}", run.rows(LOOKS))
        run.metrics(metrics)


def held_out(count: int) -> list[PreparedRow]:
    """Up to `count` eval rows with a reference answer, from all over the split."""
    rows = [row for row in read_split(EVAL) if row.responses]
    if len(rows) < 2:
        raise InputError(
            f"{EVAL} has {len(rows)} rows with an answer; give prepare_data.split_weights.eval a larger share, or set "
            "train_ppo.guards.reward_hacking to 'off'"
        )
    return rows[:: len(rows) // count or 1][:count]


if __name__ == "__main__":
    start("train_ppo", main)
