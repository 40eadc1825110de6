"""ZeRO 3 by ColossalAI's Gemini: each rank keeps a slice of the weights too, and gathers a layer's when it is needed.

Importing this imports ColossalAI, which takes about 11 s: only processes that train with it do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from colossalai.booster import Booster
from colossalai.booster.plugin import GeminiPlugin
from colossalai.nn.optimizer import HybridAdam
from colossalai.tensor.param_op_hook import ColoParamOpHookManager
from torch import Tensor, nn

from chatloom.config import Optimizer
from chatloom.errors import InputError
from chatloom.optim import BETAS, ParameterGroup, saved_state
from chatloom.parallel.ranks import Ranks
from chatloom.parallel.slices import step_slices

CHUNK_M = 32.0
"""Weights, in 2^20, that are gathered at once, at least."""


class GeminiAdamW:
    """`chatloom.optim.Updates` for bfloat16 models whose weights are in slices.

    From now until `finish`, an operation that meets a parameter gathers it: every rank has to run the same operations
    in the same order, those without gradients included. Float32 heads stay whole on every rank.

    Args:
        placement: `static` keeps everything on the GPU, `auto` moves to the host's memory what does not fit.
    """

    whole_weights = False

    def __init__(self, groups: Sequence[ParameterGroup], params: Optimizer, ranks: Ranks, *, placement: str) -> None:
        self.params, self.ranks = params, ranks
        ColoParamOpHookManager.hooks = ()  # of one that an exception ended
        self._parameters = [parameter for group in groups for parameter in group.parameters]
        self._heads = [p for p in self._parameters if p.dtype == torch.float32]
        sliced = [p for p in self._parameters if p.dtype == torch.bfloat16]
        if not sliced:
            raise InputError("colossalai_gemini keeps weights in bfloat16; set runtime.dtype: bfloat16")
        on_gpu = sliced[0].is_cuda
        chunk = min(CHUNK_M, sum(p.numel() for p in sliced) / 2**20)
        plugin = GeminiPlugin(
            placement_policy=placement,
            precision="bf16",
            enable_gradient_accumulation=True,
            max_norm=0.0,  # clipping is ours, over heads and slices
            min_chunk_size_m=chunk,
            search_range_m=chunk,
            pin_memory=on_gpu,
            enable_async_reduce=on_gpu,
        )
        adam = HybridAdam(
            self._groups(groups, sliced), betas=BETAS, eps=params.adam_eps, weight_decay=params.weight_decay
        )
        self._model, self._gemini, *_ = Booster(plugin=plugin).boost(nn.ParameterList(sliced), adam)
        self._ids = {id(parameter): i for i, parameter in self._gemini.id_to_real_params.items()}
        self._whole = None
        if self._heads:
            self._whole = torch.optim.AdamW(
                self._groups(groups, self._heads),
                betas=BETAS,
                eps=params.adam_eps,
                weight_decay=params.weight_decay,
                fused=True,
            )
        self._steps = 0
        self._start_pass()

    def _groups(self, groups: Sequence[ParameterGroup], members: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
        wanted = set(map(id, members))
        own = [([p for p in group.parameters if id(p) in wanted], group.lr) for group in groups]
        return [{"params": found, "lr": lr, "initial_lr": lr} for found, lr in own if found]

    def _start_pass(self) -> None:
        # What GeminiDDP.forward does around a model's own forward pass; here it is around every operation, since the
        # loops call parts of the model.
        self._model.gemini_manager.pre_iter()
        ColoParamOpHookManager.hooks = tuple(self._model.hooks)

    def backward(self, loss: Tensor) -> None:
        # The library divides gradients by the number of ranks; the losses are shares of one sum already.
        self._gemini.backward(loss * self.ranks.size)
        self._start_pass()

    @torch.no_grad()
    def step(self, lr_factor: float, stage: str, step: int) -> float:
        chunks = [chunk.grad_chunk for chunk in self._gemini.chunk16_set]
        slices = [chunk.payload[: chunk.get_valid_length()] for chunk in chunks]
        optimizers = [optimizer for optimizer in (self._gemini, self._whole) if optimizer is not None]
        norm = step_slices(
            optimizers, slices, self._heads, self.ranks, self.params.max_grad_norm, lr_factor, stage, step
        )
        self._steps += 1
        return norm

    def state_dict(self) -> dict[str, Any]:
        masters: list[Tensor] = []
        moments: dict[int, dict[str, Tensor]] = {}
        step = torch.tensor(float(self._steps))
        for i, parameter in enumerate(self._parameters):
            if id(parameter) not in self._ids:
                assert self._whole is not None
                first = slice(None) if self.ranks.rank == 0 else slice(0)
                state = self._whole.state[parameter]
                masters.append(parameter.detach().flatten()[first])
                moments[i] = {name: state[name].flatten()[first] for name in ("exp_avg", "exp_avg_sq")}
            else:
                master, _, state = self._slice(parameter)
                masters.append(master)
                moments[i] = {name: state.get(name, master[:0]) for name in ("exp_avg", "exp_avg_sq")}
            moments[i]["step"] = step
        return {"masters": masters, "moments": moments}

    @torch.no_grad()
    def load_state_dict(self, *parts: Mapping[str, Any]) -> None:
        ColoParamOpHookManager.hooks = ()  # slices stay apart: asking for a parameter's size would gather it
        for i, parameter in enumerate(self._parameters):
            whole, saved = saved_state(parts, i, parameter)
            self._steps = int(saved["step"])
            if id(parameter) not in self._ids:
                assert self._whole is not None
                parameter.copy_(whole)
                self._whole.state[parameter] = saved
                continue
            master, start, state = self._slice(parameter)
            part = slice(start, start + master.numel())
            master.copy_(whole.flatten()[part])
            if master.numel():
                moments = {name: saved[name].flatten()[part].clone() for name in ("exp_avg", "exp_avg_sq")}
                state |= {"step": self._steps, **moments}
        for chunk in self._gemini.chunk16_set:
            chunk.optim_update()
        self._start_pass()

    def _slice(self, parameter: nn.Parameter) -> tuple[Tensor, int, dict[str, Any]]:
        """This rank's part of a parameter's master, maybe nothing; where it begins in the parameter; Adam's state."""
        key = self._ids[id(parameter)]
        if key not in self._gemini.id_to_fake_params:
            return torch.empty(0), 0, {}
        fake = self._gemini.id_to_fake_params[key]
        begin, start, size = self._gemini.get_offsets(key)
        master = self._gemini.param_to_chunk16[fake].paired_chunk.payload
        return master[begin : begin + size], start, self._gemini.optim.state[fake]

    @torch.no_grad()
    def finish(self) -> None:
        ColoParamOpHookManager.hooks = ()
        manager = self._model.chunk_manager
        for chunk in self._gemini.chunk16_set:
            manager.access_chunk(chunk)
        for parameter in self._parameters:
            if id(parameter) in self._ids:
                parameter.data = parameter.data.clone()  # out of the chunk
        self._model.remove_hooks()
        for parameter in self._parameters:
            parameter.__class__ = nn.Parameter
