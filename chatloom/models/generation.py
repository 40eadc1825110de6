"""Sampling responses: the rollout engine and the token stream of a chat.

B batch, P longest prompt, S tokens of room in the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    max_new_tokens: int
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Below 1, only the likeliest tokens that sum to it. Rollouts need 1: logprobs are of the whole distribution."""


class KeyValueCache:
    """Keys and values of a batch in room allocated once; finished rows can leave it."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.length = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append (B, heads, new, D) and return all so far; what a transformers model asks of its cache."""
        if layer not in self._layers:
            shape = (*keys.shape[:2], self.room, keys.shape[3])
            self._layers[layer] = (keys.new_empty(shape), values.new_empty(shape))
        end = self.length + keys.shape[2]
        for stored, new in zip(self._layers[layer], (keys, values), strict=True):
            stored[:, :, self.length : end] = new
        stored_keys, stored_values = self._layers[layer]
        return stored_keys[:, :, :end], stored_values[:, :, :end]

    def get_seq_length(self, *_: Any) -> int:
        return self.length

    def keep(self, rows: Tensor) -> None:
        self._layers = {layer: (k[rows], v[rows]) for layer, (k, v) in self._layers.items()}


@torch.inference_mode()
def generate(
    model: Any,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    generator: torch.Generator | None = None,
    batch_size: int = 16,
    on_done: Callable[[int], object] = lambda rows: None,
) -> list[list[int]]:
    """One response a prompt, in the prompts' order; each ends with its stop token unless the limit came first.

    Prompts of similar length share a batch, and a row leaves the batch when it is done.

    Args:
        model: a causal language model with `chatloom.models.attention`.
        on_done: called with the number of rows finished since the last call.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    responses: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = [prompts[i] for i in rows]
        for i, response in zip(
            rows, _generate_batch(model, batch, sampling, set(stop_ids), pad_id, generator), strict=True
        ):
            responses[i] = response
        on_done(len(rows))
    return responses


def _generate_batch(
    model: Any,
    prompts: list[list[int]],
    sampling: Sampling,
    stop: set[int],
    pad_id: int,
    generator: torch.Generator | None,
) -> list[list[int]]:
    device = model.lm_head.weight.device
    longest = max(map(len, prompts))
    cache = KeyValueCache(longest + sampling.max_new_tokens)
    input_ids = torch.tensor([[pad_id] * (longest - len(p)) + p for p in prompts], device=device)
    pads = torch.tensor([longest - len(p) for p in prompts], device=device)
    attended = torch.arange(cache.room, device=device) >= pads[:, None]  # (B, S), from lengths and not from ids
    # A padding position attends to itself: a row of nothing would be NaN, and NaN times weight 0 is still NaN.
    causal = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
    mask = (causal & attended[:, None, :longest]) | torch.eye(longest, dtype=torch.bool, device=device)
    positions = (torch.arange(longest, device=device) - pads[:, None]).clamp_min(0)

    responses: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))
    logits = _forward(model, input_ids, positions, mask[:, None], cache)
    for _ in range(sampling.max_new_tokens):
        tokens = sample(logits, sampling, generator)
        for row, token in zip(active, tokens.tolist(), strict=True):
            responses[row].append(token)
        going = [i for i, row in enumerate(active) if responses[row][-1] not in stop]
        if not going or len(responses[active[0]]) == sampling.max_new_tokens:
            break
        if len(going) < len(active):
            keep = torch.tensor(going, device=device)
            active = [active[i] for i in going]
            tokens, pads, attended = tokens[keep], pads[keep], attended[keep]
            cache.keep(keep)
        positions = (cache.length - pads)[:, None]
        mask = attended[:, None, None, : cache.length + 1]
        logits = _forward(model, tokens[:, None], positions, mask, cache)
    return responses


@torch.inference_mode()
def stream_tokens(
    model: Any,
    prompt_ids: list[int],
    sampling: Sampling,
    *,
    stop_ids: Sequence[int],
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """The tokens of one response as they are sampled, the stop token included where there is one."""
    device = model.lm_head.weight.device
    cache = KeyValueCache(len(prompt_ids) + sampling.max_new_tokens)
    length = len(prompt_ids)
    input_ids = torch.tensor([prompt_ids], device=device)
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    logits = _forward(model, input_ids, torch.arange(length, device=device)[None], causal[None, None], cache)
    for produced in range(1, sampling.max_new_tokens + 1):
        token = sample(logits, sampling, generator)
        yield int(token)
        if int(token) in stop_ids or produced == sampling.max_new_tokens:
            return
        positions = torch.full((1, 1), cache.length, device=device)
        mask = torch.ones(1, 1, 1, cache.length + 1, dtype=torch.bool, device=device)
        logits = _forward(model, token[:, None], positions, mask, cache)


def _forward(model: Any, input_ids: Tensor, positions: Tensor, mask: Tensor, cache: KeyValueCache) -> Tensor:
    """(B, V) logits after the last token; the cache holds the tokens afterwards."""
    output = model.model(
        input_ids=input_ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
    )
    cache.length += input_ids.shape[1]
    logits: Tensor = model.lm_head(output.last_hidden_state[:, -1])
    return logits


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """(B, V) logits to (B) tokens."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.float() / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        ordered, index = probabilities.sort(dim=-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= sampling.top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter_(-1, index, ordered)
    # Inverse CDF, one uniform number a row: torch.multinomial draws V of them, a fifth of a decoding step on a CPU.
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    uniform = torch.rand(len(logits), 1, dtype=torch.float64, generator=generator, device=_device(generator))
    threshold = uniform.to(logits.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp_max(logits.shape[-1] - 1)


def _device(generator: torch.Generator | None) -> torch.device:
    return generator.device if generator is not None else torch.device("cpu")
