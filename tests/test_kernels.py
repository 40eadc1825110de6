from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from chatloom import kernels
from chatloom.config import Optimizer
from chatloom.models.attention import packed_attention
from chatloom.models.llama_decoder import LlamaDecoder
from chatloom.models.norm import scale_to_unit, use_kernels
from chatloom.optim import MasterAdamW, ParameterGroup
from chatloom.tensors import logprobs_and_entropies

pytestmark = pytest.mark.skipif(kernels.compiled("norm") is None, reason="no C compiler: nothing to compare")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


needs_matrix_instructions = pytest.mark.skipif(
    kernels.linear_library(torch.empty(16, 32, dtype=torch.bfloat16)) is None, reason="a processor without AMX"
)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


def test_norm_and_its_gradients_are_those_of_float64() -> None:
    """One rounding to bfloat16, 2^-9 at most, and the one that transformers makes before the weight."""
    hidden, weight, upstream = (numbers(*shape, seed=i) for i, shape in enumerate([(2, 37, 48), (48,), (2, 37, 48)]))
    states = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    exact = [state.detach().double().requires_grad_() for state in states]
    expected = exact[0] / (exact[0].square().mean(-1, keepdim=True) + 1e-5).sqrt() * exact[1]

    found = scale_to_unit(*states, 1e-5)
    assert relative_error(found, expected) < 2**-8
    gradients = torch.autograd.grad(found, states, upstream)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, exact, upstream.double()), strict=True):
        assert relative_error(gradient, wanted) < 2**-8


def test_a_norm_layer_gives_what_transformers_gives() -> None:
    layer = LlamaRMSNorm(64, 1e-5).bfloat16()
    layer.weight.data.copy_(numbers(64))
    hidden = numbers(3, 100, 64, seed=1)
    expected = layer(hidden)
    use_kernels(torch.nn.Sequential(layer))
    different = (layer(hidden) != expected).float().mean()
    assert different < 1e-3  # sums in another order: now and then a result lies on the other side of a rounding border


@pytest.mark.parametrize("threads", [1, 2])
def test_sums_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    upstream, hidden, weight = numbers(100, 32), numbers(100, 32, seed=1), numbers(32, seed=2)
    library = kernels.norm_library(hidden)
    assert library is not None
    _, scale = kernels.rms_norm(library, hidden, weight, 1e-5)
    once = kernels.rms_norm_backward(library, upstream, hidden, weight, scale)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    again = kernels.rms_norm_backward(library, upstream, hidden, weight, scale)
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("group", [1, 3])
def test_attention_gradients_are_those_of_float64(size: int, group: int) -> None:
    lengths = (1, 16, 33, 7)
    tokens = sum(lengths)
    states = [numbers(1, n, tokens, size, seed=i).requires_grad_() for i, n in enumerate((2 * group, 2, 2))]
    upstream = numbers(1, tokens, 2 * group, size, seed=9)
    exact = [state.detach().double().requires_grad_() for state in states]
    blocks = zip(*(state.split(lengths, dim=2) for state in exact), strict=True)
    expected = torch.cat([F.scaled_dot_product_attention(*b, is_causal=True, enable_gqa=True) for b in blocks], dim=2)

    found, _ = packed_attention(torch.nn.Module(), *states, None, lengths=lengths)
    assert "_KernelBackward" in type(found.grad_fn).__name__
    gradients = torch.autograd.grad(found, states, upstream)
    wanted = torch.autograd.grad(expected.transpose(1, 2), exact, upstream.double())
    for gradient, value in zip(gradients, wanted, strict=True):
        assert relative_error(gradient, value) < 2**-7


def test_a_row_attends_to_all_of_itself_and_to_nothing_else() -> None:
    """Rows of different lengths, beside what another request has left behind them in the cache."""
    key_heads, group, size, room = 2, 3, 32, 64
    lengths = [1, 5, 64]
    states = numbers(3, (group + 2) * key_heads * size)
    cache = numbers(4, room, 2, key_heads, size, seed=1)
    cache[0, 1:], cache[1, 5:] = math.nan, math.nan
    before = cache.clone()
    angles = torch.rand(3, size // 2, generator=torch.Generator().manual_seed(2)) * 6
    cosine = torch.cat([angles.cos()] * 2, dim=-1).bfloat16()
    sine = torch.cat([-angles.sin(), angles.sin()], dim=-1).bfloat16()
    library = kernels.attention_library(states, size, group)
    assert library is not None
    found = kernels.attend_rows(library, states, cosine, sine, cache, torch.tensor(lengths), size**-0.5)

    for row, length in enumerate(lengths):
        by_head = states[row].double().unflatten(0, (-1, size))
        turned = by_head * cosine[row].double() + by_head.roll(size // 2, dims=-1) * sine[row].double()
        keys, values = before[row, :length].double().unbind(1)
        keys[-1] = turned[group * key_heads :][:key_heads].bfloat16().double()
        values[-1] = by_head[-key_heads:]
        assert torch.equal(cache[row, length - 1].double(), torch.stack((keys[-1], values[-1])))
        for head in range(group * key_heads):
            scores = keys[:, head // group] @ turned[head].bfloat16().double() / size**0.5
            expected = scores.softmax(0) @ values[:, head // group]
            assert relative_error(found[row].unflatten(0, (-1, size))[head], expected) < 2**-7
    assert torch.equal(cache[3], before[3])


@needs_matrix_instructions
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 32, 33, 70])
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 16), (96, 61), (64, 96), (576, 33)])
def test_products_are_those_of_float64(rows: int, inputs: int, outputs: int) -> None:
    """One rounding to bfloat16, where blocks of rows and of outputs are full and where they are not."""
    x, weight, bias, gate = (
        numbers(*shape, seed=i)
        for i, shape in enumerate([(rows, inputs), (outputs, inputs), (outputs,), (outputs, inputs)])
    )
    gate /= 8  # where silu bends
    library = kernels.linear_library(weight)
    assert library is not None
    expected = x.double() @ weight.double().T
    assert relative_error(kernels.linear(library, x, weight), expected) < 2**-8
    assert relative_error(kernels.linear(library, x, weight, bias=bias), expected + bias.double()) < 2**-8
    gated = F.silu(x.double() @ gate.double().T) * expected
    assert relative_error(kernels.linear(library, x, weight, gate=gate), gated) < 2**-8


@needs_matrix_instructions
def test_a_product_depends_on_neither_threads_nor_other_rows() -> None:
    x, weight, gate = numbers(40, 96), numbers(100, 96, seed=1), numbers(100, 96, seed=2)
    library = kernels.linear_library(weight)
    assert library is not None
    before = torch.get_num_threads()
    for other in (None, gate):
        together = kernels.linear(library, x, weight, gate=other)
        torch.set_num_threads(1 if before > 1 else 2)
        again = kernels.linear(library, x, weight, gate=other)
        torch.set_num_threads(before)
        assert torch.equal(again, together)
        for row in (0, 17, 39):
            assert torch.equal(kernels.linear(library, x[row : row + 1], weight, gate=other)[0], together[row])


@needs_matrix_instructions
def test_what_is_not_finite_stays_in_its_row() -> None:
    x, weight = numbers(3, 32), numbers(20, 32, seed=1)
    x[1, 5], x[2] = math.nan, 300.0
    gate = torch.full_like(weight, -1.0)
    library = kernels.linear_library(weight)
    assert library is not None
    for other in (None, gate):
        product = kernels.linear(library, x, weight, gate=other)
        assert product[1].isnan().all()
        assert product[[0, 2]].isfinite().all()
    assert kernels.linear(library, x, weight, gate=gate)[2].abs().max() < 1e-20  # silu(-9600) is 0


def test_products_that_no_kernel_is_for_are_pytorchs() -> None:
    for weight in (torch.empty(16, 32), numbers(16, 40), numbers(15, 32)):
        assert kernels.linear_library(weight) is None


@needs_matrix_instructions
def test_decoding_with_the_kernel_is_decoding_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """As near as bfloat16 lets two orders of a sum be; beyond LINEAR_ROWS, and at one token a row."""
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval().bfloat16()
    prompts = [[5, 6, 7], [8] * (kernels.LINEAR_ROWS + 1)]
    with_kernel = LlamaDecoder(model, 2, snapshot=True)
    found = with_kernel.extend([], prompts), with_kernel.extend([9, 10], [])
    asked: list[Tensor] = []
    monkeypatch.setattr(kernels, "linear_library", asked.append)
    without = LlamaDecoder(model, 2, snapshot=True)
    assert len(asked) == 2 * 4 + 1
    for logits, expected in zip(found, (without.extend([], prompts), without.extend([9, 10], [])), strict=True):
        assert 0 < relative_error(logits, expected) < 2**-6


def adamw_steps(optimizer: Optimizer, gradients: list[tuple[Tensor, Tensor]], state: Any = None) -> tuple[Any, Any]:
    """Norms and the state after one step with each pair of gradients, of a bfloat16 matrix and a float32 number."""
    weights = [nn.Parameter(numbers(40, 1001)), nn.Parameter(torch.tensor(0.5))]
    adam = MasterAdamW([ParameterGroup(weights[:1], 1e-3), ParameterGroup(weights[1:], 1e-2)], optimizer)
    if state is not None:
        adam.load_state_dict(state)
    norms = []
    for pair in gradients:
        sum((weight * gradient).sum() for weight, gradient in zip(weights, pair, strict=True)).backward()
        norms.append(adam.step(0.5, "train_sft", 1))
    assert torch.equal(weights[0], adam.state_dict()["masters"][0].bfloat16())
    assert torch.equal(weights[1], adam.state_dict()["masters"][1])
    return norms, adam.state_dict()


GRADIENTS = [(numbers(40, 1001, seed=seed) / 10, numbers(1, seed=seed)[0].float()) for seed in (1, 2, 3)]


def decaying(optimizer: Optimizer) -> Optimizer:
    return optimizer.model_copy(update={"weight_decay": 0.1, "max_grad_norm": 5.0})


def test_adamw_and_clipping_are_those_of_float64(optimizer: Optimizer) -> None:
    weights = [nn.Parameter(numbers(40, 1001).double()), nn.Parameter(torch.tensor(0.5).double())]
    groups = [{"params": weights[:1], "lr": 0.5e-3}, {"params": weights[1:], "lr": 0.5e-2}]
    exact = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=optimizer.adam_eps, weight_decay=0.1)
    expected = []
    for pair in GRADIENTS:
        for weight, gradient in zip(weights, pair, strict=True):
            weight.grad = gradient.double()
        expected.append(float(nn.utils.clip_grad_norm_(weights, 5.0)))
        exact.step()
    assert min(expected) > 15, "clipped"

    norms, state = adamw_steps(decaying(optimizer), GRADIENTS)
    assert norms == pytest.approx(expected, rel=1e-6)
    for master, weight in zip(state["masters"], weights, strict=True):
        torch.testing.assert_close(master.double(), weight.detach(), rtol=1e-6, atol=1e-7)


def test_pytorch_goes_on_where_the_kernel_stopped(optimizer: Optimizer, monkeypatch: pytest.MonkeyPatch) -> None:
    _, expected = adamw_steps(decaying(optimizer), GRADIENTS)
    _, state = adamw_steps(decaying(optimizer), GRADIENTS[:1])
    monkeypatch.setattr(kernels, "compiled", lambda *_, **__: None)
    _, found = adamw_steps(decaying(optimizer), GRADIENTS[1:], state)
    for one, other in zip(found["masters"], expected["masters"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert float(found["moments"][0]["step"]) == float(expected["moments"][0]["step"]) == 3


def test_gradients_of_microbatches_are_added_in_float32(optimizer: Optimizer) -> None:
    """1 + 2^-10 is no bfloat16 number."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    adam = MasterAdamW([ParameterGroup([weight], 1e-3)], optimizer)
    for part in (1.0, 2.0**-11, 2.0**-11):
        (weight * part).sum().backward()
    assert adam.step(1.0, "train_sft", 1) == 1 + 2.0**-10


@pytest.mark.parametrize("threads", [1, 2])
def test_steps_do_not_depend_on_the_number_of_threads(threads: int, optimizer: Optimizer) -> None:
    norms, state = adamw_steps(optimizer, GRADIENTS)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    again, other = adamw_steps(optimizer, GRADIENTS)
    torch.set_num_threads(before)
    assert again == norms
    assert torch.equal(state["masters"][0], other["masters"][0])


@pytest.mark.parametrize("width", [5, 48, 1003])
def test_log_probabilities_and_their_gradients_are_those_of_float64(width: int) -> None:
    """Whole and broken rows of sixteen; the probabilities are rounded to bfloat16 once."""
    hidden, head = numbers(7, 16).requires_grad_(), numbers(width, 16, seed=1).requires_grad_()
    targets = torch.arange(7) * (width - 1) // 6
    assert kernels.vocabulary_library(hidden) is not None
    logprobs, entropies = logprobs_and_entropies(hidden, head, targets, 0.7)
    found = torch.autograd.grad(logprobs, (hidden, head), torch.arange(1.0, 8.0))

    exact = [state.detach().double().requires_grad_() for state in (hidden, head)]
    logits = F.linear(hidden, head).detach().double() / 0.7  # rounded, as a model gives them
    expected = logits.log_softmax(-1)
    assert torch.allclose(logprobs.double(), expected[range(7), targets], atol=1e-5)
    assert torch.allclose(entropies.double(), -(expected.exp() * expected).sum(-1), atol=1e-5)
    (F.linear(*exact) / 0.7).log_softmax(-1)[range(7), targets].backward(torch.arange(1.0, 8.0).double())
    for gradient, state in zip(found, exact, strict=True):
        assert state.grad is not None
        assert relative_error(gradient, state.grad) < 2**-6


def test_a_vocabulary_with_a_number_missing_has_no_probabilities() -> None:
    logits = numbers(2, 40)
    logits[1, 38] = math.nan
    library = kernels.vocabulary_library(logits)
    assert library is not None
    logprobs, _ = kernels.log_softmax(library, logits, torch.tensor([3, 3]), 1.0, keep=False)
    assert logprobs.isnan().tolist() == [False, True]


def test_not_a_number_is_not_lost() -> None:
    """The guards see it in the loss."""
    hidden = numbers(2, 16)
    hidden[1, 3] = math.nan
    normal = scale_to_unit(hidden, torch.ones(16).bfloat16(), 1e-5)
    assert normal[1].isnan().all()
    assert not normal[0].isnan().any()


def test_without_a_compiler_pytorch_does_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", str(tmp_path / "no-such-compiler"))
    kernels.compiled.cache_clear()
    try:
        hidden, weight = numbers(4, 32), numbers(32, seed=1)
        assert kernels.norm_library(hidden) is None
        expected = F.rms_norm(hidden, (32,), weight, 1e-5)
        assert torch.equal(scale_to_unit(hidden, weight, 1e-5), expected)
    finally:
        kernels.compiled.cache_clear()


def test_a_compiler_that_fails_is_said_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no such flag >&2\nexit 1\n", encoding="utf-8")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kernels.compiled.cache_clear()
    try:
        assert kernels.compiled("norm") is None
    finally:
        kernels.compiled.cache_clear()
    assert "no such flag" in caplog.text
    assert not list((tmp_path / "cache").rglob("*.so"))
