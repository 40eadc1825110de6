"""Preflight: refusals by message, and the memory estimate against what is really allocated."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from chatloom.config import BaseModelParams, Lora, Optimizer, Parallel, Strategy
from chatloom.data.examples import Example
from chatloom.device import Device
from chatloom.errors import InputError
from chatloom.models.adapters import Role
from chatloom.models.base import make_base_model
from chatloom.models.checkpoint import ChatModel, load_on
from chatloom.models.head import ScalarHead
from chatloom.models.reward_model import save_reward_model
from chatloom.optim import MasterAdamW, ParameterGroup
from chatloom.packing import pack
from chatloom.ppo.experience import make_experience, roll_out
from chatloom.ppo.preflight import (
    Memory,
    Shape,
    available_memory,
    estimate_memory,
    optimizer_bytes,
    require_first_step_parity,
    require_memory,
    require_own_pad_token,
    require_reward_parity,
    require_same_tokenizer,
    room_in_cgroups,
)
from chatloom.ppo.roles import Roles, load_roles
from tests.conftest import CPU, ROOT, SOURCE
from tests.test_ppo import PROMPTS, make_reward_model, params

SEQUENCES = [[5, 6, 7, 8, 2], [9, 10], [11, 12, 13, 14, 15, 16, 2]]


def full_reward_model(checkpoint: Path, folder: Path) -> Path:
    model = load_on(checkpoint, CPU).model
    folder.mkdir()
    save_reward_model(folder, Role(model, None, ScalarHead(model.config.hidden_size)), None, checkpoint)
    return folder


@pytest.fixture(params=["lora", "full"])
def models(request: pytest.FixtureRequest, checkpoint: Path, tmp_path: Path, lora: Lora) -> tuple[Path, Path]:
    """An SFT checkpoint, and a reward model on it that is an adapter or a model of its own."""
    if request.param == "lora":
        return checkpoint, make_reward_model(checkpoint, tmp_path / "reward", lora)
    return checkpoint, full_reward_model(checkpoint, tmp_path / "reward")


# --- tokenizer and pad token ---


def test_models_of_one_tokenizer_pass(models: tuple[Path, Path]) -> None:
    require_same_tokenizer(*models)


def test_another_vocabulary_template_or_stop_token_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    template = str(ROOT / "data/templates/chatml.jinja")
    other = SOURCE.model_copy(update={"vocab_size": 290})
    wanted = BaseModelParams(source=other, pad_token=None, stop_tokens=None, chat_template=template)
    make_base_model(wanted, torch.float32, tmp_path / "other")
    with pytest.raises(InputError, match=r"have different vocabularies: .*run train_reward again"):
        require_same_tokenizer(checkpoint, tmp_path / "other")

    reward = full_reward_model(checkpoint, tmp_path / "template")
    (reward / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    with pytest.raises(InputError, match="have different chat templates"):
        require_same_tokenizer(checkpoint, reward)

    reward = full_reward_model(checkpoint, tmp_path / "stop")
    file = reward / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [7]}))
    with pytest.raises(InputError, match="have different stop tokens"):
        require_same_tokenizer(checkpoint, reward)


def test_a_pad_token_that_stops_is_refused(chat: ChatModel) -> None:
    require_own_pad_token(chat)
    with pytest.raises(InputError, match=r"the pad token '<file_sep>' is also a stop token; set base_model\.pad_token"):
        require_own_pad_token(dataclasses.replace(chat, stop_ids=(2, chat.pad_id)))


# --- reward parity ---


def recorded_scores(role: Role) -> list[float]:
    with torch.no_grad():
        return [float(role.scores(pack([Example(ids, [False] * len(ids))]))) for ids in SEQUENCES]


def test_scores_in_a_pack_alone_and_as_recorded_agree(
    models: tuple[Path, Path], lora: Lora, optimizer: Optimizer
) -> None:
    reward_model = load_roles(*models, params(lora, optimizer), CPU).reward_model
    require_reward_parity(reward_model, SEQUENCES, recorded_scores(reward_model), CPU.device)


def test_a_lost_head_or_another_sft_model_is_refused(
    checkpoint: Path, tmp_path: Path, lora: Lora, optimizer: Optimizer
) -> None:
    reward = make_reward_model(checkpoint, tmp_path / "reward", lora)
    p = params(lora, optimizer)
    recorded = recorded_scores(load_roles(checkpoint, reward, p, CPU).reward_model)

    lost = load_roles(checkpoint, reward, p, CPU).reward_model
    lost = dataclasses.replace(lost, head=ScalarHead(32, torch.Generator().manual_seed(9)))
    with pytest.raises(InputError, match="those scored by train_reward; models/sft and models/reward do not belong"):
        require_reward_parity(lost, SEQUENCES, recorded, CPU.device)

    template = str(ROOT / "data/templates/chatml.jinja")
    other = BaseModelParams(
        source=SOURCE.model_copy(update={"seed": 1}), pad_token=None, stop_tokens=None, chat_template=template
    )
    make_base_model(other, torch.float32, tmp_path / "sft")
    moved = load_roles(tmp_path / "sft", reward, p, CPU).reward_model
    with pytest.raises(InputError, match="from those scored by train_reward"):
        require_reward_parity(moved, SEQUENCES, recorded, CPU.device)


def test_scores_that_depend_on_their_neighbours_are_refused(chat: ChatModel) -> None:
    class Leaky(Role):
        """Attends across sequences: the pack as if it were one of them."""

        def scores(self, packed: object, *_: object) -> Tensor:
            assert self.head is not None
            hidden = self.model.model(packed.input_ids).last_hidden_state[0]  # type: ignore[attr-defined]
            return self.head(hidden[packed.last])  # type: ignore[attr-defined,no-any-return]

    role = Leaky(chat.model, None, ScalarHead(32, torch.Generator().manual_seed(0)))
    with pytest.raises(InputError, match="from those scored one by one"):
        require_reward_parity(role, SEQUENCES, recorded_scores(role), CPU.device)


def test_a_score_that_is_no_number_is_refused(chat: ChatModel) -> None:
    role = Role(chat.model, None, ScalarHead(32))
    with pytest.raises(InputError, match="differ by nan"):
        require_reward_parity(role, SEQUENCES, [0.0, float("nan"), 0.0], CPU.device)


# --- the first step ---


def test_first_step_parity(models: tuple[Path, Path], lora: Lora, optimizer: Optimizer) -> None:
    p = params(lora, optimizer)
    roles = load_roles(*models, p, CPU)
    experience = make_experience(roles, roll_out(roles, PROMPTS, p, torch.Generator().manual_seed(0)), p, 0.1)
    require_first_step_parity(roles, experience, p)

    off = dataclasses.replace(experience, old_logprobs=experience.old_logprobs + 0.1)
    with pytest.raises(InputError, match=r"mean absolute log ratio a token is 0\.1, not 0"):
        require_first_step_parity(roles, off, p)
    with pytest.raises(InputError, match=r"mean absolute KL to the reference a token is 0\.2, not 0"):
        require_first_step_parity(roles, dataclasses.replace(experience, kl=experience.kl + 0.2), p)
    with pytest.raises(InputError, match="KL to the reference a token is nan"):
        require_first_step_parity(roles, dataclasses.replace(experience, kl=experience.kl * float("nan")), p)


# --- memory ---


def role_parameters(roles: Roles) -> list[Tensor]:
    """Every weight of every role, once."""
    parts = (roles.policy, roles.ref_policy, roles.reward_model, roles.value_model)
    found = {p.data_ptr(): p for part in parts for p in part.model.parameters()}
    return list(found.values())


def num_bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("layers", [None, 1])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_weights_and_optimizer_are_estimated_as_they_are_allocated(
    method: str, layers: int | None, models: tuple[Path, Path], lora: Lora, optimizer: Optimizer
) -> None:
    p = params(lora.model_copy(update={"layers": layers}), optimizer, method=method)
    memory = estimate_memory(*models, p, CPU, longest_prompt=4, longest_ptx=0)
    roles = load_roles(*models, p, CPU)
    assert memory.weights == pytest.approx(num_bytes(role_parameters(roles)), rel=0.02)

    groups = [ParameterGroup(role.parameters(), 1e-3) for role in (roles.policy, roles.value_model)]
    adam = MasterAdamW(groups, p.optimizer)
    masters = [master for group in adam.adamw.param_groups for master in group["params"]]
    moments = [moment for own in adam.adamw.state.values() for moment in own.values()]
    sums = masters  # of gradients: float32 from a step's second microbatch on
    assert memory.optimizer == pytest.approx(num_bytes([*masters, *moments, *sums]), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [None, 1])
def test_activations_are_estimated_to_the_order_of_what_autograd_keeps(
    layers: int | None, dtype: torch.dtype, checkpoint: Path, tmp_path: Path, lora: Lora, optimizer: Optimizer
) -> None:
    lora = lora.model_copy(update={"layers": layers})
    p = params(lora, optimizer)
    device = Device(torch.device("cpu"), dtype)
    roles = load_roles(checkpoint, make_reward_model(checkpoint, tmp_path / "reward", lora), p, device)
    packed = pack([Example.of_response([5] * 40, [9] * 60)] * 4)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {tensor.untyped_storage().data_ptr() for tensor in role_parameters(roles)}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = roles.policy.hidden(packed)
    assert hidden.requires_grad
    actual = sum(size for place, size in kept.items() if place not in weights)
    estimate = 400 * (layers or 2) * Shape.of(checkpoint).activation_bytes(dtype)
    assert 0.6 < actual / estimate < 1.5


def test_memory_by_hand(checkpoint: Path, tmp_path: Path, lora: Lora, optimizer: Optimizer) -> None:
    """Hidden 32, MLP 64, 2 layers, 4 heads of 8 of which 2 have keys, 300 tokens; adapters of rank 4 on q, v, down."""
    reward = make_reward_model(checkpoint, tmp_path / "reward", lora)
    p = params(lora, optimizer, batch_size=3, generation_batch=5, max_new_tokens=6, ptx_coef=0.1, ptx_batch=2)
    memory = estimate_memory(checkpoint, reward, p, CPU, longest_prompt=10, longest_ptx=20)
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64 + 2 * 32  # q, k and v, o, MLP, two norms
    model = 300 * 32 + 2 * layer + 32
    adapter = 2 * 4 * ((32 + 32) + (32 + 16) + (64 + 32))
    head = 32 + 3  # weights, offset, gain and bias
    assert memory.weights == 4 * (model + adapter + 2 * (adapter + head))
    assert memory.optimizer == 16 * (adapter + adapter + head)
    # 3 rows of 16 tokens are more than 2 of 20: 48 tokens, each with keys and values of 2 * 2 * 8 numbers.
    activations = 48 * 2 * (8 * 32 + 4 * (5 * 32 + 32 + 4 * 64))
    assert memory.update == activations + 48 * 300 * 16
    assert memory.rollout == 4 * (int(1.5 * 5 * 16 * 2 * 32) + model + 300 * 32)
    assert memory.peak == memory.weights + memory.optimizer + max(memory.update, memory.rollout)


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint"):
        Shape.of(tmp_path)


GIB = 2**30


@pytest.mark.parametrize(
    ("memory", "changes", "remedy"),
    [
        (Memory(9 * GIB, 0, 2 * GIB, 1), {"method": "full"}, "set train_ppo.method to 'lora'"),
        (Memory(4 * GIB, 5 * GIB, 2 * GIB, 1), {}, "lower train_ppo.lora.rank = 4"),
        (Memory(4 * GIB, 0, 7 * GIB, 1), {}, "lower train_ppo.batch_size = 2 or train_ppo.ptx_batch = 0"),
        (Memory(4 * GIB, 0, 1, 7 * GIB), {}, "lower train_ppo.generation_batch = 4 or train_ppo.max_new_tokens = 6"),
    ],
)
def test_too_little_memory_names_the_keys_that_weigh_most(
    memory: Memory, changes: dict[str, object], remedy: str, lora: Lora, optimizer: Optimizer
) -> None:
    with pytest.raises(InputError, match=r"train_ppo needs about 11\.00 GiB .* and 10\.00 GiB are available") as error:
        require_memory(memory, 10 * GIB, params(lora, optimizer, **changes))
    assert remedy in str(error.value)


def test_memory_that_is_close_warns(lora: Lora, optimizer: Optimizer, caplog: pytest.LogCaptureFixture) -> None:
    p, memory = params(lora, optimizer), Memory(4 * GIB, 0, 7 * GIB, 1)
    with caplog.at_level(logging.INFO):
        require_memory(memory, 100 * GIB, p)
        require_memory(memory, 12 * GIB, p)
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO", "WARNING"]
    assert "needs about 11.00 GiB (weights 4.00 GiB, optimizer 0.0 MiB, update 7.00 GiB" in caplog.text
    assert "lower train_ppo.batch_size = 2" in caplog.records[-1].message


def test_available_memory_is_what_the_system_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatloom.ppo.preflight.room_in_cgroups", lambda: [2**60])
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    said = 1024 * int(lines["MemAvailable"].split()[0])
    assert available_memory(torch.device("cpu")) == pytest.approx(said, rel=0.2)
    monkeypatch.setattr("chatloom.ppo.preflight.room_in_cgroups", lambda: [2**60, 12345])
    assert available_memory(torch.device("cpu")) == 12345


def cgroup(folder: Path, **files: int | str) -> None:
    """A fake control group; a double underscore stands for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_room_under_limits_of_cgroups_v2(tmp_path: Path) -> None:
    """The limit of a group above ours counts; 3 GiB of 4 are used, of which 512 MiB are unused file cache."""
    proc, mount = tmp_path / "cgroup", tmp_path / "sys"
    proc.write_text("0::/pods/pod1/main\n")
    cgroup(mount / "pods/pod1/main", memory__max="max", memory__current=3 * GIB, memory__stat="inactive_file 5")
    stat = f"anon {2 * GIB}\ninactive_file {GIB // 2}\nactive_file 77"
    cgroup(mount / "pods/pod1", memory__max=4 * GIB, memory__current=3 * GIB, memory__stat=stat)
    cgroup(mount / "pods", cgroup__procs="")
    assert room_in_cgroups(proc, mount) == [GIB + GIB // 2]
    cgroup(mount / "pods/pod1/main", memory__max=3 * GIB)
    assert room_in_cgroups(proc, mount) == [5, GIB + GIB // 2]


def test_room_under_a_limit_of_cgroups_v1(tmp_path: Path) -> None:
    """A container whose own group is all that is mounted; without a limit there is a number beyond any memory."""
    proc, mount = tmp_path / "cgroup", tmp_path / "sys"
    proc.write_text("5:cpu,cpuacct:/docker/ab:cd\n4:hugetlb,memory:/docker/ab:cd\n1:name=systemd:/x\n0::/\n")
    stat = f"inactive_file 1\ntotal_inactive_file {GIB}"
    cgroup(mount / "memory", memory__limit_in_bytes=8 * GIB, memory__usage_in_bytes=6 * GIB, memory__stat=stat)
    assert room_in_cgroups(proc, mount) == [3 * GIB]
    cgroup(mount / "memory", memory__limit_in_bytes=9223372036854771712)
    assert min(room_in_cgroups(proc, mount)) > 2**60


def test_no_cgroups_no_limit(tmp_path: Path) -> None:
    assert room_in_cgroups(tmp_path / "none", tmp_path) == []
    (tmp_path / "cgroup").write_text("0::/\n")
    assert room_in_cgroups(tmp_path / "cgroup", tmp_path) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_available_memory_of_a_gpu() -> None:
    device = torch.device("cuda")
    before = available_memory(device)
    block = torch.empty(2**28, dtype=torch.uint8, device=device)
    assert before - available_memory(device) >= block.numel() * 0.9


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [("ddp", 16), ("colossalai_zero1", 2 + 4), ("colossalai_zero2", 0.5 + 4), ("colossalai_zero2_cpu", 0.5)],
)
def test_optimizer_memory_of_a_process_by_hand(strategy: Strategy, expected: float) -> None:
    """Of a bfloat16 parameter on one of four GPUs: 12 bytes of master and moments, 4 of their gradient, 2 its own."""
    gpu = Device(torch.device("cuda"), torch.bfloat16)
    assert optimizer_bytes(Parallel(strategy=strategy, num_processes=4, tensor_size=1, hostfile=None), gpu) == expected
