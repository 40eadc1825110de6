"""Loss curves of every strategy on a tiny LLaMA, to be compared with one process.

    python -m tests.parallel.parity 2 [sft/full]     prints the table of docs/parallel.md, as measured with 2 processes

As a worker (`start_workers`) it runs the cases named in the environment and writes their curves.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from chatloom.config import (
    BaseModelParams,
    Parallel,
    RandomSource,
    TrainPpoParams,
    TrainRewardParams,
    TrainSftParams,
    read_yaml,
)
from chatloom.data.comparisons import Comparison
from chatloom.data.examples import Example
from chatloom.device import Device
from chatloom.errors import InputError
from chatloom.models.adapters import Role, add_adapter
from chatloom.models.base import make_base_model
from chatloom.models.checkpoint import load_on
from chatloom.models.head import ScalarHead
from chatloom.models.reward_model import ADAPTER, save_reward_model
from chatloom.optim import ParameterGroup
from chatloom.parallel.launch import is_worker, run_worker, start_workers
from chatloom.parallel.ranks import ALONE, Ranks, connect
from chatloom.parallel.strategies import open_updates
from chatloom.ppo.loop import train_ppo
from chatloom.ppo.roles import load_roles
from chatloom.resume import Checkpoints
from chatloom.reward import train_reward
from chatloom.sft import train_sft

Curves = dict[str, list[float]]
"""By metric, its value at each step."""
ROOT = Path(__file__).parents[2]
PARAMS = read_yaml(ROOT / "params.yaml")
CASES, FOLDER = "PARITY_CASES", "PARITY_FOLDER"
DEVICE = os.environ.get("PARITY_DEVICE", "cpu")
DATA_PARALLEL = ("ddp", "colossalai_zero1", "colossalai_zero2", "colossalai_zero2_cpu")
RESUMED = (
    "sft/full/float32/colossalai_zero2",
    "reward/full/float32/colossalai_hybrid",
    "ppo/lora/float32/colossalai_zero1",
)
"""Cases that are also killed in the middle and resumed."""
ROWS = 8  # of a step, whatever the number of processes
STEPS = 20
LEGS = {4: ("colossalai_zero2", 6), 1: ("ddp", 11), 2: ("colossalai_gemini", None)}
"""One run that is handed on: by the number of processes their strategy, and the step at whose end they are killed."""
LEG, DIFFERENT = "leg", "different"
"""In the list of cases: the leg of that run, and what ranks are told that do not bring the same."""
OPTIMIZER = {
    "lr": 1e-3,
    "weight_decay": 0.01,
    "adam_eps": 1e-8,
    "warmup_steps": 2,
    "schedule": "cosine",
    "max_grad_norm": 1.0,
}
FULL, LORA_4 = "full", "lora on 4 bits"
METHODS = (FULL, "lora", LORA_4)
LORA = {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "layers": None, "base_bits": None}
CURVES = {
    "sft": ("train/loss", "train/grad_norm"),
    "reward": ("train/loss", "train/grad_norm"),
    "ppo": ("objective/kl", "objective/score", "policy/loss", "value/loss", "ptx/loss", "policy/grad_norm"),
}


def make_models(folder: Path, methods: Sequence[str] = (FULL, "lora")) -> None:
    """A base model, and reward models that are an adapter on it or a trunk of their own."""
    source = RandomSource(kind="random", hidden_size=32, num_layers=2, num_heads=4, vocab_size=300, seed=0)
    template = str(ROOT / "data/templates/chatml.jinja")
    params = BaseModelParams(source=source, pad_token=None, stop_tokens=None, chat_template=template)
    make_base_model(params, torch.float32, folder / "base")
    for method in methods:
        role = reward_role(folder, method, torch.float32)
        assert role.head is not None
        role.head.normalize(torch.tensor([0.0, 0.5, 1.5], device=DEVICE))
        out = folder / f"reward-{method}"
        out.mkdir()
        save_reward_model(
            out, role, train_reward_params(method, "none", 1).lora if role.adapter else None, folder / "base"
        )


def reward_role(folder: Path, method: str, dtype: torch.dtype) -> Role:
    lora = train_reward_params(method, "none", 1).lora
    model = load_on(folder / "base", Device(torch.device(DEVICE), dtype), lora.base_bits).model
    head = ScalarHead(32, torch.Generator().manual_seed(0)).to(DEVICE)
    if method == FULL:
        return Role(model, None, head)
    add_adapter(model, ADAPTER, lora, seed=0)
    return Role(model, ADAPTER, head)


def examples(count: int, seed: int) -> list[Example]:
    """Random sequences of random lengths."""
    draw = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=draw))
        return torch.randint(10, 290, (length,), generator=draw).tolist()

    return [Example.of_response(ids(2, 9), [*ids(1, 12), 2]) for _ in range(count)]


def comparisons(count: int) -> list[Comparison]:
    found = []
    for i, row in enumerate(examples(count, seed=1)):
        split = row.loss_mask.index(True)
        prompt, better = row.input_ids[:split], row.input_ids[split:]
        worse = [[*better[::-1][1:], 2], [better[0]]][: 1 + i % 2]
        count = 1 + len(worse)
        found.append(
            Comparison(
                id=str(i),
                lang="en",
                messages=[],
                prompt_ids=prompt,
                responses=[""] * count,
                response_ids=[better, *worse],
                ranks=list(range(count)),
                origins=["sampled"] * count,
                holdout=i % 4 == 3,
            )
        )
    return found


def tensor_size(strategy: str) -> int:
    return 2 if strategy == "colossalai_hybrid" else 1


def trained_by(method: str) -> dict[str, Any]:
    return {"method": FULL if method == FULL else "lora", "lora": LORA | {"base_bits": 4 if method == LORA_4 else None}}


def supervised(method: str, strategy: str, size: int) -> dict[str, Any]:
    tensor = tensor_size(strategy)
    return {
        **trained_by(method),
        "optimizer": OPTIMIZER,
        "parallel": Parallel(strategy=strategy, num_processes=size, tensor_size=tensor, hostfile=None),
        "batch_size": max(ROWS // (size // tensor) // 2, 1),
        "accumulation_steps": 2,
        "num_epochs": 20,
        "max_steps": STEPS,
        "eval_every": 10,
    }


def train_reward_params(method: str, strategy: str, size: int) -> TrainRewardParams:
    return TrainRewardParams.model_validate(PARAMS["train_reward"] | supervised(method, strategy, size))


def train_sft_params(method: str, strategy: str, size: int) -> TrainSftParams:
    return TrainSftParams.model_validate(PARAMS["train_sft"] | supervised(method, strategy, size))


def train_ppo_params(method: str, strategy: str, size: int) -> TrainPpoParams:
    own = trained_by(method)
    changes = {
        **own,
        "lora": own["lora"] | {"layers": 1},
        "optimizer": OPTIMIZER | {"adam_eps": 1e-5},
        "value_lr": 2e-3,
        "parallel": {"strategy": strategy, "num_processes": size, "tensor_size": 1, "hostfile": None},
        "num_steps": STEPS,
        "rollout_batch": ROWS,
        "generation_batch": 4,
        "ppo_epochs": 1,
        "num_minibatches": 2,
        "batch_size": 2,
        "max_new_tokens": 6,
        "ptx_coef": 0.5,
        "ptx_batch": 4,
        "sample_every": 100,
    }
    return TrainPpoParams.model_validate(PARAMS["train_ppo"] | changes)


class Killed(Exception):
    pass


def run(
    case: str, folder: Path, ranks: Ranks, checkpoints: Checkpoints | None = None, kill_at: int | None = None
) -> Curves:
    """The curves of `stage/method/dtype/strategy`, or what of them follows a saved state.

    Raises:
        Killed: at the end of step `kill_at`.
    """
    stage, method, dtype, strategy = case.split("/")
    ranks = replace(ranks, tensor=tensor_size(strategy))
    device = Device(torch.device(DEVICE), getattr(torch, dtype))
    curves: Curves = {name: [] for name in CURVES[stage]}

    def log(step: int, metrics: Mapping[str, float]) -> None:
        if step == kill_at:
            raise Killed
        for name in curves:
            if name in metrics:
                curves[name].append(metrics[name])

    torch.manual_seed(0)
    if stage == "ppo":
        p = train_ppo_params(method, strategy, ranks.size)
        roles = load_roles(folder / "base", folder / f"reward-{method}", p, device)
        prompts = [row.input_ids for row in examples(24, seed=3)]
        train_ppo(roles, prompts, examples(12, seed=4), p, log, lambda *_: None, checkpoints, ranks=ranks)
    elif stage == "reward":
        role, rows = reward_role(folder, method, device.dtype), comparisons(31)
        train = [row for row in rows if not row.holdout]
        held_out = [row for row in rows if row.holdout]
        p_reward = train_reward_params(method, strategy, ranks.size)
        result = train_reward(role, train, held_out, p_reward, device.device, log, checkpoints, ranks)
        curves["eval/accuracy"] = [result["eval/accuracy"]]
        assert role.head is not None
        curves["head/bias"] = [float(role.head.bias)]
    else:
        p_sft = train_sft_params(method, strategy, ranks.size)
        model = load_on(folder / "base", device, p_sft.lora.base_bits).model
        if method != FULL:
            add_adapter(model, "sft", p_sft.lora, seed=0)
        policy = Role(model, "sft" if method != FULL else None)
        held_out = {"en": examples(7, seed=5)}
        result = train_sft(policy, examples(37, seed=2), held_out, p_sft, device.device, log, checkpoints, ranks)
        curves["eval/loss_en"] = [result["eval/loss_en"]]
    return curves


def processes(size: int) -> Parallel:
    return Parallel(strategy="ddp", num_processes=size, tensor_size=1, hostfile=None)


def run_together(cases: list[str], size: int, folder: Path) -> dict[str, Curves]:
    """The curves of each case, by `size` processes that are started once for all of them."""
    os.environ |= {CASES: json.dumps([size, cases]), FOLDER: str(folder)}
    status = start_workers("tests.parallel.parity", processes(size))
    assert status == 0, "the processes say why on stderr"
    found: dict[str, Curves] = json.loads((folder / "curves.json").read_text())
    return found


def states(case: str, folder: Path, ranks: Ranks, every: int = STEPS // 2) -> Checkpoints:
    return Checkpoints(folder / "states" / case, {"case": case}, every, ranks=ranks)


def run_leg(folder: Path, ranks: Ranks) -> Curves:
    """The leg of `LEGS` that so many processes run.

    Returns:
        Its curves if it gets to the end; and how far what its optimizer took over is from what was saved.
    """
    strategy, kill_at = LEGS[ranks.size]
    case = f"sft/full/bfloat16/{strategy}"
    found = {} if strategy == "colossalai_zero2" else {"taken over": taken_over(case, folder, ranks)}
    with suppress(Killed):
        found |= run(case, folder, ranks, states(LEG, folder, ranks, every=5), kill_at)
    return found


def taken_over(case: str, folder: Path, ranks: Ranks) -> list[float]:
    """The largest change of masters, of both moments and of rounded weights when a state is loaded."""
    model = load_on(folder / "base", Device(torch.device(DEVICE), torch.bfloat16)).model
    parameters = Role(model).parameters()
    p = train_sft_params("full", case.rsplit("/", 1)[1], ranks.size)
    optimizer = open_updates([ParameterGroup(parameters, 1e-3)], p.optimizer, p.parallel, ranks, model)
    saved = states(LEG, folder, ranks).load()
    assert saved is not None
    before = saved[1]["optimizer"]
    optimizer.load_state_dict(*before)
    after = ranks.gather(optimizer.state_dict())
    optimizer.finish()
    gaps = [0.0, 0.0, 0.0, 0.0]
    for i, parameter in enumerate(parameters):
        old, new = ([laid_flat(parts, i, name)[: parameter.numel()] for name in MOMENTS] for parts in (before, after))
        new.append(parameter.detach().float().flatten())
        old.append(old[0].bfloat16().float())
        assert all(tensor.any() for tensor in old), "of weights that were trained"
        gaps = [max(gap, float((a - b).abs().max())) for gap, a, b in zip(gaps, old, new, strict=True)]
    return gaps


MOMENTS = ("masters", "exp_avg", "exp_avg_sq")


def laid_flat(parts: Sequence[Mapping[str, Any]], i: int, name: str) -> torch.Tensor:
    """What all ranks saved of parameter `i`, its master or one of its moments, one after another."""
    holders = [part for part in parts if i < len(part["masters"])]
    found = [part["masters"][i] if name == "masters" else part["moments"][i][name] for part in holders]
    return torch.cat([tensor.flatten() for tensor in found])


def told(folder: Path, ranks: Ranks) -> list[str]:
    """What training says where the second rank has other params, other rows, or other weights than the first."""
    found = []
    for what in ("params", "rows", "weights"):
        model = load_on(folder / "base", Device(torch.device(DEVICE), torch.float32)).model
        p, rows = train_sft_params("full", "ddp", ranks.size), examples(37, seed=2)
        if ranks.rank == 1:
            if what == "params":
                p = p.model_copy(update={"max_steps": 21})
            elif what == "rows":
                rows[5] = rows[6]
            else:
                model.lm_head.weight.data[0, 0] += 1
        try:
            train_sft(Role(model), rows, {}, p, torch.device(DEVICE), no_step, None, ranks)
        except InputError as error:
            found.append(str(error))
    return found


def no_step(step: int, metrics: Mapping[str, float]) -> None:
    raise AssertionError("it trains")


def difference(curves: Curves, alone: Curves) -> dict[str, float]:
    """The largest difference of each curve at any step, as a share of its largest value."""
    found = {}
    for name, values in alone.items():
        assert len(curves[name]) == len(values)
        gap = max(abs(a - b) for a, b in zip(curves[name], values, strict=True))
        found[name] = gap / max(abs(value) for value in values)
    return found


def worker() -> None:
    torch.set_num_threads(1)
    size, cases = json.loads(os.environ[CASES])
    folder = Path(os.environ[FOLDER])
    with connect("parity", processes(size), torch.device(DEVICE)) as ranks:
        curves = {}
        for case in cases:
            if case == LEG:
                curves[LEG] = run_leg(folder, ranks)
                continue
            if case == DIFFERENT:
                (folder / f"told-{ranks.rank}.json").write_text(json.dumps(told(folder, ranks)))
                continue
            curves[case] = run(case, folder, ranks)
            if case in RESUMED:
                with suppress(Killed):
                    run(case, folder, ranks, states(case, folder, ranks), kill_at=STEPS // 2 + 1)
                curves[f"{case} resumed"] = run(case, folder, ranks, states(case, folder, ranks))
        if ranks.rank == 0:
            (folder / "curves.json").write_text(json.dumps(curves))


def main() -> None:
    size = int(sys.argv[1])
    chosen = sys.argv[2:] or [""]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_models(folder, METHODS)
        cases = [
            f"{stage}/{method}/{dtype}/{strategy}"
            for stage in CURVES
            for method in METHODS
            for dtype in ("float32", "bfloat16")
            for strategy in DATA_PARALLEL
        ]
        for stage in ("sft", "reward"):
            cases += [f"{stage}/full/{dtype}/colossalai_hybrid" for dtype in ("float32", "bfloat16")]
            cases += [f"{stage}/full/bfloat16/colossalai_gemini"]
        cases = [case for case in cases if any(part in case for part in chosen)]
        together = run_together(cases, size, folder)
        for case in cases:
            alone = run(f"{case.rsplit('/', 1)[0]}/none", folder, ALONE)
            gaps = difference(together[case], alone)
            sys.stdout.write(f"| {case} | {size} | " + ", ".join(f"{k} {v:.1e}" for k, v in gaps.items()) + " |\n")


if __name__ == "__main__":
    if is_worker():
        run_worker(worker)
    else:
        main()
