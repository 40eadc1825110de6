"""A trunk in two parts: the layers under the lowest adapter, alike for every role on a backbone, and those above.

Adapters on the upper layers only leave the lower ones what they were: their hidden states serve policy, reference,
reward and value, in every PPO epoch, and no gradient goes through them. T tokens of a pack, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from chatloom.packing import Packed


@dataclass(frozen=True)
class Below:
    """What the frozen lower layers of one backbone made of a pack."""

    model: Any
    hidden: Tensor
    """(1, T, H)"""

    def split(self, lengths: Sequence[int]) -> list[Tensor]:
        """(length, H) of each sequence."""
        return list(self.hidden[0].split(list(lengths)))


def num_frozen_layers(model: Any) -> int:
    """How many of the first layers carry no adapter at all; 0 where nothing is known to be frozen."""
    adapted = [any(isinstance(module, LoraLayer) for module in layer.modules()) for layer in model.model.layers]
    return adapted.index(True) if any(adapted) else 0


@torch.no_grad()
def run_below(model: Any, packed: Packed) -> Below | None:
    """The lower part of a forward pass; None where the model has no frozen lower layers."""
    count = num_frozen_layers(model)
    if not count:
        return None
    hidden = model.model.embed_tokens(packed.input_ids)
    return Below(model, _run(model, model.model.layers[:count], hidden, packed))


def run_above(below: Below, packed: Packed) -> Tensor:
    """(T, H) the trunk's last hidden states, by the adapters that are on."""
    model = below.model
    hidden = _run(model, model.model.layers[num_frozen_layers(model) :], below.hidden, packed)
    last: Tensor = model.model.norm(hidden)[0]
    return last


def _run(model: Any, layers: Sequence[nn.Module], hidden: Tensor, packed: Packed) -> Tensor:
    position_embeddings = model.model.rotary_emb(hidden, position_ids=packed.position_ids)
    for layer in layers:
        hidden = layer(
            hidden,
            attention_mask=None,
            position_embeddings=position_embeddings,
            position_ids=packed.position_ids,
            use_cache=False,
            lengths=packed.lengths,
        )
    return hidden
