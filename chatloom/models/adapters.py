"""LoRA adapters (Hu 2021) by name on one backbone, and the roles that use them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from chatloom.config import Lora, Training
from chatloom.device import Device
from chatloom.errors import InputError
from chatloom.models.checkpoint import load_on
from chatloom.models.four_bit import dequantized
from chatloom.models.head import ScalarHead
from chatloom.models.trunk import Below, run_above, run_below
from chatloom.packing import Packed
from chatloom.tensors import gather_logprobs, logprobs_and_entropies


@dataclass(frozen=True)
class Role:
    """A model as one part plays it: a backbone, the adapter that is on (None: all off), a head if it scores."""

    model: Any
    """A causal language model: `.model` is the trunk, `.lm_head` the output embedding."""
    adapter: str | None = None
    head: ScalarHead | None = None

    def hidden(self, packed: Packed, below: Below | None = None) -> Tensor:
        """(T, H) the trunk's last hidden states.

        The adapter stays on afterwards: a backward pass, which recomputes checkpointed layers, must find it.

        Args:
            below: of this pack, where a role on the same backbone has been through its lower layers already.
        """
        use_adapter(self.model, self.adapter)
        if below is None or below.model is not self.model:
            below = run_below(self.model, packed)
        if below is not None:
            return run_above(below, packed)
        output = self.model.model(
            input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False, lengths=packed.lengths
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def logprobs(self, packed: Packed, temperature: float = 1.0, below: Below | None = None) -> Tensor:
        """(N) float32 log-probabilities of the predicted tokens."""
        hidden = self.hidden(packed, below)[packed.predictors]
        return gather_logprobs(hidden, self.model.lm_head.weight, packed.targets, temperature)

    def logprobs_and_entropy(
        self, packed: Packed, temperature: float, below: Below | None = None
    ) -> tuple[Tensor, Tensor]:
        """(N) and (N); no gradient flows through the entropy."""
        hidden = self.hidden(packed, below)[packed.predictors]
        return logprobs_and_entropies(hidden, self.model.lm_head.weight, packed.targets, temperature)

    def scores(self, packed: Packed, below: Below | None = None) -> Tensor:
        """(B) float32, one score a sequence, read at its last token."""
        assert self.head is not None
        scores: Tensor = self.head(self.hidden(packed, below)[packed.last])
        return scores

    def values(self, packed: Packed, below: Below | None = None) -> Tensor:
        """(N) float32, V before each predicted token."""
        assert self.head is not None
        values: Tensor = self.head(self.hidden(packed, below)[packed.predictors])
        return values

    def parameters(self) -> list[nn.Parameter]:
        """What trains when this role trains: its adapter or, without one, the whole model; and its head."""
        if self.adapter is not None:
            found = list(adapter_parameters(self.model, self.adapter).values())
        else:
            found = [
                p for name, p in self.model.named_parameters() if self.head is None or not name.startswith("lm_head")
            ]
        return found + ([self.head.weight, self.head.offset] if self.head is not None else [])


def trainable(checkpoint: Path, adapter: str, params: Training, device: Device) -> Role:
    """The model as `params.method` wants it trained: whole, or with a new adapter called `adapter`."""
    torch.manual_seed(params.seed)
    model = load_on(checkpoint, device, params.lora.base_bits).model
    if params.activation_checkpointing:
        model.activation_checkpointing_enable()
        model.train()
    if params.method == "full":
        return Role(model)
    add_adapter(model, adapter, params.lora, params.seed)
    return Role(model, adapter)


def add_adapter(model: nn.Module, name: str, lora: Lora, seed: int) -> None:
    """Put a LoRA adapter on `model` in place, in the model's own precision; B is zero, so nothing changes yet.

    Raises:
        InputError: where `lora.target_modules` names a layer the model does not have.
    """
    names = {
        key.rsplit(".", 1)[-1] for key, module in model.named_modules() if isinstance(module, nn.Linear | LoraLayer)
    }
    unknown = sorted(set(lora.target_modules) - names)
    if unknown:
        raise InputError(f"lora.target_modules: the model has no linear layer {unknown[0]!r}; it has {sorted(names)}")
    num_layers = cast("int", cast(Any, model).config.num_hidden_layers)
    if lora.layers is not None and lora.layers > num_layers:
        raise InputError(
            f"lora.layers = {lora.layers}: the model has {num_layers} layers; give at most so many, or null"
        )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=list(lora.target_modules),
        layers_to_transform=None if lora.layers is None else list(range(num_layers - lora.layers, num_layers)),
        bias="none",
    )
    # PEFT would try its backends for quantized layers first, and import gptqmodel (20 s) to ask.
    config._register_custom_module({nn.Linear: LoraLinear})
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(config, model, adapter_name=name)
    dtype = next(p.dtype for key, p in model.named_parameters() if "lora_" not in key)
    for parameter in adapter_parameters(model, name).values():
        parameter.data = parameter.data.to(dtype)
    for key, parameter in model.named_parameters():
        if "lora_" not in key:
            parameter.requires_grad_(False)


def use_adapter(model: nn.Module, name: str | None) -> None:
    """Switch every layer to adapter `name`, or all adapters off. Which parameters require gradients stays as it is."""
    for layer in _layers(model):
        layer._disable_adapters = name is None
        if name is not None:
            layer._active_adapter = [name]


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The adapter's parameters by their name without the adapter's, so that adapters can be compared and copied."""
    marker = f".{name}."
    return {
        key.replace(marker, "."): parameter
        for key, parameter in model.named_parameters()
        if "lora_" in key and marker in key
    }


@torch.no_grad()
def load_adapter_state(model: nn.Module, name: str, state: dict[str, Tensor]) -> None:
    """Copy saved values into an adapter that is already on the model."""
    parameters = adapter_parameters(model, name)
    assert parameters.keys() == state.keys(), "the saved adapter has other layers"
    for key, parameter in parameters.items():
        parameter.copy_(state[key])


def merge_adapter(model: Any, name: str) -> Any:
    """The same model as plain weights: W + scale * B A, summed in float32, every adapter removed.

    Where W was rounded to 4 bits it is what the adapter was trained on, and not the checkpoint's: so the result is the
    model whose losses, scores and KL were measured. It is in the host's memory then.
    """
    model = dequantized(model)
    for parent in list(model.modules()):
        for child_name, layer in list(parent.named_children()):
            if not isinstance(layer, LoraLayer):
                continue
            linear = layer.get_base_layer()
            if name in layer.lora_A:
                update = layer.lora_B[name].weight.float() @ layer.lora_A[name].weight.float() * layer.scaling[name]
                linear.weight.data = (linear.weight.data.float() + update.data).to(linear.weight.dtype)
            setattr(parent, child_name, linear)
    vars(model).pop("peft_config", None)  # else transformers would save it as an adapter
    return model


def _layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]
