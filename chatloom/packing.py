"""Sequences side by side in one row, without padding and without seeing each other.

T is the number of tokens of all sequences, N the number of predicted tokens. Attention gets the sequences' lengths
(`chatloom.models.attention`), positions restart with each sequence, and masks come from lengths, never from token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from chatloom.data.examples import Example

ROWS_AT_ONCE = 4
"""Sequences in one pass of what only looks at a model."""


@dataclass(frozen=True)
class Packed:
    input_ids: Tensor
    """(1, T)"""
    position_ids: Tensor
    """(1, T) from 0 in each sequence"""
    lengths: tuple[int, ...]
    """Tokens of each sequence; they sum to T."""
    predictors: Tensor
    """(N) where the hidden state stands that predicts each target"""
    targets: Tensor
    """(N) the predicted tokens, sequence after sequence"""
    num_predicted: tuple[int, ...]
    """Predicted tokens of each sequence; they sum to N."""

    @property
    def last(self) -> Tensor:
        """(B) where each sequence's last token stands."""
        return torch.tensor(self.lengths, device=self.input_ids.device).cumsum(0) - 1

    def rows(self, values: Tensor) -> Tensor:
        """(N) to (B, R): one row a sequence, zeros on the right."""
        return pad_sequence(list(values.split(self.num_predicted)), batch_first=True)


def pack(examples: Sequence[Example], device: torch.device | str = "cpu") -> Packed:
    """Lay sequences end to end.

    The one place that knows the offset between a token and its prediction: the hidden state at t - 1 predicts the token
    at t, so a sequence's first token is never a target.
    """
    assert examples, "nothing to pack"
    lengths = tuple(len(example.input_ids) for example in examples)
    input_ids = torch.tensor([token for example in examples for token in example.input_ids])
    loss_mask = torch.tensor([keep for example in examples for keep in example.loss_mask])
    position_ids = torch.cat([torch.arange(length) for length in lengths])
    assert not bool(loss_mask[position_ids == 0].any()), "a sequence's first token has nothing before it"
    predicted = loss_mask.nonzero().squeeze(1)
    return Packed(
        input_ids=input_ids[None].to(device),
        position_ids=position_ids[None].to(device),
        lengths=lengths,
        predictors=(predicted - 1).to(device),
        targets=input_ids[predicted].to(device),
        num_predicted=tuple(example.num_predicted for example in examples),
    )
