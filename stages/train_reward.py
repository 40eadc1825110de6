"""DVC stage `train_reward`: a reward model from comparisons, starting from SFT."""

from pathlib import Path

from chatloom.data.comparisons import read_comparisons
from chatloom.device import resolve_device
from chatloom.errors import InputError
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
    train("train_reward", "models/reward", gold=False)


def train(name: str, out: str, *, gold: bool) -> None:
    """Run the stage `name`, on the comparisons that are for the gold reward model or on the others."""
    with stage(name) as run:
        params, runtime = getattr(run.params, name), run.params.runtime
        device = resolve_device(runtime.device, runtime.dtype, runtime.num_threads)
        require_runnable(name, params.method, params.parallel, device.device)
        run.dataset(COMPARISONS, "comparisons")
        comparisons = read_comparisons(COMPARISONS)
        own = [comparison for comparison in comparisons if not comparison.holdout and comparison.gold == gold]
        held_out = [comparison for comparison in comparisons if comparison.holdout]
        if not own:
            change = "raise" if gold else "lower"
            raise InputError(
                f"{COMPARISONS} has no comparison for {name}; {change} compare.gold, or add preference data"
            )
        reward_model = new_reward_model(SFT, params, device)
        with connect(name, params.parallel, device.device) as ranks:
            checkpoints = run.checkpoints(params.checkpoint_every, ranks)
            metrics = train_reward(reward_model, own, held_out, params, device.device, run.log, checkpoints, ranks)
        if ranks.rank == 0:
            with run.out(out) as folder:
                probes = [[*comparison.prompt_ids, *comparison.response_ids[0]] for comparison in own[:NUM_PROBES]]
                save_reward_model(folder, reward_model, params.lora if params.method == "lora" else None, SFT, probes)
        run.metrics(metrics)


if __name__ == "__main__":
    start("train_reward", main)
