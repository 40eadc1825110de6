"""What SFT and reward training begin with."""

from pathlib import Path

import torch

from chatloom.config import Training
from chatloom.device import Device
from chatloom.models.adapters import Role, add_adapter
from chatloom.models.checkpoint import load_on


def trainable(checkpoint: Path, adapter: str, params: Training, device: Device) -> Role:
    """The model as `params.method` wants it trained: whole, or with a new adapter called `adapter`."""
    torch.manual_seed(params.seed)
    model = load_on(checkpoint, device).model
    if params.activation_checkpointing:
        model.activation_checkpointing_enable()
        model.train()
    if params.method == "full":
        return Role(model)
    add_adapter(model, adapter, params.lora, params.seed)
    return Role(model, adapter)
