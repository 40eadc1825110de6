"""DVC stage `train_reward`: a reward model from comparisons, starting from SFT."""

from pathlib import Path

import torch

from chatloom.data.comparisons import read_comparisons
from chatloom.device import resolve_device
from chatloom.models.adapters import Role, add_adapter
from chatloom.models.checkpoint import load_on
from chatloom.models.head import ScalarHead
from chatloom.models.reward_model import ADAPTER, save_reward_model
from chatloom.parallel.strategies import require_available
from chatloom.reward import train_reward
from stages.run import stage

SFT, COMPARISONS = Path("models/sft"), Path("data/comparisons")


def main() -> None:
    with stage("train_reward") as run:
        params, runtime = run.params.train_reward, run.params.runtime
        require_available(params.parallel, "train_reward")
        device = resolve_device(runtime.device, runtime.dtype, runtime.num_threads)
        run.dataset(COMPARISONS, "comparisons")
        comparisons = read_comparisons(COMPARISONS)
        torch.manual_seed(params.seed)
        model = load_on(SFT, device).model
        if params.activation_checkpointing:
            model.activation_checkpointing_enable()
            model.train()
        head = ScalarHead(model.config.hidden_size, torch.Generator().manual_seed(params.seed)).to(device.device)
        reward_model = Role(model, None, head)
        if params.method == "lora":
            add_adapter(model, ADAPTER, params.lora, params.seed)
            reward_model = Role(model, ADAPTER, head)
        train = [comparison for comparison in comparisons if not comparison.holdout]
        held_out = [comparison for comparison in comparisons if comparison.holdout]
        metrics = train_reward(reward_model, train, held_out, params, device.device, run.log)
        with run.out("models/reward") as folder:
            save_reward_model(folder, reward_model, params.lora if params.method == "lora" else None, SFT)
        run.metrics(metrics)


if __name__ == "__main__":
    main()
