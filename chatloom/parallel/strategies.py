"""Strategies by name: who keeps which part of parameters, gradients and optimizer state."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch

from chatloom.config import Optimizer, Parallel
from chatloom.errors import InputError
from chatloom.optim import MasterAdamW, ParameterGroup, Updates
from chatloom.parallel.ranks import Ranks

ZERO = {"colossalai_zero1": (1, False), "colossalai_zero2": (2, False), "colossalai_zero2_cpu": (2, True)}
"""Stage, and whether the optimizer's state is in the host's memory."""
GEMINI = {"colossalai_gemini": "static", "colossalai_gemini_auto": "auto"}
"""Where weights, gradients and optimizer state are kept."""
HYBRID = "colossalai_hybrid"


def require_runnable(section: str, method: str, parallel: Parallel, device: torch.device) -> None:
    """
    Raises:
        InputError: where this version, the stage, the method or the device lacks `<section>.parallel.strategy`.
    """
    strategy = parallel.strategy
    key = f"{section}.parallel.strategy = {strategy!r}"
    remedy = "set colossalai_zero2, or colossalai_zero2_cpu where memory is short"
    if strategy in (*GEMINI, HYBRID) and section == "train_ppo":
        raise InputError(f"{key}: PPO samples from whole weights, and this slices them; {remedy}")
    if strategy in GEMINI and method == "lora":
        raise InputError(f"{key} and {section}.method = 'lora': Gemini slices only what trains; {remedy}")
    if strategy == HYBRID and method == "lora":
        raise InputError(f"{key} and {section}.method = 'lora': layers in slices take no adapters here; {remedy}")
    if strategy == "colossalai_gemini_auto" and device.type != "cuda":
        raise InputError(f"{key} moves weights between a GPU and the host, and there is no GPU; set colossalai_gemini")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type == "cuda" and local > torch.cuda.device_count():
        raise InputError(
            f"{section}.parallel.num_processes = {parallel.num_processes}: {local} of them are on this machine, which "
            f"has {torch.cuda.device_count()} CUDA devices; lower it, or set runtime.device: cpu"
        )


def open_updates(
    groups: Sequence[ParameterGroup], params: Optimizer, parallel: Parallel, ranks: Ranks, model: Any
) -> Updates:
    """The optimizer of `parallel.strategy` for `groups`, every rank having the same parameters now.

    Args:
        model: the causal language model whose layers `colossalai_hybrid` puts into slices.

    Raises:
        InputError: where ColossalAI is needed and not installed, or `parallel.tensor_size` does not fit the model.
    """
    if parallel.strategy in ("none", "ddp"):
        return MasterAdamW(groups, params, ranks)
    if parallel.strategy == HYBRID:
        require_divisible(model.config, ranks.tensor)
    _prepare_colossalai(parallel.strategy, groups[0].parameters[0].device)
    if parallel.strategy in GEMINI:
        from chatloom.parallel.gemini import GeminiAdamW

        return GeminiAdamW(groups, params, ranks, placement=GEMINI[parallel.strategy])
    if parallel.strategy == HYBRID:
        from chatloom.parallel.hybrid import HybridAdamW

        return HybridAdamW(groups, params, ranks, model=model)
    from chatloom.parallel.zero import ZeroAdamW

    stage, offload = ZERO[parallel.strategy]
    return ZeroAdamW(groups, params, ranks, stage=stage, offload=offload)


def require_divisible(config: Any, size: int) -> None:
    """
    Raises:
        InputError: where `size` ranks cannot have equally many heads and columns of a model with this configuration.
    """
    counts = {
        "attention heads": config.num_attention_heads,
        "key and value heads": config.num_key_value_heads,
        "inner columns of its MLP": config.intermediate_size,
    }
    for what, count in counts.items():
        if count % size:
            raise InputError(
                f"parallel.tensor_size = {size} does not divide the model's {count} {what}; give one that does"
            )


def _prepare_colossalai(strategy: str, device: torch.device) -> None:
    if find_spec("colossalai") is None:
        raise InputError(
            f"parallel.strategy = {strategy!r} needs ColossalAI, which is not installed; install requirements.lock, or "
            "set strategy: ddp"
        )
    if device.type == "cpu":
        from chatloom.parallel.accelerator import use_cpu

        use_cpu()
