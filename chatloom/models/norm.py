"""RMSNorm (Zhang 2019) of a LLaMA: one pass over the states where there is a kernel for it."""

from __future__ import annotations

from ctypes import CDLL
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from chatloom import kernels


def scale_to_unit(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """weight * hidden / rms(hidden) like hidden (..., H), rounded as transformers rounds it."""
    library = kernels.norm_library(hidden)
    if library is None:
        return F.rms_norm(hidden, weight.shape, weight, epsilon)
    if not torch.is_grad_enabled():
        return kernels.rms_norm(library, hidden, weight, epsilon)[0]
    return cast(Tensor, _KernelNorm.apply(hidden, weight, epsilon, library))


def use_kernels(model: nn.Module) -> None:
    """Let the RMSNorm layers of a LLaMA go through `scale_to_unit`; weights and names stay."""
    for module in model.modules():
        if type(module) is LlamaRMSNorm:
            module.__class__ = _Norm


class _Norm(LlamaRMSNorm):  # type: ignore[misc]
    def forward(self, hidden_states: Tensor) -> Tensor:
        # Weights in slices are gathered by PyTorch's own operations (`chatloom.parallel.gemini`).
        ordinary = type(self.weight) is nn.Parameter and hidden_states.dtype == self.weight.dtype
        if ordinary and kernels.norm_library(hidden_states) is not None:
            return scale_to_unit(hidden_states, self.weight, self.variance_epsilon)
        return cast(Tensor, super().forward(hidden_states))


class _KernelNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float, library: CDLL) -> Tensor:
        output, scale = kernels.rms_norm(library, hidden, weight, epsilon)
        ctx.library = library
        ctx.save_for_backward(hidden, weight, scale)
        return output

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, scale = ctx.saved_tensors
        hidden_grad, weight_grad = kernels.rms_norm_backward(ctx.library, upstream[0], hidden, weight, scale)
        return hidden_grad, weight_grad.to(weight.dtype), None, None
