"""One file of raw rows, cleaned and tokenised: what a process of `prepare_data` does on its own.

The tokens go to a file. What comes back of a row is little: enough to decide what becomes of it beside all others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from chatloom.config import PrepareDataParams, Split
from chatloom.data.cleaning import Cleaned, clean
from chatloom.data.drops import Drops, RowFault
from chatloom.data.near_duplicates import Signatures, signatures
from chatloom.data.prepared import SCHEMA, write_table
from chatloom.data.raw import read_shard
from chatloom.data.schemas import RawRow
from chatloom.data.splits import prompt_key
from chatloom.data.templates import Encoded, encode_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREVIEW = 60
"""Characters of a question that the report shows."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A row that may be written: all that is needed to place and count it."""

    id: str
    lang: str
    source: str
    place: str
    group: str | None
    splits: list[Split]
    weight: float
    preview: str
    prompt_key: str
    content: bytes
    """Hash of prompt and responses."""
    prompt_tokens: int
    answer_turn_tokens: int
    """Those of the prompt's tokens that earlier answers are made of, which SFT learns too."""
    response_tokens: list[int]
    question_characters: int
    response_characters: list[int]
    shard: int
    """Number of the file of tokens."""
    row: int
    """Number of the row in it."""

    @property
    def num_responses(self) -> int:
        return len(self.response_tokens)

    @property
    def num_tokens(self) -> int:
        return self.prompt_tokens + sum(self.response_tokens)

    def example(self, detail: str) -> str:
        return f"{self.id} ({self.place}): {detail}"


@dataclass
class Tally:
    """What became of one source's rows."""

    rows_in: int = 0
    dropped: Drops = field(default_factory=Drops)
    mended: Drops = field(default_factory=Drops)
    noticed: Drops = field(default_factory=Drops)
    """What `report` steps found in rows that stay."""
    cut: Drops = field(default_factory=Drops)
    """Over-long responses of rows that stay without them."""

    def merge(self, other: Tally) -> None:
        self.rows_in += other.rows_in
        for name in ("dropped", "mended", "noticed", "cut"):
            getattr(self, name).merge(getattr(other, name))


@dataclass(frozen=True)
class Chunk:
    """A file of raw rows, measured."""

    rows: list[Measured]
    prompts: Signatures
    """(rows, NUM_PERM) of the conversations that are answered."""
    answers: Signatures
    """(rows, NUM_PERM) of all responses together."""
    tallies: dict[str, Tally]
    """By source."""


def measure(
    shard: Path,
    number: int,
    out: Path,
    *,
    params: PrepareDataParams,
    tokenizer: PreTrainedTokenizerBase,
    stop_id: int,
) -> Chunk:
    """Clean and tokenise the raw rows of `shard`; the tokens of those that can be used go to the file `out`."""
    tallies: dict[str, Tally] = {}
    cleaned: list[tuple[RawRow, Cleaned]] = []
    for row in read_shard(shard):
        tally = tallies.setdefault(row.source, Tally())
        tally.rows_in += 1
        try:
            found = clean(row.messages, row.responses, row.lang, params.cleaning)
        except RowFault as fault:
            tally.dropped.add(fault.reason, f"{row.id} ({row.place}): {fault}")
            continue
        for step, detail in found.mended:
            tally.mended.add(step, f"{row.id} ({row.place}): {detail}")
        for step, detail in found.noticed:
            tally.noticed.add(step, f"{row.id} ({row.place}): {detail}")
        cleaned.append((row, found))
    measured: list[Measured] = []
    texts: list[Cleaned] = []
    written: list[dict[str, object]] = []
    encoded_rows = encode_rows(tokenizer, stop_id, [found for _, found in cleaned])
    for (row, found), encoded in zip(cleaned, encoded_rows, strict=True):
        tally = tallies[row.source]
        try:
            if isinstance(encoded, RowFault):
                raise encoded
            kept = _responses_kept(encoded, params)
        except RowFault as fault:
            tally.dropped.add(fault.reason, f"{row.id} ({row.place}): {fault}")
            continue
        for place, ids in enumerate(encoded.response_ids):
            if place not in kept:
                detail = f"response {place + 1} has {len(ids)} tokens"
                tally.cut.add("response_too_long", f"{row.id} ({row.place}): {detail}")
        found.responses = [found.responses[place] for place in kept]
        response_ids = [encoded.response_ids[place] for place in kept]
        measured.append(_measured(row, found, encoded, response_ids, number, len(measured)))
        texts.append(found)
        written.append(
            {
                "id": row.id,
                "lang": row.lang,
                "messages": found.messages,
                "prompt_ids": np.array(encoded.prompt_ids, np.int32),
                "prompt_loss_mask": np.array(encoded.prompt_loss_mask, np.bool_),
                "responses": found.responses,
                "response_ids": [np.array(ids, np.int32) for ids in response_ids],
                "cluster": None,
            }
        )
    write_table(out, pa.Table.from_pylist(written, schema=SCHEMA))
    questions = ["\n".join(message["content"] for message in found.messages) for found in texts]
    return Chunk(measured, signatures(questions), signatures(["\n".join(found.responses) for found in texts]), tallies)


def _measured(
    row: RawRow, found: Cleaned, encoded: Encoded, response_ids: Sequence[list[int]], shard: int, number: int
) -> Measured:
    key = prompt_key(found.messages)
    return Measured(
        id=row.id,
        lang=row.lang,
        source=row.source,
        place=row.place,
        group=row.group,
        splits=row.splits,
        weight=row.weight,
        preview=found.question[:PREVIEW],
        prompt_key=key,
        content=hashlib.sha256(json.dumps([key, found.responses]).encode()).digest(),
        prompt_tokens=len(encoded.prompt_ids),
        answer_turn_tokens=sum(encoded.prompt_loss_mask),
        response_tokens=[len(ids) for ids in response_ids],
        question_characters=len(found.question),
        response_characters=[len(text) for text in found.responses],
        shard=shard,
        row=number,
    )


def _responses_kept(encoded: Encoded, params: PrepareDataParams) -> list[int]:
    """Numbers of the responses that are short enough; RowFault where the row is of no use with them."""
    if len(encoded.prompt_ids) > params.max_prompt_tokens:
        raise RowFault(
            "prompt_too_long", f"{len(encoded.prompt_ids)} tokens, max_prompt_tokens is {params.max_prompt_tokens}"
        )
    lengths = [len(ids) for ids in encoded.response_ids]
    kept = [number for number, length in enumerate(lengths) if length <= params.max_response_tokens]
    # A preference lives on with two responses, or as an instruction with its best one: a worse one that is left
    # alone would become the answer to learn.
    if len(kept) == len(lengths) or len(kept) >= 2 or kept == [0]:
        return kept
    raise RowFault(
        "response_too_long",
        f"{max(lengths)} tokens with the stop token, max_response_tokens is {params.max_response_tokens}",
    )
