"""QLoRA: adapters on frozen weights in NF4; on a CPU too, where bitsandbytes has kernels of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chatloom.config import Lora, Optimizer
from chatloom.device import Device
from chatloom.errors import InputError
from chatloom.models import four_bit
from chatloom.models.adapters import Role, adapter_parameters, add_adapter, merge_adapter, trainable
from chatloom.models.checkpoint import load_on, save_causal_lm
from chatloom.models.reward_model import load_reward_model, read_probes, save_reward_model
from chatloom.packing import pack
from chatloom.parallel.shapes import Shape, nf4_bytes
from chatloom.ppo.experience import make_experience, roll_out
from chatloom.ppo.loop import train_ppo
from chatloom.ppo.preflight import estimate_memory, require_same_base
from chatloom.ppo.roles import load_roles
from chatloom.sft import train_sft
from tests import test_ppo, test_sft
from tests.conftest import CPU
from tests.test_sft import EXAMPLES

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
"""Dettmers et al. 2023, appendix E."""


@pytest.fixture
def rounded(lora: Lora) -> Lora:
    """Adapters on some of the layers: the others are in 4 bits as well."""
    return lora.model_copy(update={"base_bits": 4})


def linear_weights(model: Any) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2}


def train(role: Role, optimizer: Optimizer, lora: Lora, device: torch.device = CPU.device) -> list[float]:
    """Losses and norms of some steps, the held-out loss first: it is taken in a pass without gradients."""
    curve: list[float] = []

    def log(_: int, metrics: Mapping[str, float]) -> None:
        curve.extend(value for name, value in metrics.items() if not name.startswith("time/"))

    p = test_sft.params(lora, optimizer, method="lora", max_steps=4)
    train_sft(role, EXAMPLES, {"en": EXAMPLES}, p, device, log)
    return curve


def test_a_weight_is_the_nearest_of_the_papers_sixteen_values(wide_checkpoint: Path) -> None:
    """Times the largest of its block of 64, which double quantization rounds once more."""
    whole = load_on(wide_checkpoint, CPU).model
    model = load_on(wide_checkpoint, CPU, 4).model
    assert all(p.dtype == torch.uint8 for p in linear_weights(model).values())
    same = four_bit.dequantized(model)
    codes = torch.tensor(NF4)
    for name, weight in linear_weights(whole).items():
        blocks = weight.detach().view(-1, 64)
        scale = blocks.abs().amax(1, keepdim=True)
        nearest = codes[(blocks / scale)[..., None].sub(codes).abs().argmin(-1)]
        got = same.get_parameter(name).detach().view(-1, 64)
        assert float(((got - nearest * scale) / scale).abs().max()) < 0.02, name
    untouched = [name for name, _ in whole.named_parameters() if name not in linear_weights(whole)]
    assert len(untouched) == 2 + 2 * 2  # the tied embedding, norms
    for name in untouched:
        assert torch.equal(same.get_parameter(name), whole.get_parameter(name)), name


def test_adapters_learn_as_on_the_rounded_weights_themselves(
    wide_checkpoint: Path, rounded: Lora, optimizer: Optimizer
) -> None:
    """Forward, backward and update, after passes without gradients, against the same values as ordinary weights."""
    p = test_sft.params(rounded, optimizer, method="lora")
    policy = trainable(wide_checkpoint, "sft", p, CPU)
    plain = four_bit.dequantized(load_on(wide_checkpoint, CPU, 4).model)
    add_adapter(plain, "sft", rounded, p.seed)
    curve = train(policy, optimizer, rounded)
    assert curve == pytest.approx(train(Role(plain, "sft"), optimizer, rounded), abs=1e-4)
    assert curve[-1] < curve[0], "the held-out loss falls"
    other = adapter_parameters(plain, "sft")
    for name, parameter in adapter_parameters(policy.model, "sft").items():
        torch.testing.assert_close(parameter, other[name], atol=1e-3, rtol=0)


def test_what_a_stage_writes_is_an_ordinary_checkpoint_of_what_was_trained(
    wide_checkpoint: Path, rounded: Lora, optimizer: Optimizer, tmp_path: Path
) -> None:
    policy = trainable(wide_checkpoint, "sft", test_sft.params(rounded, optimizer, method="lora"), CPU)
    train(policy, optimizer, rounded)
    expected = policy.logprobs(pack(EXAMPLES)).detach()
    save_causal_lm(tmp_path / "out", merge_adapter(policy.model, "sft"), wide_checkpoint)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    loaded = load_on(tmp_path / "out", CPU).model
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(Role(loaded).logprobs(pack(EXAMPLES)), expected, atol=1e-4, rtol=0)


def reward_model(checkpoint: Path, folder: Path, lora: Lora) -> Role:
    role = test_ppo.reward_role(checkpoint, lora)
    folder.mkdir()
    save_reward_model(folder, role, lora, checkpoint, [example.input_ids for example in EXAMPLES])
    return role


def test_a_reward_model_scores_on_the_bits_it_was_trained_on(
    wide_checkpoint: Path, rounded: Lora, tmp_path: Path
) -> None:
    role = reward_model(wide_checkpoint, tmp_path / "reward", rounded)
    loaded, shape = load_reward_model(tmp_path / "reward", CPU, sft=wide_checkpoint)
    assert shape == rounded
    scores = loaded.scores(pack(EXAMPLES))
    torch.testing.assert_close(scores, role.scores(pack(EXAMPLES)), atol=0, rtol=0)
    assert read_probes(tmp_path / "reward")[1] == pytest.approx(scores.tolist(), abs=1e-4)


def test_ppo_has_its_roles_on_one_backbone_of_4_bits(
    wide_checkpoint: Path, rounded: Lora, optimizer: Optimizer, tmp_path: Path
) -> None:
    reward_model(wide_checkpoint, tmp_path / "reward", rounded)
    p = test_ppo.params(rounded, optimizer, ptx_coef=0.5, ptx_batch=2)
    roles = load_roles(wide_checkpoint, tmp_path / "reward", p, CPU)
    roles_models = [roles.policy, roles.ref_policy, roles.reward_model, roles.value_model]
    assert len({id(role.model) for role in roles_models}) == 1
    rollout = roll_out(roles, test_ppo.PROMPTS, p, torch.Generator().manual_seed(0))
    experience = make_experience(roles, rollout, p, 0.1)
    assert float(experience.kl.abs().max()) == 0
    before = {name: p.clone() for name, p in adapter_parameters(roles.policy.model, "policy").items()}
    metrics = train_ppo(roles, test_ppo.PROMPTS, EXAMPLES, p, lambda *_: None, lambda *_: None)
    assert metrics["objective/kl_last"] != 0
    after = adapter_parameters(roles.policy.model, "policy")
    assert all(not torch.equal(after[name], old) for name, old in before.items())


def test_an_adapter_of_other_bits_is_refused_before_anything_is_loaded(
    wide_checkpoint: Path, lora: Lora, rounded: Lora, tmp_path: Path
) -> None:
    reward_model(wide_checkpoint, tmp_path / "reward", lora)
    require_same_base(tmp_path / "reward", lora)
    with pytest.raises(InputError, match=r"train_ppo\.lora\.base_bits = 4: .*reward was trained with null"):
        require_same_base(tmp_path / "reward", rounded)


def test_without_bitsandbytes_the_key_and_the_remedy_are_named(
    wide_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=r"lora\.base_bits = 4: .* cpu .*set it to null in every stage"):
        load_on(wide_checkpoint, CPU, 4)
    load_on(wide_checkpoint, CPU)


# --- memory ---


def bytes_of(model: Any) -> int:
    """Of parameters, and of the scales and codes that belong to those in 4 bits."""
    total = 0
    for parameter in model.parameters():
        total += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            total += sum(part.numel() * part.element_size() for part in (state.absmax, state.state2.absmax))
    return total


def test_bytes_of_a_model_in_4_bits(wide_checkpoint: Path, rounded: Lora, optimizer: Optimizer, tmp_path: Path) -> None:
    """Half a byte of each weight, a byte of 64, four bytes of 16,384: all of it as allocated."""
    shape = Shape.named(str(wide_checkpoint))
    model = load_on(wide_checkpoint, Device(torch.device("cpu"), torch.bfloat16), 4).model
    assert nf4_bytes(shape) == pytest.approx(bytes_of(model), rel=0.001)
    reward_model(wide_checkpoint, tmp_path / "reward", rounded)
    p = test_ppo.params(rounded, optimizer)
    estimate = estimate_memory(wide_checkpoint, tmp_path / "reward", p, CPU, longest_prompt=4, longest_ptx=0)
    roles = load_roles(wide_checkpoint, tmp_path / "reward", p, CPU)
    assert estimate.weights == pytest.approx(bytes_of(roles.policy.model), rel=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_adapters_on_4_bits_on_a_gpu(wide_checkpoint: Path, rounded: Lora, optimizer: Optimizer) -> None:
    """The same losses as on the rounded weights themselves; merged, it comes in the host's memory."""
    device = Device(torch.device("cuda"), torch.bfloat16)
    p = test_sft.params(rounded, optimizer, method="lora")
    policy = trainable(wide_checkpoint, "sft", p, device)
    plain = four_bit.dequantized(load_on(wide_checkpoint, device, 4).model).to(device.device)
    add_adapter(plain, "sft", rounded, p.seed)
    curve = train(policy, optimizer, rounded, device.device)
    assert curve == pytest.approx(train(Role(plain, "sft"), optimizer, rounded, device.device), rel=5e-2)
    assert {p.device.type for p in merge_adapter(policy.model, "sft").parameters()} == {"cpu"}
