from __future__ import annotations

import pytest
import torch

from chatloom.config import Lora
from chatloom.data.examples import Example
from chatloom.errors import InputError
from chatloom.models.adapters import Role, adapter_parameters, add_adapter, use_adapter
from chatloom.models.checkpoint import ChatModel
from chatloom.models.trunk import num_frozen_layers, run_below
from chatloom.packing import pack

EXAMPLES = [Example.of_response([5, 6, 7], [8, 9]), Example.of_response([10], [11, 12, 13])]


@pytest.fixture
def upper_lora(lora: Lora) -> Lora:
    return lora.model_copy(update={"layers": 1})


def trained(model: object, name: str) -> Role:
    """A role whose adapter is not zero any more."""
    generator = torch.Generator().manual_seed(len(name))
    for parameter in adapter_parameters(model, name).values():  # type: ignore[arg-type]
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return Role(model, name)


def test_only_the_last_layers_are_adapted(chat: ChatModel, upper_lora: Lora) -> None:
    assert num_frozen_layers(chat.model) == 0  # nothing says that a model without adapters is frozen
    add_adapter(chat.model, "policy", upper_lora, seed=0)
    assert num_frozen_layers(chat.model) == 1
    assert {key.split(".")[2] for key in adapter_parameters(chat.model, "policy")} == {"1"}
    add_adapter(chat.model, "value", upper_lora.model_copy(update={"layers": None}), seed=0)
    assert num_frozen_layers(chat.model) == 0


def test_two_parts_are_the_whole(chat: ChatModel, upper_lora: Lora) -> None:
    packed = pack(EXAMPLES)
    plain = Role(chat.model).logprobs(packed)
    add_adapter(chat.model, "policy", upper_lora, seed=0)
    policy = trained(chat.model, "policy")
    torch.testing.assert_close(Role(chat.model).logprobs(packed), plain, atol=0, rtol=0)

    use_adapter(chat.model, "policy")
    whole = chat.model.model(
        input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False, lengths=packed.lengths
    ).last_hidden_state[0]
    expected = torch.autograd.grad(whole.sum(), list(adapter_parameters(chat.model, "policy").values()))
    hidden = policy.hidden(packed)
    torch.testing.assert_close(policy.hidden(packed), hidden, atol=0, rtol=0)
    gradients = torch.autograd.grad(hidden.sum(), list(adapter_parameters(chat.model, "policy").values()))
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, atol=0, rtol=0)


def test_what_lies_below_serves_every_role(chat: ChatModel, upper_lora: Lora) -> None:
    for name in ("policy", "value"):
        add_adapter(chat.model, name, upper_lora, seed=0)
    roles = [trained(chat.model, "policy"), trained(chat.model, "value"), Role(chat.model)]
    packed = pack(EXAMPLES)
    expected = [role.logprobs(packed) for role in roles]

    below = run_below(chat.model, packed)
    assert below is not None
    assert [part.shape for part in below.split(packed.lengths)] == [(5, 32), (4, 32)]
    calls = []
    chat.model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    for role, logprobs in zip(roles, expected, strict=True):
        torch.testing.assert_close(role.logprobs(packed, below=below), logprobs, atol=0, rtol=0)
    assert calls == []


def test_another_models_lower_layers_are_not_used(chat: ChatModel, upper_lora: Lora) -> None:
    packed = pack(EXAMPLES)
    add_adapter(chat.model, "policy", upper_lora, seed=0)
    below = run_below(chat.model, packed)
    assert below is not None
    other = type(chat.model)(chat.model.config).eval()
    other.set_attn_implementation("chatloom")
    torch.testing.assert_close(Role(other).logprobs(packed, below=below), Role(other).logprobs(packed), atol=0, rtol=0)


def test_more_layers_than_there_are(chat: ChatModel, upper_lora: Lora) -> None:
    with pytest.raises(InputError, match=r"lora\.layers = 3: the model has 2 layers"):
        add_adapter(chat.model, "policy", upper_lora.model_copy(update={"layers": 3}), seed=0)
