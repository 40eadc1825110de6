"""Layers of few bits against float64 products with what their codes stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from chatloom import kernels
from chatloom.models.quantized_linear import FEW_ROWS, QuantizedLinear, pack, unpack
from tests.gptq_factory import Layer, random_layer

ROWS = (1, 2, 3, 7, 8, 13, FEW_ROWS, FEW_ROWS + 1)


@pytest.fixture(params=["kernel", "PyTorch"])
def _arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "PyTorch":
        monkeypatch.setattr(kernels, "quantized_library", lambda *_: None)
    elif kernels.quantized_library(torch.empty(0), 4) is None:
        pytest.skip("no C compiler: nothing to compare")


def quantized(layer: Layer, bits: int, group_size: int, *, less_one: bool = True) -> QuantizedLinear:
    return QuantizedLinear(layer.packed, bits, group_size, zeros_less_one=less_one, dtype=torch.float32)


def numbers(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.usefixtures("_arithmetic")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", [{}, {"less_one": False}, {"act_order": True}], ids=["v1", "v2", "act_order"])
def test_products_are_those_of_the_weights_that_the_codes_stand_for(bits: int, layout: dict[str, bool]) -> None:
    layer = random_layer(96, 64, bits=bits, group_size=32, **layout)
    found = quantized(layer, bits, 32, less_one=layout.get("less_one", True))
    torch.testing.assert_close(found.dequantized().double(), layer.weight, rtol=1e-6, atol=1e-9)
    for dtype, error in ((torch.float32, 2e-6), (torch.bfloat16, 2**-7)):
        for rows in ROWS:
            x = numbers(rows, 96, dtype=dtype)
            expected = x.double() @ layer.weight.T
            assert found(x).dtype == dtype
            assert float((found(x).double() - expected).norm() / expected.norm()) < error


@pytest.mark.usefixtures("_arithmetic")
@pytest.mark.parametrize("group_size", [8, 16, 96])
def test_groups_of_any_size(group_size: int) -> None:
    layer = random_layer(96, 32, bits=4, group_size=group_size)
    x = numbers(2, 5, 96, dtype=torch.float32)
    found = quantized(layer, 4, group_size)(x)
    torch.testing.assert_close(found.double(), x.double() @ layer.weight.T, rtol=1e-5, atol=1e-6)


def test_few_rows_are_summed_in_float32() -> None:
    """A bfloat16 sum of 4096 products would be off by percents; one rounding of the result is not."""
    if kernels.quantized_library(torch.empty(0), 4) is None:
        pytest.skip("no C compiler")
    layer = random_layer(4096, 32, bits=4, group_size=128)
    x = numbers(1, 4096, dtype=torch.bfloat16)
    expected = x.double() @ layer.weight.T
    assert float(((quantized(layer, 4, 128)(x).double() - expected) / expected).abs().max()) < 2**-8


def test_bias_and_the_words_of_codes() -> None:
    layer = random_layer(32, 32, bits=4, group_size=32)
    bias = numbers(32, dtype=torch.float32)
    both = Layer(type(layer.packed)(**{**vars(layer.packed), "bias": bias}), layer.weight)
    x = numbers(3, 32, dtype=torch.float32)
    torch.testing.assert_close(quantized(both, 4, 32)(x), quantized(layer, 4, 32)(x) + bias)
    # 0x76543210: the first input's code is in the lowest bits.
    words = torch.tensor([[0x76543210]] * 4, dtype=torch.int32)
    assert unpack(words, 4)[:8, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert torch.equal(pack(unpack(words, 4), 4), words)


def test_a_zero_of_0_is_stored_less_one_by_borrowing_from_its_neighbour() -> None:
    """GPTQModel subtracts 1 from each code of a word at once: zeros (0, 8, ...) become 0x...76f and not 0x...77f."""
    layer = random_layer(32, 32, bits=4, group_size=32)
    zeros = torch.full((1, 4), 0x88888880 - 0x11111111, dtype=torch.int64).int()
    packed = type(layer.packed)(**{**vars(layer.packed), "qzeros": zeros})
    assert quantized(Layer(packed, layer.weight), 4, 32).zeros[0, 0].tolist() == [0, *[8] * 7, 0, *[8] * 7]
