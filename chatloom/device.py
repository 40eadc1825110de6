"""Where and in which precision a process computes."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from chatloom.errors import InputError


@dataclass(frozen=True)
class Device:
    device: torch.device
    dtype: torch.dtype
    """Of weights and activations; heads, losses and optimizer state are float32."""


def resolve_device(device: str = "auto", dtype: str = "auto", num_threads: int = 0) -> Device:
    """`runtime` of params as torch objects; also sets the number of CPU threads.

    Raises:
        InputError: where `runtime.device` names hardware this machine lacks.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("runtime.device = 'cuda': this machine has no usable CUDA device; set 'cpu' or 'auto'")
    where = own_gpu() if device != "cpu" and torch.cuda.is_available() else torch.device("cpu")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # that train together on this machine
    torch.set_num_threads(num_threads or max(len(os.sched_getaffinity(0)) // processes, 1))
    if dtype == "auto":
        return Device(where, torch.bfloat16 if _multiplies_bfloat16(where) else torch.float32)
    return Device(where, torch.bfloat16 if dtype == "bfloat16" else torch.float32)


def own_gpu() -> torch.device:
    """The GPU of this process among those that train together on this machine."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _multiplies_bfloat16(where: torch.device) -> bool:
    """Whether bf16 is the fast path: emulated bf16 on an older CPU is slower than float32."""
    if where.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
