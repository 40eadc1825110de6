"""DVC stage `train_sft`: supervised fine-tuning of the base model."""

from collections.abc import Sequence
from pathlib import Path

from chatloom.data.examples import Example, Examples
from chatloom.data.prepared import PreparedRow, read_split
from chatloom.device import resolve_device
from chatloom.errors import InputError
from chatloom.models.adapters import merge_adapter, trainable
from chatloom.models.checkpoint import save_causal_lm
from chatloom.parallel.ranks import connect
from chatloom.parallel.strategies import require_runnable
from chatloom.sft import train_sft
from stages.run import stage
from stages.training import start

BASE, TRAIN, EVAL = Path("models/base"), Path("data/prepared/sft"), Path("data/prepared/eval")
ADAPTER = "sft"


def main() -> None:
    with stage("train_sft") as run:
        params, runtime = run.params.train_sft, run.params.runtime
        device = resolve_device(runtime.device, runtime.dtype, runtime.num_threads)
        require_runnable("train_sft", params.method, params.parallel, device.device)
        run.dataset(TRAIN, "sft")
        examples = Examples(read_split(TRAIN))
        if not examples:
            raise InputError(f"{TRAIN} has no rows; give prepare_data.split_weights.sft a larger share or add data")
        policy = trainable(BASE, ADAPTER, params, device)
        rows = held_out(read_split(EVAL), params.eval_rows)
        with connect("train_sft", params.parallel, device.device) as ranks:
            checkpoints = run.checkpoints(params.checkpoint_every, ranks)
            metrics = train_sft(policy, examples, rows, params, device.device, run.log, checkpoints, ranks)
        if ranks.rank == 0:
            model = policy.model if policy.adapter is None else merge_adapter(policy.model, policy.adapter)
            with run.out("models/sft") as folder:
                save_causal_lm(folder, model, BASE)
        run.metrics(metrics)


def held_out(rows: Sequence[PreparedRow], limit: int) -> dict[str, list[Example]]:
    """Up to `limit` held-out examples a language."""
    found: dict[str, list[Example]] = {}
    for row in rows:
        if row.responses and len(found.setdefault(row.lang, [])) < limit:
            found[row.lang].append(Example.of_row(row))
    return found


if __name__ == "__main__":
    start("train_sft", main)
