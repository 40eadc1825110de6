"""Prepared rows: what `prepare_data` writes and every training stage reads.

A split is a folder of Parquet shards with one schema for all splits; a split only asks for a number of responses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

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
    ]
)


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

    @property
    def question(self) -> str:
        return self.messages[-1]["content"]


def write_split(folder: Path, rows: Iterable[PreparedRow], shard_rows: int) -> None:
    """Write rows as `part-00000.parquet`, ...; an empty split still gets one (empty) shard, so that it exists."""
    folder.mkdir(parents=True, exist_ok=True)
    remaining = iter(rows)
    number = 0
    while (shard := list(islice(remaining, shard_rows))) or number == 0:
        _write_shard(folder, number, [vars(row) for row in shard])
        number += 1


def _write_shard(folder: Path, number: int, rows: list[dict[str, object]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), folder / f"part-{number:05d}.parquet", compression="zstd")


def read_split(folder: Path, *, limit: int | None = None) -> list[PreparedRow]:
    """The rows of a split in their written order, the first `limit` of them.

    Raises:
        InputError: where the folder has no shard.
    """
    rows: list[PreparedRow] = []
    for row in _rows(folder):
        if limit is not None and len(rows) >= limit:
            break
        rows.append(row)
    return rows


def _rows(folder: Path) -> Iterator[PreparedRow]:
    shards = sorted(folder.glob("part-*.parquet"))
    if not shards:
        raise InputError(f"{folder}: no prepared rows; run the stage prepare_data first")
    for shard in shards:
        for row in pq.read_table(shard, schema=SCHEMA).to_pylist():
            yield PreparedRow(**row)
