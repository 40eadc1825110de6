"""Models that extend a batch of sequences token by token, and the cache of keys and values they do it with.

n rows that are there already, k prompts that join them, T = n + tokens of the prompts, S positions that attention
reads, D head size, V vocabulary. Every row counts its positions from 0: nothing is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

BLOCK = 64
"""The cache grows, and attention reads it, in whole blocks of positions: shapes change once in so many steps."""
GROWTH = 128
"""Positions by which it grows at the most, unless more are needed: one of a 7B model takes half a megabyte."""


class Decoder(Protocol):
    """A batch of sequences under one model. Rows are dense: the n-th is behind the others, and none is empty."""

    def extend(self, tokens: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Append a token to each of the n rows, and `prompts` as k new rows behind them.

        Returns:
            (n + k, V) logits of what comes next in each row.
        """

    def drop(self, row: int) -> None:
        """Forget a row; the last one takes its place."""


@dataclass(frozen=True)
class Pass:
    """Where the T tokens of one forward pass stand: first one of each row, then the prompts."""

    input_ids: Tensor
    """(T)"""
    positions: Tensor
    """(T) in its row"""
    slots: Tensor
    """(T) in the cache, its rows laid end to end"""
    num_rows: int
    """n"""
    prompt_lengths: tuple[int, ...]
    mask: Tensor
    """(n, 1, 1, S) what is added to attention scores: 0 up to a row's own position, -inf behind it"""

    @property
    def row_lengths(self) -> Tensor:
        """(n) tokens of the rows under way, the new ones counted in."""
        return self.positions[: self.num_rows] + 1

    @property
    def last(self) -> Tensor:
        """(n + k) where the last token of each row stands."""
        return torch.tensor([*[1] * self.num_rows, *self.prompt_lengths], device=self.input_ids.device).cumsum(0) - 1


class KeyValueCache:
    """Keys and values of rows of any length.

    A layer is (rows, room, 2, heads, D): a token's keys and values lie side by side, so that all tokens of a pass are
    written at once, and a row moves in one piece.
    """

    def __init__(self, num_rows: int, device: torch.device, dtype: torch.dtype) -> None:
        self.lengths: list[int] = []
        self._num_rows, self._device, self._dtype = num_rows, device, dtype
        self._room = 0
        self._layers: list[Tensor] = []

    def open(self, tokens: Sequence[int], prompts: Sequence[Sequence[int]]) -> Pass:
        """Make room for a pass; its keys and values are to be written in every layer."""
        assert len(tokens) == len(self.lengths), "a token for every row"
        starts, added = [*self.lengths, *[0] * len(prompts)], [1] * len(tokens) + [len(prompt) for prompt in prompts]
        assert len(starts) <= self._num_rows, f"more than {self._num_rows} rows"
        assert all(added), "a prompt has at least one token"
        self.lengths = [start + count for start, count in zip(starts, added, strict=True)]
        self._grow(max(self.lengths))
        rows = torch.arange(len(added)).repeat_interleave(torch.tensor(added))
        positions = torch.cat([torch.arange(*ends) for ends in zip(starts, self.lengths, strict=True)])
        seen = _blocks(max(self.lengths[: len(tokens)], default=0))
        hidden = torch.arange(seen) > positions[: len(tokens), None]
        mask = torch.zeros(hidden.shape, dtype=self._dtype).masked_fill_(hidden, float("-inf"))
        return Pass(
            input_ids=torch.tensor([*tokens, *(token for prompt in prompts for token in prompt)], device=self._device),
            positions=positions.to(self._device),
            slots=(rows * self._room + positions).to(self._device),
            num_rows=len(tokens),
            prompt_lengths=tuple(added[len(tokens) :]),
            mask=mask[:, None, None].to(self._device),
        )

    def write(self, layer: int, entries: Tensor, slots: Tensor) -> None:
        """Put (T, 2, heads, D) keys and values into their (T) slots; layers come in order the first time."""
        if layer == len(self._layers):
            # Zeros, for what is masked has weight 0, and 0 times what torch.empty finds in memory may be NaN.
            self._layers.append(entries.new_zeros(self._num_rows, self._room, *entries.shape[1:]))
        self._layers[layer].flatten(0, 1).index_copy_(0, slots, entries)

    def layer(self, layer: int) -> Tensor:
        """(rows, room, 2, heads, D) all that is there, and room for what comes."""
        return self._layers[layer]

    def read(self, layer: int, step: Pass) -> tuple[Tensor, Tensor]:
        """Keys and values (n, heads, S, D) of the rows that were there before; views."""
        keys, values = self._layers[layer][: step.num_rows, : step.mask.shape[-1]].permute(2, 0, 3, 1, 4)
        return keys, values

    @torch.inference_mode()
    def drop(self, row: int) -> None:
        """Forget a row; the last one takes its place."""
        length = self.lengths.pop()
        if row == len(self.lengths):
            return
        for layer in self._layers:
            layer[row, :length] = layer[len(self.lengths), :length]
        self.lengths[row] = length

    def _grow(self, needed: int) -> None:
        if needed <= self._room:
            return
        more = min(self._room // 2, GROWTH)
        old, self._room = self._room, _blocks(max(needed, self._room + more))
        for index, layer in enumerate(self._layers):
            self._layers[index] = layer.new_zeros(layer.shape[0], self._room, *layer.shape[2:])
            self._layers[index][:, :old] = layer


def _blocks(positions: int) -> int:
    return -(-positions // BLOCK) * BLOCK


class ModelDecoder:
    """Any causal language model with `chatloom.models.attention`, through its own forward pass."""

    def __init__(self, model: Any, num_rows: int) -> None:
        self._model = model
        self._cache = KeyValueCache(num_rows, model.lm_head.weight.device, model.lm_head.weight.dtype)

    @torch.inference_mode()
    def extend(self, tokens: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        step, n = self._cache.open(tokens, prompts), len(tokens)
        last = []
        if tokens:
            cache = _RowsCache(self._cache, step)
            last.append(self._forward(step.input_ids[:n, None], step.positions[:n, None], cache, step.mask)[:, 0])
        if prompts:
            packed = _PromptsCache(self._cache, step)
            hidden = self._forward(
                step.input_ids[None, n:], step.positions[None, n:], packed, lengths=step.prompt_lengths
            )
            last.append(hidden[0, step.last[n:] - n])
        logits: Tensor = self._model.lm_head(torch.cat(last))
        return logits

    def drop(self, row: int) -> None:
        self._cache.drop(row)

    def _forward(
        self, input_ids: Tensor, positions: Tensor, cache: Any, mask: Tensor | None = None, **attention: Any
    ) -> Tensor:
        output = self._model.model(
            input_ids=input_ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **attention,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden


@dataclass(frozen=True)
class _RowsCache:
    """What a transformers model asks of its cache, for one more token in each row."""

    cache: KeyValueCache
    step: Pass

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """(n, heads, 1, D) to all so far, (n, heads, S, D)."""
        self.cache.write(layer, torch.stack((keys, values), 1)[:, :, :, 0], self.step.slots[: self.step.num_rows])
        return self.cache.read(layer, self.step)


@dataclass(frozen=True)
class _PromptsCache:
    """The same for prompts end to end: they attend to themselves alone."""

    cache: KeyValueCache
    step: Pass

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """(1, heads, T - n, D)"""
        entries = torch.stack((keys[0], values[0])).permute(2, 0, 1, 3)
        self.cache.write(layer, entries, self.step.slots[self.step.num_rows :])
        return keys, values
