from __future__ import annotations

import pytest
import torch
from torch import Tensor

from chatloom.models.attention import KERNEL_UP_TO, packed_attention


def by_hand(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Softmax of one sequence, head and place after the other, in float64; (1, T, heads, D)."""
    groups = query.shape[1] // key.shape[1]
    output = torch.zeros_like(query)
    start = 0
    for length in lengths:
        for head in range(query.shape[1]):
            for t in range(start, start + length):
                scores = key[0, head // groups, start : t + 1] @ query[0, head, t] / query.shape[3] ** 0.5
                output[0, head, t] = scores.softmax(0) @ value[0, head // groups, start : t + 1]
        start += length
    return output.transpose(1, 2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("train", [True, False])
def test_output_and_gradients(dtype: torch.dtype, tolerance: float, train: bool) -> None:
    lengths = (5, 1, 7)
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(1, heads, 13, 8, generator=generator).to(dtype).requires_grad_(train) for heads in (4, 2, 2)]
    exact = [state.detach().double().requires_grad_() for state in states]
    upstream = torch.randn(1, 13, 4, 8, generator=generator).to(dtype)

    found, _ = packed_attention(torch.nn.Module(), *states, None, lengths=lengths)
    expected = by_hand(*exact, lengths)
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=0)
    if train:
        gradients = torch.autograd.grad(found, states, upstream)
        for gradient, wanted in zip(gradients, torch.autograd.grad(expected, exact, upstream.double()), strict=True):
            torch.testing.assert_close(gradient.double(), wanted, atol=tolerance, rtol=0)


def test_a_pass_with_gradients_scores_as_one_without() -> None:
    """Else the ratio before the first PPO update would not be 1."""
    lengths = (40, KERNEL_UP_TO // 2)
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(1, heads, sum(lengths), 16, generator=generator).bfloat16() for heads in (4, 2, 2)]
    scored, _ = packed_attention(torch.nn.Module(), *states, None, lengths=lengths)
    trained, _ = packed_attention(
        torch.nn.Module(), *(s.clone().requires_grad_() for s in states), None, lengths=lengths
    )
    assert torch.equal(scored, trained)
