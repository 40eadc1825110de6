"""DVC stage `train_reward`: a reward model from comparisons, starting from SFT."""

from pathlib import Path

from chatloom.data.comparisons import read_comparisons
from chatloom.device import resolve_device
from chatloom.models.reward_model import new_reward_model, save_reward_model
from chatloom.parallel.strategies import require_available
from chatloom.reward import train_reward
from stages.run import stage

SFT, COMPARISONS = Path("models/sft"), Path("data/comparisons")
NUM_PROBES = 8
"""Sequences whose scores travel with the model, for PPO to compare its own scoring with."""


def main() -> None:
    with stage("train_reward") as run:
        params, runtime = run.params.train_reward, run.params.runtime
        require_available(params.parallel, "train_reward")
        device = resolve_device(runtime.device, runtime.dtype, runtime.num_threads)
        run.dataset(COMPARISONS, "comparisons")
        comparisons = read_comparisons(COMPARISONS)
        reward_model = new_reward_model(SFT, params, device)
        train = [comparison for comparison in comparisons if not comparison.holdout]
        held_out = [comparison for comparison in comparisons if comparison.holdout]
        checkpoints = run.checkpoints(params.checkpoint_every)
        metrics = train_reward(reward_model, train, held_out, params, device.device, run.log, checkpoints)
        with run.out("models/reward") as folder:
            probes = [[*comparison.prompt_ids, *comparison.response_ids[0]] for comparison in train[:NUM_PROBES]]
            save_reward_model(folder, reward_model, params.lora if params.method == "lora" else None, SFT, probes)
        run.metrics(metrics)


if __name__ == "__main__":
    main()
