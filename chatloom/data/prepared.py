"""Prepared rows: what `prepare_data` writes and every training stage reads.

A split is a folder of Arrow files, mapped into memory and not read: a row costs memory only while it is in use. The
files hold the rows in the order they came in, so that rows added later change the last file only; readers see them
shuffled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from chatloom.errors import InputError

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}"""

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("lang", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("prompt_ids", pa.list_(pa.int32())),
        ("prompt_loss_mask", pa.list_(pa.bool_())),
        ("responses", pa.list_(pa.string())),
        ("response_ids", pa.list_(pa.list_(pa.int32()))),
        ("cluster", pa.string()),
    ]
)
BATCH_ROWS = 256
"""Rows made at once where all are asked for."""
ORDER = "order"
"""The column that rows are read in the order of."""
SPLIT_SCHEMA = SCHEMA.append(pa.field(ORDER, pa.int64()))


@dataclass(frozen=True)
class PreparedRow:
    """A conversation up to a user turn and its responses, as text and as tokens."""

    id: str
    lang: str
    messages: list[Message]
    """The conversation; the last turn is the user's."""
    prompt_ids: list[int]
    """(P) the templated conversation with the generation prompt at its end."""
    prompt_loss_mask: list[bool]
    """(P) True on the tokens of earlier assistant turns, their stop token included."""
    responses: list[str]
    """Best first."""
    response_ids: list[list[int]]
    """(R_k) each response with its stop token."""
    cluster: str | None = None
    """Id of the first of the rows that ask nearly the same, which share a split and a side of every holdout."""

    @property
    def question(self) -> str:
        return self.messages[-1]["content"]

    @property
    def family(self) -> str:
        """Equal for rows that ask nearly the same; a row without a cluster is alone."""
        return self.cluster or self.id


class PreparedRows(Sequence[PreparedRow]):
    """The rows of a split, shuffled; each is made when it is asked for."""

    def __init__(self, table: pa.Table) -> None:
        self._order = np.argsort(table.column(ORDER).to_numpy(), kind="stable")
        self._table = table.drop_columns([ORDER])

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, place: int) -> PreparedRow: ...
    @overload
    def __getitem__(self, place: slice) -> list[PreparedRow]: ...
    def __getitem__(self, place: int | slice) -> PreparedRow | list[PreparedRow]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        [row] = self._table.slice(int(self._order[place]), 1).to_pylist()
        return PreparedRow(**row)

    def __iter__(self) -> Iterator[PreparedRow]:
        for start in range(0, len(self), BATCH_ROWS):
            for row in self._table.take(self._order[start : start + BATCH_ROWS]).to_pylist():
                yield PreparedRow(**row)


class SplitWriter:
    """Writes the rows of a split to `part-00000.arrow`, ..., so many each; an empty split still gets one."""

    def __init__(self, folder: Path, shard_rows: int) -> None:
        self._folder, self._shard_rows = folder, shard_rows
        self._waiting = SPLIT_SCHEMA.empty_table()
        self._written = 0
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, rows: pa.Table) -> None:
        self._waiting = pa.concat_tables([self._waiting, rows])
        while len(self._waiting) >= self._shard_rows:
            self._write(self._waiting.slice(0, self._shard_rows))
            self._waiting = self._waiting.slice(self._shard_rows)

    def close(self) -> None:
        if len(self._waiting) or not self._written:
            self._write(self._waiting)

    def _write(self, rows: pa.Table) -> None:
        write_table(self._folder / f"part-{self._written:05d}.arrow", rows)
        self._written += 1


def write_table(path: Path, table: pa.Table) -> None:
    """One record batch, so that equal rows give equal bytes however they were put together."""
    with pa.ipc.new_file(path, table.schema) as file:
        file.write_table(table.combine_chunks())


def map_table(path: Path) -> pa.Table:
    """A table of `write_table`, mapped into memory."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def write_split(folder: Path, rows: Iterable[PreparedRow], shard_rows: int) -> None:
    """Write a split that is read again in the order of `rows`."""
    writer = SplitWriter(folder, shard_rows)
    values: list[dict[str, Any]] = [{**vars(row), ORDER: number} for number, row in enumerate(rows)]
    writer.add(pa.Table.from_pylist(values, schema=SPLIT_SCHEMA))
    writer.close()


def read_split(folder: Path) -> PreparedRows:
    """The rows of a split, in an order drawn from `prepare_data.seed`.

    Raises:
        InputError: where the folder has no file of rows.
    """
    files = sorted(folder.glob("part-*.arrow"))
    if not files:
        raise InputError(f"{folder}: no prepared rows; run the stage prepare_data first")
    return PreparedRows(pa.concat_tables(map(map_table, files)))
