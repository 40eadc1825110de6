"""AdamW with float32 master weights, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from ctypes import CDLL
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from chatloom import kernels
from chatloom.config import Optimizer
from chatloom.errors import InputError
from chatloom.parallel.ranks import ALONE, Ranks

BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class ParameterGroup:
    parameters: list[nn.Parameter]
    lr: float


class Updates(Protocol):
    """What a loop needs of a strategy (`chatloom.parallel.strategies`): gradients in, updated parameters out."""

    whole_weights: bool
    """Whether ranks with different rows need nothing of each other to look at them, and so may look at any number."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this rank's part of the loss to those of the optimizer step that is under way."""

    def step(self, lr_factor: float, stage: str, step: int) -> float:
        """Sum the gradients over the ranks, clip their norm, take one step at `lr_factor` times the base rates.

        Args:
            stage: whose step this is, and `step` its number, for the error.

        Returns:
            The norm before clipping, the same on every rank.

        Raises:
            InputError: where a gradient is not finite; no weight has changed then.
        """

    def state_dict(self) -> dict[str, Any]:
        """What this rank has to save: masters, moments and step counts in the order of the parameters, not copied."""

    def load_state_dict(self, *parts: Mapping[str, Any]) -> None:
        """Take over, by value, what `state_dict` gave on each rank of a run of any strategy and size, in their order.

        The parameters become the rounded masters they were then.
        """

    def finish(self) -> None:
        """Leave the parameters whole on every rank and ordinary; the last call."""


class MasterAdamW:
    """AdamW on float32 copies of parameters of any precision (Micikevicius 2017).

    A bfloat16 weight has 8 bits: an update of 1e-5 of it would round away. So the step is taken in float32 and the
    result rounded. A gradient stays as the backward pass made it while it is the only one of its step; from the second
    on they are added up in float32 as soon as they are there, so that accumulation is exact to float32 rounding. With
    several ranks each has all of it, and float32 gradients are summed once, before the step.
    """

    whole_weights = True

    def __init__(self, groups: Iterable[ParameterGroup], params: Optimizer, ranks: Ranks = ALONE) -> None:
        self.params, self.ranks = params, ranks
        self._pairs: list[tuple[nn.Parameter, Tensor]] = []
        self._gradients: dict[nn.Parameter, Tensor] = {}
        """Of the step that is under way."""
        master_groups = []
        for group in groups:
            masters = [self._master(parameter) for parameter in group.parameters]
            master_groups.append({"params": masters, "lr": group.lr, "initial_lr": group.lr})
        assert self._pairs, "nothing to train"
        self.adamw = torch.optim.AdamW(
            master_groups, betas=BETAS, eps=params.adam_eps, weight_decay=params.weight_decay, fused=True
        )
        for _, master in self._pairs:  # as AdamW would make them itself in its first step
            moments = {"exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master)}
            self.adamw.state[master] = {"step": torch.zeros((), device=master.device), **moments}
        # One bfloat16 parameter is enough: the kernel takes the float32 ones of a head as well.
        libraries = (kernels.adamw_library(parameter) for parameter, _ in self._pairs)
        self._library = next((library for library in libraries if library is not None), None)

    def _master(self, parameter: nn.Parameter) -> Tensor:
        def take_gradient(parameter: nn.Parameter) -> None:
            assert parameter.grad is not None
            if parameter in self._gradients:
                self._gradients[parameter] = self._gradients[parameter].float().add_(parameter.grad)
            else:
                self._gradients[parameter] = parameter.grad
            parameter.grad = None

        parameter.register_post_accumulate_grad_hook(take_gradient)
        master = parameter.detach().to(torch.float32, copy=True)
        self._pairs.append((parameter, master))
        return master

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def gradients(self, *, summed: bool) -> list[Tensor]:
        """Those of this rank since the last step, in the order of the parameters; what is changed here is stepped with.

        Args:
            summed: they will be summed over ranks, and, as over microbatches, in float32.
        """
        for parameter, _ in self._pairs:
            gradient = self._gradients.get(parameter)
            if gradient is None:
                gradient = torch.zeros_like(parameter)
            self._gradients[parameter] = gradient.float() if summed else gradient
        return [self._gradients[parameter] for parameter, _ in self._pairs]

    @torch.no_grad()
    def step(self, lr_factor: float, stage: str, step: int) -> float:
        self.ranks.sum_tensors(self.gradients(summed=self.ranks.size > 1))
        for group in self.adamw.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor
        if self._library is not None:
            norm = kernels.gradient_norm(self._library, list(self._gradients.values()))
            require_finite(norm, stage, step, what="gradient norm")
            self._step_by_kernel(self._library, min(1.0, self.params.max_grad_norm / (float(norm) + 1e-6)))
        else:
            masters = [master for _, master in self._pairs]
            for parameter, master in self._pairs:
                master.grad = self._gradients.pop(parameter).float()
            norm = torch.nn.utils.get_total_norm([master.grad for master in masters if master.grad is not None])
            require_finite(norm, stage, step, what="gradient norm")
            if norm > self.params.max_grad_norm:
                torch.nn.utils.clip_grads_with_norm_(masters, self.params.max_grad_norm, norm)
            self.adamw.step()
            self.adamw.zero_grad()
            for parameter, master in self._pairs:
                parameter.copy_(master)
        return float(norm)

    def _step_by_kernel(self, library: CDLL, clip: float) -> None:
        """What `self.adamw` would do to masters whose gradients are those of the parameters times `clip`."""
        parameters = {master: parameter for parameter, master in self._pairs}
        for group in self.adamw.param_groups:
            beta1, beta2 = group["betas"]
            for master in group["params"]:
                moments = self.adamw.state[master]
                moments["step"] += 1
                taken = float(moments["step"])
                rates = (
                    clip,
                    group["lr"] / (1 - beta1**taken),
                    group["lr"] * group["weight_decay"],
                    beta1,
                    beta2,
                    group["eps"],
                    1 / math.sqrt(1 - beta2**taken),
                )
                both = (moments["exp_avg"], moments["exp_avg_sq"])
                parameter = parameters[master]
                kernels.adamw(library, parameter, self._gradients.pop(parameter), master, both, rates)

    def state_dict(self) -> dict[str, Any]:
        if self.ranks.rank > 0:
            return {"masters": [], "moments": {}}  # the first rank's are the same
        return {"masters": [master for _, master in self._pairs], "moments": self.adamw.state_dict()["state"]}

    @torch.no_grad()
    def load_state_dict(self, *parts: Mapping[str, Any]) -> None:
        moments = {}
        for i, (parameter, master) in enumerate(self._pairs):
            whole, moments[i] = saved_state(parts, i, parameter)
            master.copy_(whole)
            parameter.copy_(master)
        self.adamw.load_state_dict({"state": moments, "param_groups": self.adamw.state_dict()["param_groups"]})

    def finish(self) -> None:
        """They are."""


def saved_state(parts: Iterable[Mapping[str, Any]], i: int, parameter: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Master and Adam's state of parameter `i`, put together from what each rank saved, in the parameter's shape.

    A rank saves a tensor whole, a slice of it laid flat (the last one padded), or nothing of it.

    Raises:
        InputError: where they saved another model's.
    """

    def join(slices: Iterable[Tensor]) -> Tensor:
        return torch.cat([part.flatten() for part in slices])[: parameter.numel()].view(parameter.shape)

    holders = [part for part in parts if i < len(part["masters"])]
    saved = sum(part["masters"][i].numel() for part in holders)
    if not 0 <= saved - parameter.numel() < max(len(holders), 1):
        raise InputError(
            f"the saved state is of another model: its parameter {i} has {saved} numbers, this one's "
            f"{parameter.numel()}; start with the model that was trained, or remove the state to start afresh"
        )
    states = [part["moments"][i] for part in holders]
    moments = {name: join(state[name] for state in states) for name in ("exp_avg", "exp_avg_sq")}
    return join(part["masters"][i] for part in holders), {"step": states[0]["step"].clone(), **moments}


def sum_of_squares(tensors: Sequence[Tensor]) -> float:
    """In float32, whatever their precision."""
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in tensors]
    return float(torch.stack(norms).square().sum()) if norms else 0.0


def clip(gradients: Iterable[Tensor], norm: float, most: float) -> None:
    """Scale gradients, in place, that have `norm` together and with those of other ranks, to a norm of `most`."""
    if (scale := most / (norm + 1e-6)) < 1:
        for gradient in gradients:
            gradient *= scale


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
