"""LLaMA decoding with little between the matrix products: what a step of a small model costs beside its weights.

The same mathematics as transformers' LlamaForCausalLM, from that model's own weights. Reading those bounds a step, and
dozens of layers of small modules come on top. So products of one input are one product, weights on a CPU are laid out
once as its matrix kernels want them, and one pass serves rows that are under way and prompts that join them.

n rows under way, T tokens of a pass, H hidden size, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import CDLL
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from chatloom import kernels
from chatloom.models.decoder import KeyValueCache, Pass
from chatloom.models.norm import scale_to_unit
from chatloom.models.quantized_linear import QuantizedLinear

Linear = Callable[[Tensor], Tensor]
"""(T, in) to (T, out)"""

TILE = 16
"""Tokens of a pass over copied weights are a multiple of this: oneDNN generates code for every number it meets, which
costs milliseconds, and fewer tokens would not take less time."""


@dataclass(frozen=True)
class _Layer:
    attention_norm: Tensor
    query_key_value: Linear
    output: Linear
    mlp_norm: Tensor
    gated: Linear
    """silu(gate(x)) * up(x)"""
    down: Linear


class LlamaDecoder:
    """A `Decoder` over a LlamaForCausalLM, with the LoRA adapter that is on."""

    def __init__(self, model: Any, num_rows: int, *, snapshot: bool) -> None:
        """
        Args:
            num_rows: sequences at once, at most.
            snapshot: copy the weights, into the layout that is fastest on a CPU. It pays from a few dozen steps on,
                takes their memory a second time, and later changes to the model are not seen. Without it the model's
                own layers are called.
        """
        trunk, config = model.model, model.config
        quantized = any(isinstance(module, QuantizedLinear) for module in model.modules())
        linear = _copied if snapshot else _own
        with torch.no_grad():
            self._layers = [
                _Layer(
                    layer.input_layernorm.weight,
                    linear([layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]),
                    linear([layer.self_attn.o_proj]),
                    layer.post_attention_layernorm.weight,
                    _gated(layer.mlp.gate_proj, layer.mlp.up_proj, linear),
                    linear([layer.mlp.down_proj]),
                )
                for layer in trunk.layers
            ]
            self._head = _in_place(model.lm_head) if quantized else linear([model.lm_head])
        self._embed, self._rotary, self._norm = trunk.embed_tokens, trunk.rotary_emb, trunk.norm.weight
        self._epsilon: float = config.rms_norm_eps
        self._heads: tuple[int, int] = (config.num_attention_heads, config.num_key_value_heads)
        self._tile = TILE if snapshot and not quantized else 1
        self._kernels = kernels.attention_library(
            model.lm_head.weight, config.head_dim, config.num_attention_heads // config.num_key_value_heads
        )
        self._cache = KeyValueCache(num_rows, model.lm_head.weight.device, model.lm_head.weight.dtype)

    @torch.inference_mode()
    def extend(self, tokens: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        step = self._cache.open(tokens, prompts)
        hidden = self._embed(step.input_ids)  # (T, H)
        cos, sin = (part[0, :, None] for part in self._rotary(hidden, step.positions[None]))  # (T, 1, D)
        # (x1, x2) cos + (-x2, x1) sin: the sign goes into the sine.
        first, second = sin.chunk(2, dim=-1)
        rotation = cos, torch.cat((-first, second), dim=-1)
        hidden = F.pad(hidden, (0, 0, 0, -len(hidden) % self._tile))
        for index, layer in enumerate(self._layers):
            states = layer.query_key_value(self._scale(hidden, layer.attention_norm))
            hidden = hidden + layer.output(self._attend(index, states, rotation, step))
            hidden = hidden + layer.down(layer.gated(self._scale(hidden, layer.mlp_norm)))
        return self._head(self._scale(hidden[step.last], self._norm))

    def drop(self, row: int) -> None:
        self._cache.drop(row)

    def _scale(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return scale_to_unit(hidden, weight, self._epsilon)

    def _attend(self, layer: int, states: Tensor, rotation: tuple[Tensor, Tensor], step: Pass) -> Tensor:
        """Projected states (T, (heads + 2 key heads) * D) to (T, heads * D); what fills the tile stays 0."""
        n, count = step.num_rows, len(step.positions)
        parts = []
        if n:
            parts.append(self._attend_rows(layer, states[:n], [part[:n] for part in rotation], step))
        if step.prompt_lengths:
            parts += self._attend_prompts(layer, states[n:count], [part[n:] for part in rotation], step)
        if count < len(states):
            parts.append(states.new_zeros(len(states) - count, parts[0].shape[1]))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _attend_rows(self, layer: int, states: Tensor, rotation: Sequence[Tensor], step: Pass) -> Tensor:
        """One token of each row: it attends to all of its row that is in the cache, and to itself."""
        if self._kernels is not None:
            cosine, sine = (part.squeeze(1) for part in rotation)
            scale = cosine.shape[-1] ** -0.5
            return kernels.attend_rows(
                self._kernels, states, cosine, sine, self._cache.layer(layer), step.row_lengths, scale
            )
        queries, keys, values = self._turned(states, rotation)
        self._cache.write(layer, torch.stack((keys, values), dim=1), step.slots[: step.num_rows])
        # Query heads that share a key head are queries of that head: its keys are read once for all of them.
        grouped = queries.unflatten(1, (keys.shape[1], -1))
        return F.scaled_dot_product_attention(grouped, *self._cache.read(layer, step), step.mask).flatten(1)

    def _attend_prompts(self, layer: int, states: Tensor, rotation: Sequence[Tensor], step: Pass) -> list[Tensor]:
        """Prompts end to end: each attends to itself alone."""
        queries, keys, values = self._turned(states, rotation)
        self._cache.write(layer, torch.stack((keys, values), dim=1), step.slots[step.num_rows :])
        packed = (t.transpose(0, 1).split(step.prompt_lengths, dim=1) for t in (queries, keys, values))
        parts = []
        for q, k, v in zip(*packed, strict=True):
            own = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)
            parts.append(own[0].transpose(0, 1).flatten(1))
        return parts

    def _turned(self, states: Tensor, rotation: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Projected states (T, (heads + 2 key heads) * D) as queries, keys and values (T, heads, D), in position."""
        heads, key_heads = self._heads
        by_head = states.unflatten(-1, (heads + 2 * key_heads, -1))
        turned = _rotate(by_head[:, : heads + key_heads], *rotation)
        return turned[:, :heads], turned[:, heads:], by_head[:, heads + key_heads :]


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su 2021) of (T, heads, D), with the sign in the sine."""
    return torch.addcmul(states * cos, states.roll(states.shape[-1] // 2, dims=-1), sin)


def _own(layers: Sequence[nn.Module]) -> Linear:
    """The layers themselves on one input, their outputs side by side: adapters, quantized layers, any device."""
    if len(layers) == 1:
        return layers[0]
    return lambda states: torch.cat([layer(states) for layer in layers], dim=-1)


def _in_place(layer: nn.Linear) -> Linear:
    """The layer on its own weights: beside layers of few bits a copy of the head would be the largest part."""
    return layer if kernels.linear_library(layer.weight) is None else _product(layer.weight, layer.bias)


def _copied(layers: Sequence[nn.Module]) -> Linear:
    """The same as one product with a copy of the weights; quantized layers stay themselves.

    LoRA's A matrices are more rows of that product, and B takes what they give: W + BA in bfloat16 would lose what is
    smaller than half a unit in W's last place, and the policy that samples would not be the one that is trained.
    """
    bases: list[Any] = [layer.get_base_layer() if isinstance(layer, LoraLayer) else layer for layer in layers]
    if any(type(base) is not nn.Linear for base in bases):
        return _own(layers)
    adapters = [_adapter(layer, base) for layer, base in zip(layers, bases, strict=True)]
    downs = torch.cat([down for down, _ in adapters])  # (ranks, in)
    ups = torch.block_diag(*(up for _, up in adapters)).T.contiguous()  # (ranks, out)
    biases = [base.bias for base in bases if base.bias is not None]
    bias = torch.cat([*biases, downs.new_zeros(len(downs))]) if biases else None
    product = _product(torch.cat([*(base.weight for base in bases), downs]), bias)
    width = ups.shape[1]

    def adapted(states: Tensor) -> Tensor:
        both = product(states)
        return torch.addmm(both[:, :width], both[:, width:], ups)

    return adapted if len(downs) else product


def _adapter(layer: Any, base: nn.Linear) -> tuple[Tensor, Tensor]:
    """A (rank, in) and scale * B (out, rank) of the adapter that is on; rank 0 where none is."""
    on = isinstance(layer, LoraLayer) and not layer.disable_adapters
    for name in layer.active_adapters if on else ():
        if name in layer.lora_A:
            return layer.lora_A[name].weight, layer.lora_B[name].weight * layer.scaling[name]
    return base.weight.new_empty(0, base.in_features), base.weight.new_empty(base.out_features, 0)


def _gated(gate: Any, up: Any, linear: Callable[[Sequence[nn.Module]], Linear]) -> Linear:
    plain = linear is _copied and all(type(layer) is nn.Linear and layer.bias is None for layer in (gate, up))
    library = kernels.linear_library(gate.weight) if plain else None
    if library is not None:
        return _kernel_gated(library, gate.weight.detach().clone(), up.weight.detach().clone())
    if linear is _copied and type(gate) is type(up) is nn.Linear and _has_blocks(gate.weight):
        # oneDNN applies silu, and then the other factor, to results that are still float32 and in its registers.
        silu, times = torch.ops.mkldnn._linear_pointwise.default, torch.ops.mkldnn._linear_pointwise.binary
        first, second = _blocked(gate.weight), _blocked(up.weight)
        return lambda states: times(states, silu(states, first, gate.bias, "swish", [], ""), second, up.bias, "mul")
    if isinstance(gate, QuantizedLinear):  # nothing is gained by laying the two side by side
        return lambda states: F.silu(gate(states)) * up(states)
    both = linear([gate, up])

    def gated(states: Tensor) -> Tensor:
        left, right = both(states).chunk(2, dim=-1)
        return F.silu(left) * right

    return gated


def _kernel_gated(library: CDLL, gate: Tensor, up: Tensor) -> Linear:
    def gated(states: Tensor) -> Tensor:
        if len(states) <= kernels.LINEAR_ROWS:
            return kernels.linear(library, states, up, gate=gate)
        return F.silu(F.linear(states, gate)) * F.linear(states, up)

    return gated


def _product(weight: Tensor, bias: Tensor | None) -> Linear:
    """x W^T + b"""
    library = kernels.linear_library(weight)
    if library is not None:
        return lambda states: (
            kernels.linear(library, states, weight, bias=bias)
            if len(states) <= kernels.LINEAR_ROWS
            else F.linear(states, weight, bias)
        )
    if not _has_blocks(weight):
        return lambda states: F.linear(states, weight, bias)
    blocked, multiply = _blocked(weight), torch.ops.mkldnn._linear_pointwise.default
    return lambda states: multiply(states, blocked, bias, "none", [], "")


def _has_blocks(weight: Tensor) -> bool:
    """Whether oneDNN multiplies with it fastest in a blocked layout, which F.linear makes anew in every call."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def _blocked(weight: Tensor) -> Tensor:
    blocked: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), TILE)
    return blocked
