"""Linear layers with weights of 2 to 8 bits on a CPU: a third of bfloat16's bytes to read for each token, or less.

A weight is scale * (code - zero), where so many inputs of one output (a group) share scale and zero. In memory sixteen
outputs are a tile, as the kernel reads them (`chatloom/kernels/quantized.c`); codes of 2 and 3 bits are kept in 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor, nn

from chatloom import kernels
from chatloom.kernels import LANES

BITS = (2, 3, 4, 8)
FEW_ROWS = 64
"""Rows up to which the kernel multiplies with weights as they come from memory. More are worth a widened copy, block by
block, and a matrix product of PyTorch's (measured with AVX512)."""
BLOCK_BYTES = 1 << 22
"""Size of such a copy: it stays in the cache."""

ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""1 in each code of a word."""


@dataclass(frozen=True)
class Packed:
    """A layer's tensors as GPTQ checkpoints have them; `in` and `out` are its sizes."""

    qweight: Tensor
    """(in * bits / 32, out) int32: codes of consecutive inputs, lowest bits first."""
    qzeros: Tensor
    """(groups, out * bits / 32) int32: zeros of consecutive outputs."""
    scales: Tensor
    """(groups, out) float16"""
    g_idx: Tensor | None
    """(in) int32, the group of each input; None where they are in order."""
    bias: Tensor | None
    """(out)"""


class QuantizedLinear(nn.Module):
    """y = x W^T + b for inference."""

    codes: Tensor
    """(tiles, in / codes a word, 16) int32"""
    scales: Tensor
    """(tiles, groups, 16) float16"""
    zeros: Tensor
    """(tiles, groups, 16) uint8"""
    order: Tensor | None
    """(in) which input comes at each place, so that groups lie together; None where they do already."""
    bias: Tensor | None

    def __init__(self, packed: Packed, bits: int, group_size: int, *, zeros_less_one: bool, dtype: torch.dtype) -> None:
        """
        Args:
            zeros_less_one: whether 1 is to be added to the zeros: version 1 of the format, which AutoGPTQ writes.
            dtype: of the bias.
        """
        super().__init__()
        self.in_features, self.out_features = packed.qweight.shape[0] * 32 // bits, packed.qweight.shape[1]
        self.group_size, self.stored_bits = group_size, max(bits, 4)
        order = None if packed.g_idx is None else _order(packed.g_idx)
        self.register_buffer("codes", _tiles(_words(packed.qweight, bits, order)))
        self.register_buffer("scales", _tiles(packed.scales))
        self.register_buffer("zeros", _tiles(_zeros(packed.qzeros, bits, zeros_less_one)))
        self.register_buffer("order", order)
        self.register_buffer("bias", None if packed.bias is None else packed.bias.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)"""
        rows = x.reshape(-1, self.in_features)
        if self.order is not None:
            rows = rows[:, self.order]
        library = kernels.quantized_library(rows, self.stored_bits)
        if library is not None and len(rows) <= FEW_ROWS:
            y = kernels.multiply_quantized(library, rows, self.codes, self.scales, self.zeros, self.group_size)
        else:
            y = self._multiply_blocks(rows)
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def dequantized(self) -> Tensor:
        """(out, in) float32, inputs in the order of x."""
        weight = torch.cat(list(self._blocks(torch.float32)), dim=-1).T
        return weight if self.order is None else weight[:, self.order.argsort()]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.stored_bits}, group_size={self.group_size}"

    def _multiply_blocks(self, rows: Tensor) -> Tensor:
        y, start = rows.new_empty(len(rows), self.out_features), 0
        for block in self._blocks(rows.dtype):
            y[:, start : start + block.shape[1]] = rows @ block
            start += block.shape[1]
        return y

    def _blocks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """(in, some of out) weights, one after another; groups of inputs lie together."""
        tiles = max(BLOCK_BYTES // (self.in_features * LANES * dtype.itemsize), 1)
        library = kernels.quantized_library(torch.empty(0, dtype=dtype, device=self.codes.device), self.stored_bits)
        for start in range(0, len(self.codes), tiles):
            some = slice(start, start + tiles)
            part = self.codes[some], self.scales[some], self.zeros[some]
            if library is not None:
                yield kernels.dequantize(library, *part, self.group_size, dtype)
            else:
                yield _dequantize(*part, self.stored_bits).to(dtype)


def unpack(words: Tensor, bits: int) -> Tensor:
    """(n * bits / 32, columns) int32 words as (n, columns) uint8 codes: a column is a stream of bits, lowest first."""
    period = bits // gcd(bits, 32)  # words after which a code begins where a word does
    words = words.unflatten(0, (-1, period)).long() & 0xFFFFFFFF
    codes = []
    for index in range(period * 32 // bits):
        word, shift = divmod(index * bits, 32)
        value = words[:, word] >> shift
        if shift + bits > 32:
            value |= words[:, word + 1] << (32 - shift)
        codes.append((value & (2**bits - 1)).to(torch.uint8))
    return torch.stack(codes, dim=1).flatten(0, 1)


def pack(codes: Tensor, bits: int) -> Tensor:
    """The words of `unpack`, for codes of 2, 4 or 8 bits."""
    by_word = codes.unflatten(0, (-1, 32 // bits)).int()
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)[:, None]
    words: Tensor = (by_word << shifts).sum(dim=1, dtype=torch.int32)
    return words


def _words(qweight: Tensor, bits: int, order: Tensor | None) -> Tensor:
    """Words of 4 or 8 bits a code, inputs in `order`."""
    if bits in (4, 8) and order is None:
        return qweight
    codes = unpack(qweight, bits)
    return pack(codes if order is None else codes[order], max(bits, 4))


def _zeros(qzeros: Tensor, bits: int, less_one: bool) -> Tensor:
    """(groups, out) uint8"""
    if less_one and bits != 3:
        # As a whole word, which is how it is written: a zero of 0 borrows from its neighbour.
        qzeros = qzeros + ONES[bits]
    zeros = unpack(qzeros.T, bits).T
    return (zeros + 1) & 7 if less_one and bits == 3 else zeros


def _order(g_idx: Tensor) -> Tensor | None:
    """Inputs by group, or None where they are so already."""
    order = g_idx.argsort(stable=True)
    return None if bool((order.diff() == 1).all()) else order


def _tiles(columns: Tensor) -> Tensor:
    """(n, out) as (out / 16, n, 16)"""
    tiles: Tensor = columns.unflatten(1, (-1, LANES)).transpose(0, 1)
    return tiles.clone(memory_format=torch.contiguous_format)  # never a view: it would keep the checkpoint's file open


def _dequantize(codes: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """(in, out) float32 weights of tiles, as the kernel `dequantize` makes them."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=codes.device)[:, None]
    values = (codes[:, :, None] >> shifts) & (2**bits - 1)  # (tiles, words, codes a word, 16)
    grouped = values.flatten(1, 2).unflatten(1, (scales.shape[1], -1))  # (tiles, groups, group, 16)
    weights: Tensor = scales.float()[:, :, None] * (grouped - zeros.float()[:, :, None])
    return weights.flatten(1, 2).transpose(0, 1).flatten(1)
