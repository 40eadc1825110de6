"""AdamW with float32 master weights, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from chatloom.config import Optimizer
from chatloom.errors import InputError


@dataclass(frozen=True)
class ParameterGroup:
    parameters: list[nn.Parameter]
    lr: float


class MasterAdamW:
    """AdamW on float32 copies of parameters of any precision (Micikevicius 2017).

    A bfloat16 weight has 8 bits: an update of 1e-5 of it would round away. So each parameter's gradient is added to a
    float32 gradient as soon as the backward pass made it (which also makes accumulation exact to float32 rounding),
    the step is taken there, and the result is rounded back.
    """

    def __init__(self, groups: Iterable[ParameterGroup], params: Optimizer) -> None:
        self.params = params
        self._pairs: list[tuple[nn.Parameter, Tensor]] = []
        self._has_gradient: set[nn.Parameter] = set()
        """Since the last step; what a master's gradient holds otherwise is of the step before."""
        master_groups = []
        for group in groups:
            masters = [self._master(parameter) for parameter in group.parameters]
            master_groups.append({"params": masters, "lr": group.lr, "initial_lr": group.lr})
        assert self._pairs, "nothing to train"
        self.adamw = torch.optim.AdamW(
            master_groups, betas=(0.9, 0.95), eps=params.adam_eps, weight_decay=params.weight_decay, fused=True
        )

    def _master(self, parameter: nn.Parameter) -> Tensor:
        master = parameter.detach().to(torch.float32, copy=True)
        master.grad = torch.zeros_like(master)

        def move_gradient(parameter: nn.Parameter, master: Tensor = master) -> None:
            assert parameter.grad is not None
            if parameter in self._has_gradient:
                _gradient(master).add_(parameter.grad)
            else:  # over the old one, which so need not be cleared first
                _gradient(master).copy_(parameter.grad)
                self._has_gradient.add(parameter)
            parameter.grad = None

        parameter.register_post_accumulate_grad_hook(move_gradient)
        self._pairs.append((parameter, master))
        return master

    @torch.no_grad()
    def step(self, lr_factor: float, stage: str, step: int) -> float:
        """Clip the gradient's norm, take one step at `lr_factor` times the base rates; the norm before clipping.

        Args:
            stage: whose step this is, and `step` its number, for the error.

        Raises:
            InputError: where a gradient is not finite; no weight has changed then.
        """
        for parameter, master in self._pairs:
            if parameter not in self._has_gradient:
                _gradient(master).zero_()
        masters = [master for _, master in self._pairs]
        norm = torch.nn.utils.get_total_norm([_gradient(master) for master in masters])
        require_finite(norm, stage, step, what="gradient norm")
        if norm > self.params.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(masters, self.params.max_grad_norm, norm)
        for group in self.adamw.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor
        self.adamw.step()
        for parameter, master in self._pairs:
            parameter.copy_(master)
        self._has_gradient.clear()
        return float(norm)

    def state_dict(self) -> dict[str, Any]:
        """Masters, moments and step counts in the order of the parameters: the tensors themselves, not copies."""
        return {"masters": [master for _, master in self._pairs], "moments": self.adamw.state_dict()["state"]}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, by value; the parameters become the rounded masters they were then."""
        for (parameter, master), saved in zip(self._pairs, state["masters"], strict=True):
            master.copy_(saved)
            parameter.copy_(master)
        moments = {i: {name: value.clone() for name, value in own.items()} for i, own in state["moments"].items()}
        self.adamw.load_state_dict({"state": moments, "param_groups": self.adamw.state_dict()["param_groups"]})


def _gradient(master: Tensor) -> Tensor:
    assert master.grad is not None
    return master.grad


def lr_factor(step: int, num_steps: int, params: Optimizer) -> float:
    """Share of the base learning rate at `step` (from 0): linear warm-up, then constant, linear to 0 or cosine to 0."""
    if step < params.warmup_steps:
        return (step + 1) / (params.warmup_steps + 1)
    if params.schedule == "constant":
        return 1.0
    done = (step - params.warmup_steps) / max(num_steps - params.warmup_steps, 1)
    return 1.0 - done if params.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def require_finite(value: Tensor, stage: str, step: int, *, what: str = "loss") -> float:
    """`value` as a number.

    Raises:
        InputError: where it is NaN or infinite, before any weight is touched.
    """
    number = float(value.detach())
    if not math.isfinite(number):
        raise InputError(
            f"{stage}: the {what} is {number} at step {step}; lower {stage}.optimizer.lr, or look at the rows of that "
            "step (no weight was changed by it, nothing was written)"
        )
    return number
