"""DVC stage `train_reward`: a reward model from comparisons, starting from SFT."""

from pathlib import Path

from chatloom.data.comparisons import read_comparisons
from chatloom.device import resolve_device
from chatloom.models.reward_model import new_reward_model, save_reward_model
from chatloom.parallel.ranks import connect
from chatloom.parallel.strategies import require_runnable
from chatloom.reward import train_reward
from stages.run import stage
from stages.training import start

SFT, COMPARISONS = Path("models/sft"), Path("data/comparisons")
NUM_PROBES = 8
"""Sequences whose scores travel with the model, for PPO to compare its own scoring with."""


def main() -> None:
    with stage("train_reward") as run:
        params, runtime = run.params.train_reward, run.params.runtime
        device = resolve_device(runtime.device, runtime.dtype, runtime.num_threads)
        require_runnable("train_reward", params.method, params.parallel, device.device)
        run.dataset(COMPARISONS, "comparisons")
        comparisons = read_comparisons(COMPARISONS)
        reward_model = new_reward_model(SFT, params, device)
        train = [comparison for comparison in comparisons if not comparison.holdout]
        held_out = [comparison for comparison in comparisons if comparison.holdout]
        with connect("train_reward", params.parallel, device.device) as ranks:
            checkpoints = run.checkpoints(params.checkpoint_every, ranks)
            metrics = train_reward(reward_model, train, held_out, params, device.device, run.log, checkpoints, ranks)
        if ranks.rank == 0:
            with run.out("models/reward") as folder:
                probes = [[*comparison.prompt_ids, *comparison.response_ids[0]] for comparison in train[:NUM_PROBES]]
                save_reward_model(folder, reward_model, params.lora if params.method == "lora" else None, SFT, probes)
        run.metrics(metrics)


if __name__ == "__main__":
    start("train_reward", main)
