"""The four parts of PPO and which weights they share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatloom.config import Lora, Placement, TrainPpoParams
from chatloom.device import Device
from chatloom.models.adapters import Role, adapter_parameters, add_adapter, load_adapter_state, merge_adapter
from chatloom.models.checkpoint import ChatModel, load_on
from chatloom.models.reward_model import load_reward_model
from chatloom.models.rollouts import RolloutEngine, open_engine

POLICY, VALUE = "policy", "value"


@dataclass(frozen=True)
class Roles:
    policy: Role
    ref_policy: Role
    reward_model: Role
    value_model: Role
    chat: ChatModel
    """Tokenizer and stop tokens, shared by all."""
    engine: RolloutEngine
    """What samples, from the weights of the role that answers."""


def load_roles(sft: Path, reward: Path, params: TrainPpoParams, device: Device) -> Roles:
    """Load what PPO needs.

    With LoRA, one frozen SFT backbone serves policy (an adapter), reference (adapters off), reward (its adapter, where
    reward training used LoRA) and value (an adapter that starts as the reward's). With full fine-tuning, policy and
    value are models of their own. The value model starts from the reward model, gain and bias included.
    """
    chat = load_on(sft, device, params.lora.base_bits)
    backbone = chat.model.requires_grad_(False)
    reward_model, reward_lora = load_reward_model(reward, device, backbone=backbone)
    for parameter in reward_model.parameters():
        parameter.requires_grad_(False)
    assert reward_model.head is not None
    value_head = reward_model.head.clone().requires_grad_(True)
    if params.method == "lora":
        add_adapter(backbone, POLICY, params.lora, params.seed)
        policy = Role(backbone, POLICY)
        value_model = Role(_add_value_adapter(reward_model, reward_lora, params), VALUE, value_head)
    else:
        policy = Role(load_on(sft, device).model.requires_grad_(True))
        value_model = Role(_trunk_of_reward(reward, sft, device).requires_grad_(True), None, value_head)
    # Last, for vLLM takes its share of what memory is left then.
    engine = open_engine(
        params.generation, params.generation_batch, sft, device, params.lora if params.method == "lora" else None
    )
    return Roles(policy, Role(backbone), reward_model, value_model, chat, engine)


@contextmanager
def set_aside(roles: Roles, placement: Placement) -> Iterator[None]:
    """With `offload`, the models that only score are in the host's memory inside the block, where two others learn."""
    learning = {id(role.model) for role in (roles.policy, roles.value_model)}
    scoring = {id(role.model): role.model for role in (roles.ref_policy, roles.reward_model)}
    idle = [model for key, model in scoring.items() if key not in learning and placement == "offload"]
    for model in idle:
        model.to("cpu")
    yield
    for model in idle:
        model.to(roles.policy.model.device)


def _add_value_adapter(reward_model: Role, reward_lora: Lora | None, params: TrainPpoParams) -> Any:
    """A trainable copy of the reward adapter, or a fresh one where the reward model is a trunk of its own."""
    model = reward_model.model
    add_adapter(model, VALUE, reward_lora or params.lora, params.seed)
    if reward_model.adapter is not None:
        state = {name: p.detach().clone() for name, p in adapter_parameters(model, reward_model.adapter).items()}
        load_adapter_state(model, VALUE, state)
    return model


def _trunk_of_reward(reward: Path, sft: Path, device: Device) -> Any:
    role, _ = load_reward_model(reward, device, sft=sft)
    return role.model if role.adapter is None else merge_adapter(role.model, role.adapter)
