from __future__ import annotations

import pytest
import torch
from torch import Tensor

from chatloom.tensors import gather_logprobs, logprobs_and_entropies


def oracle(hidden: Tensor, head: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Autograd's own way, in float64."""
    logprobs = torch.log_softmax(hidden.double() @ head.double().T / temperature, dim=-1)
    return logprobs.gather(1, targets[:, None]).squeeze(1), -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("chunk", [3, 512])
def test_logprobs_entropies_and_gradients(train_head: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatloom.tensors.LOGITS_CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 4, generator=generator, requires_grad=True)
    head = torch.randn(6, 4, generator=generator).requires_grad_(train_head)
    targets = torch.tensor([0, 1, 2, 3, 4, 5, 0])
    weights = torch.randn(7, generator=generator)  # each token's loss has a weight of its own, as an advantage
    inputs = [hidden, head] if train_head else [hidden]

    expected, expected_entropies = oracle(hidden, head, targets, 0.7)
    expected_gradients = torch.autograd.grad((weights * expected).sum(), inputs)
    found, entropies = logprobs_and_entropies(hidden, head, targets, 0.7)
    assert not entropies.requires_grad
    torch.testing.assert_close(found, expected.float())
    torch.testing.assert_close(entropies, expected_entropies.float())
    for gradient, wanted in zip(torch.autograd.grad((weights * found).sum(), inputs), expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_no_tokens() -> None:
    hidden = torch.zeros(0, 4, requires_grad=True)
    logprobs = gather_logprobs(hidden, torch.ones(5, 4), torch.zeros(0, dtype=torch.long))
    assert logprobs.shape == (0,)
    logprobs.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 4)
