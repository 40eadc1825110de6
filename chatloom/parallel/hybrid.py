"""Tensor slices (Shoeybi 2019) by ColossalAI's HybridParallelPlugin: neighbouring ranks compute each layer together.

Importing this imports ColossalAI, which takes about 11 s: only processes that train with it do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from colossalai.booster.plugin import HybridParallelPlugin
from colossalai.shardformer import ShardFormer
from colossalai.shardformer.layer import Linear1D_Col, Linear1D_Row
from colossalai.shardformer.policies.base_policy import (
    ModulePolicyDescription,
    Policy,
    SubModuleReplacementDescription,
)
from torch import Tensor, nn

from chatloom.config import Optimizer
from chatloom.optim import MasterAdamW, ParameterGroup, clip, require_finite, saved_state, sum_of_squares
from chatloom.parallel.ranks import Ranks

SLICED = {
    **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), Linear1D_Col),
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), Linear1D_Col),
    **dict.fromkeys(("self_attn.o_proj", "mlp.down_proj"), Linear1D_Row),
}
"""Attention by heads, the MLP by its inner columns: one sum over the slices after each."""
DIMENSION = {Linear1D_Col: 0, Linear1D_Row: 1}
"""Of a weight (out, in), which is in slices."""


class HybridAdamW:
    """`chatloom.optim.Updates` for a model whose layers are in slices; each rank updates what it has.

    Embeddings, norms and heads are whole on every rank, and get the same gradients on ranks that share a model. Those
    with the same slice of different rows sum their gradients once a step, in float32.
    """

    whole_weights = True

    def __init__(self, groups: Sequence[ParameterGroup], params: Optimizer, ranks: Ranks, *, model: Any) -> None:
        self.params, self.ranks, self._model = params, ranks, model
        # zero_stage 0 and no Booster: the loops call parts of the model, and DistributedDataParallel wants it whole.
        self._plugin = HybridParallelPlugin(tp_size=ranks.tensor, pp_size=1, precision="fp32")
        ShardFormer(self._plugin.shard_config).optimize(model, policy=_Slices())
        self._dimensions: dict[int, int] = {}
        for module in model.modules():
            if type(module) in DIMENSION:
                self._dimensions[id(module.weight)] = DIMENSION[type(module)]
                if type(module) is Linear1D_Col and module.bias is not None:
                    self._dimensions[id(module.bias)] = 0
        self._parameters = [parameter for group in groups for parameter in group.parameters]
        # Clipping is ours, by the norm over all slices.
        self._adamw = MasterAdamW(groups, params.model_copy(update={"max_grad_norm": math.inf}))

    def backward(self, loss: Tensor) -> None:
        self._adamw.backward(loss)

    @torch.no_grad()
    def step(self, lr_factor: float, stage: str, step: int) -> float:
        gradients = self._adamw.gradients(summed=True)
        if self.ranks.data_size > 1:
            works = [dist.all_reduce(grad, group=self._plugin.dp_group, async_op=True) for grad in gradients]
            for work in works:
                work.wait()
        sliced: list[Tensor] = []
        whole: list[Tensor] = []
        for parameter, grad in zip(self._parameters, gradients, strict=True):
            (sliced if id(parameter) in self._dimensions else whole).append(grad)
        squares = torch.tensor(sum_of_squares(sliced), dtype=torch.float64)
        dist.all_reduce(squares, group=self._plugin.tp_group)
        norm = require_finite((squares + sum_of_squares(whole)).sqrt(), stage, step, what="gradient norm")
        clip(gradients, norm, self.params.max_grad_norm)
        self._adamw.step(lr_factor, stage, step)
        return norm

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """As `Updates` says; every rank takes part, since the first one saves tensors that are put together."""
        own = self._adamw.state_dict()
        masters, moments = [], {}
        for i, parameter in enumerate(self._parameters):
            state = own["moments"][i]
            parts = (own["masters"][i], state["exp_avg"], state["exp_avg_sq"])
            master, exp_avg, exp_avg_sq = (self._whole(tensor, parameter).cpu() for tensor in parts)
            if self.ranks.rank == 0:
                masters.append(master)
                moments[i] = {"step": state["step"], "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        return {"masters": masters, "moments": moments}

    def load_state_dict(self, *parts: Mapping[str, Any]) -> None:
        masters, moments = [], {}
        for i, parameter in enumerate(self._parameters):
            whole, state = saved_state(parts, i, torch.empty(self._whole_shape(parameter), device="meta"))
            masters.append(self._slice(whole, parameter))
            own = {name: self._slice(state[name], parameter) for name in ("exp_avg", "exp_avg_sq")}
            moments[i] = {"step": state["step"], **own}
        self._adamw.load_state_dict({"masters": masters, "moments": moments})

    @torch.no_grad()
    def finish(self) -> None:
        for name, module in list(self._model.named_modules()):
            if type(module) in DIMENSION:
                weight = self._whole(module.weight, module.weight)
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None, device="meta")
                linear.weight = nn.Parameter(weight)
                if module.bias is not None:
                    linear.bias = nn.Parameter(self._whole(module.bias, module.bias))
                parent, _, child = name.rpartition(".")
                setattr(self._model.get_submodule(parent), child, linear)

    def _whole(self, tensor: Tensor, parameter: Tensor) -> Tensor:
        """Put together, where it is of a parameter in slices."""
        dimension = self._dimensions.get(id(parameter))
        if dimension is None:
            return tensor.detach()
        parts = [torch.empty_like(tensor) for _ in range(self.ranks.tensor)]
        dist.all_gather(parts, tensor.detach().contiguous(), group=self._plugin.tp_group)
        return torch.cat(parts, dimension)

    def _whole_shape(self, parameter: Tensor) -> list[int]:
        shape = list(parameter.shape)
        if (dimension := self._dimensions.get(id(parameter))) is not None:
            shape[dimension] *= self.ranks.tensor
        return shape

    def _slice(self, whole: Tensor, parameter: Tensor) -> Tensor:
        """This rank's part of a saved tensor."""
        dimension = self._dimensions.get(id(parameter))
        if dimension is None:
            return whole
        return whole.chunk(self.ranks.tensor, dimension)[self.ranks.rank % self.ranks.tensor].contiguous()


class _Slices(Policy):  # type: ignore[misc]
    """What ColossalAI replaces in each decoder layer; the rest of the model, and its forward pass, stay as they are."""

    def config_sanity_check(self) -> None:
        """`chatloom.parallel.strategies.require_divisible` has looked."""

    def preprocess(self) -> Any:
        return self.model

    def module_policy(self) -> dict[Any, ModulePolicyDescription]:
        replaced = [SubModuleReplacementDescription(name, target, {}) for name, target in SLICED.items()]
        return {type(self.model.model.layers[0]): ModulePolicyDescription(sub_module_replacement=replaced)}

    def postprocess(self) -> Any:
        return self.model
