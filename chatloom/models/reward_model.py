"""Reward models: how they start, how they are saved (trunk or adapter, head, gain and bias), and what they score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from chatloom.batches import chunks
from chatloom.config import Lora, TrainRewardParams
from chatloom.data.examples import Example
from chatloom.device import Device
from chatloom.errors import InputError
from chatloom.files import read_json, write_json
from chatloom.models.adapters import Role, adapter_parameters, add_adapter, load_adapter_state, trainable
from chatloom.models.checkpoint import load_on, save_causal_lm
from chatloom.models.head import ScalarHead
from chatloom.packing import ROWS_AT_ONCE, pack

ADAPTER = "reward"
DESCRIPTION = "reward_model.json"


def new_reward_model(checkpoint: Path, params: TrainRewardParams, device: Device) -> Role:
    """What reward training starts from: the SFT checkpoint as `params.method` wants it trained, and a random head."""
    trunk = trainable(checkpoint, ADAPTER, params, device)
    head = ScalarHead(trunk.model.config.hidden_size, torch.Generator().manual_seed(params.seed))
    return replace(trunk, head=head.to(device.device))


def save_reward_model(
    folder: Path, role: Role, lora: Lora | None, source: Path, probes: Sequence[Sequence[int]] = ()
) -> None:
    """Write a reward model.

    Args:
        lora: of the adapter; None where the whole trunk was trained.
        source: the SFT checkpoint it started from, whose tokenizer it shares.
        probes: sequences, prompt and response, whose scores are recorded for `read_probes`.
    """
    assert role.head is not None
    save_file(
        {name: tensor.contiguous() for name, tensor in role.head.state_dict().items()}, folder / "head.safetensors"
    )
    if lora is None:
        save_causal_lm(folder, role.model, source)
    else:
        state = {name: p.detach().contiguous() for name, p in adapter_parameters(role.model, ADAPTER).items()}
        save_file(state, folder / "adapter.safetensors")
    recorded = {"sequences": [list(ids) for ids in probes], "scores": [_score(role, ids) for ids in probes]}
    write_json(folder / DESCRIPTION, {"lora": lora.model_dump() if lora else None, "probes": recorded})


@torch.no_grad()
def _score(role: Role, ids: Sequence[int]) -> float:
    packed = pack([Example(list(ids), [False] * len(ids))], role.model.lm_head.weight.device)
    return float(role.scores(packed))


def read_probes(folder: Path) -> tuple[list[list[int]], list[float]]:
    """Sequences, and what the reward model scored each when it was saved.

    Raises:
        InputError: where there is no reward model, or none were recorded.
    """
    saved = _description(folder)["probes"]
    if not saved["sequences"]:
        raise InputError(f"{folder / DESCRIPTION}: it records no scores to compare with; run train_reward again")
    return saved["sequences"], saved["scores"]


def read_adapter(folder: Path) -> Lora | None:
    """The shape of a saved reward model's adapter; None where its trunk was trained.

    Raises:
        InputError: where there is no reward model.
    """
    saved = _description(folder)["lora"]
    return Lora(**saved) if saved else None


def _description(folder: Path) -> dict[str, Any]:
    return read_json(folder / DESCRIPTION, "there is no reward model; run the stage train_reward first")


def load_reward_model(
    folder: Path, device: Device, backbone: Any | None = None, sft: Path | None = None
) -> tuple[Role, Lora | None]:
    """Read a reward model for scoring, and the shape of its adapter if it is one.

    Args:
        backbone: a causal LM already in memory with the SFT weights, in the bits that the adapter was trained on, which
            a LoRA reward model then shares.
        sft: the SFT checkpoint, loaded where a LoRA reward model comes without a `backbone`.
    """
    lora = read_adapter(folder)
    if lora is None:
        model, adapter = load_on(folder, device).model, None
    else:
        assert backbone is not None or sft is not None, "a LoRA reward model needs its SFT backbone"
        model = backbone if backbone is not None else load_on(sft, device, lora.base_bits).model  # type: ignore[arg-type]
        add_adapter(model, ADAPTER, lora, seed=0)
        load_adapter_state(model, ADAPTER, load_file(folder / "adapter.safetensors"))
        adapter = ADAPTER
    head = ScalarHead(model.config.hidden_size)
    head.load_state_dict(load_file(folder / "head.safetensors"))
    return Role(model, adapter, head.to(device.device)), lora


@torch.no_grad()
def score_responses(role: Role, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> list[float]:
    """The score of one response a prompt."""
    examples = [Example.of_response(prompt, ids) for prompt, ids in zip(prompts, responses, strict=True)]
    device = role.model.lm_head.weight.device
    return torch.cat([role.scores(pack(rows, device)) for rows in chunks(examples, ROWS_AT_ONCE)]).tolist()
