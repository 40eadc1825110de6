"""Frozen weights under adapters in 4 bits: NF4 with double quantization (QLoRA, Dettmers 2023), by bitsandbytes.

The linear layers of the blocks only; embeddings, norms and the output embedding stay as they are.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from chatloom.device import Device
from chatloom.errors import InputError

BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a weight: its code, its share of a scale of 8 bits for 64 weights, and of a scale in float32 for 256 of those."""


def require_available(device: torch.device) -> None:
    """
    Raises:
        InputError: where bitsandbytes is not installed, or cannot quantize on `device`.
    """
    # It recommends a kernel for CPUs that it would fetch from a hub, and that is of no use to training.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes

        bitsandbytes.functional.quantize_4bit(torch.zeros(64, device=device), quant_type="nf4")
    except (ImportError, RuntimeError) as error:
        raise InputError(
            f"lora.base_bits = 4: bitsandbytes does not run on {device} here ({str(error).strip().splitlines()[0]}); "
            "set it to null in every stage, or install bitsandbytes for this device"
        ) from error


def settings(device: Device) -> dict[str, Any]:
    """What `from_pretrained` needs to quantize a checkpoint's tensors one by one, as they come to `device`."""
    from transformers import BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=device.dtype,
    )
    return {"quantization_config": nf4, "device_map": {"": device.device}}


def keep_gradients(model: Any) -> None:
    """Let gradients go through 4-bit layers on every CPU.

    In a pass without gradients bitsandbytes lays weights out anew for inference where the CPU multiplies bfloat16, and
    from then on none goes through them, without a word.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def dequantized(model: Any) -> Any:
    """The model with whole weights, each the value that its 4 bits stood for; one without such layers as it is.

    It comes in the host's memory, for the device may have no room for it.
    """
    return model.to("cpu").dequantize() if getattr(model, "is_quantized", False) else model
