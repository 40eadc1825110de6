"""ZeRO 1 and 2 (Rajbhandari 2020) by ColossalAI: each rank keeps the optimizer's state of its slice of every parameter.

Importing this imports ColossalAI, which takes about 11 s: only processes that train with it do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from colossalai.booster import Booster
from colossalai.booster.plugin import LowLevelZeroPlugin
from torch import Tensor, nn

from chatloom.config import Optimizer
from chatloom.optim import BETAS, ParameterGroup, saved_state
from chatloom.parallel.ranks import Ranks
from chatloom.parallel.slices import step_slices


class ZeroAdamW:
    """`chatloom.optim.Updates` with float32 masters and moments in slices, one a rank.

    Parameters of another precision than the first one's, the float32 heads of a bfloat16 model, are small: they stay
    whole on every rank.

    Args:
        stage: 1 slices the optimizer's state, 2 the gradients too, which are then summed in every backward pass.
        offload: keep masters and moments in the host's memory.
    """

    whole_weights = True

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        params: Optimizer,
        ranks: Ranks,
        *,
        stage: int,
        offload: bool,
    ) -> None:
        self.params, self.ranks, self._stage = params, ranks, stage
        self._parameters = [parameter for group in groups for parameter in group.parameters]
        dtype = self._parameters[0].dtype
        sliced, whole = ([part for group in groups for part in _part(group, dtype, same)] for same in (True, False))
        on_gpu = self._parameters[0].is_cuda
        # fp32 as the plugin's precision leaves the parameters' own as it is; clipping is ours, over both kinds.
        plugin = LowLevelZeroPlugin(
            stage=stage, precision="fp32", max_norm=0.0, overlap_communication=on_gpu, cpu_offload=offload
        )
        parameters = nn.ParameterList(parameter for group in sliced for parameter in group["params"])
        _, self._zero, *_ = Booster(plugin=plugin).boost(parameters, self._adamw(sliced))
        self._whole = self._adamw(whole) if whole else None

    def _adamw(self, groups: list[dict[str, Any]]) -> torch.optim.AdamW:
        p = self.params
        return torch.optim.AdamW(groups, betas=BETAS, eps=p.adam_eps, weight_decay=p.weight_decay, fused=True)

    def backward(self, loss: Tensor) -> None:
        # The library divides gradients by the number of ranks; the losses are shares of one sum already.
        loss = loss * self.ranks.size
        if self._stage == 1:
            with self._zero.no_sync():  # gradients add up here, and are summed over the ranks once, in `step`
                self._zero.backward(loss)
        else:
            self._zero.backward(loss)

    @torch.no_grad()
    def step(self, lr_factor: float, stage: str, step: int) -> float:
        if self._stage == 1:
            self._zero._sync_grad()
        slices = [
            grad for i in range(self._zero.num_param_groups) for grad in self._zero.get_working_grads_by_group_id(i)
        ]
        optimizers = [optimizer for optimizer in (self._zero, self._whole) if optimizer is not None]
        return step_slices(
            optimizers, slices, self._heads(), self.ranks, self.params.max_grad_norm, lr_factor, stage, step
        )

    def state_dict(self) -> dict[str, Any]:
        masters, moments = [], {}
        for i, parameter in enumerate(self._parameters):
            master, state = self._held(parameter)
            masters.append(master.detach())
            moments[i] = state
        return {"masters": masters, "moments": moments}

    @torch.no_grad()
    def load_state_dict(self, *parts: Mapping[str, Any]) -> None:
        for i, parameter in enumerate(self._parameters):
            whole, state = saved_state(parts, i, parameter)
            parameter.copy_(whole)
            master = self._master(parameter)
            optimizer = self._optimizer(parameter)
            if master is not parameter:
                master.copy_(self._slice(whole, master))
                state = {name: v if name == "step" else self._slice(v, master) for name, v in state.items()}
            optimizer.state[master] = {name: value.to(master.device) for name, value in state.items()}

    def finish(self) -> None:
        """They are whole; the hooks go with the optimizer."""

    def _held(self, parameter: nn.Parameter) -> tuple[Tensor, dict[str, Tensor]]:
        """What this rank saves of a parameter: its slice; of a whole one everything on the first rank, else nothing."""
        master = self._master(parameter)
        state = self._optimizer(parameter).state[master]
        if master is parameter and self.ranks.rank > 0:
            return master[:0], {name: v if name == "step" else v[:0] for name, v in state.items()}
        return master, state

    def _master(self, parameter: nn.Parameter) -> Tensor:
        """Where Adam works: this rank's float32 slice, or the parameter itself where it is whole."""
        master: Tensor = self._zero.get_working_to_master_map().get(id(parameter), parameter)
        return master

    def _optimizer(self, parameter: nn.Parameter) -> Any:
        return self._zero.optim if id(parameter) in self._zero.get_working_to_master_map() else self._whole

    def _slice(self, whole: Tensor, master: Tensor) -> Tensor:
        """This rank's slice of a tensor, laid flat and padded to a multiple of the ranks."""
        flat = whole.flatten()
        flat = torch.nn.functional.pad(flat, (0, master.numel() * self.ranks.size - flat.numel()))
        return flat.chunk(self.ranks.size)[self.ranks.rank].clone()

    def _heads(self) -> list[nn.Parameter]:
        return [p for group in self._whole.param_groups for p in group["params"]] if self._whole is not None else []


def _part(group: ParameterGroup, dtype: torch.dtype, same: bool) -> list[dict[str, Any]]:
    """The group's parameters of this precision, or the others, as a group of PyTorch's; none where there is none."""
    own = [parameter for parameter in group.parameters if (parameter.dtype == dtype) == same]
    return [{"params": own, "lr": group.lr, "initial_lr": group.lr}] if own else []
