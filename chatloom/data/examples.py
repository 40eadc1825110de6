"""Training sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from chatloom.data.prepared import PreparedRow


@dataclass(frozen=True)
class Example:
    """One sequence; `loss_mask` is True on the tokens to be predicted."""

    input_ids: list[int]
    loss_mask: list[bool]

    @classmethod
    def of_response(cls, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> Example:
        """Only the response counts."""
        return cls([*prompt_ids, *response_ids], [False] * len(prompt_ids) + [True] * len(response_ids))

    @classmethod
    def of_row(cls, row: PreparedRow) -> Example:
        """A row with its best response; earlier assistant turns count too."""
        response = row.response_ids[0]
        return cls([*row.prompt_ids, *response], [*row.prompt_loss_mask, *([True] * len(response))])

    @property
    def num_predicted(self) -> int:
        return sum(self.loss_mask)


class Examples(Sequence[Example]):
    """Those of rows, each made when it is asked for: of rows that are mapped into memory, few are ever in it."""

    def __init__(self, rows: Sequence[PreparedRow]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Example]:
        return map(Example.of_row, self._rows)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        if isinstance(place, slice):
            return [Example.of_row(row) for row in self._rows[place]]
        return Example.of_row(self._rows[place])
