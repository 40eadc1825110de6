"""Comparisons: several responses to one prompt, ranked. What reward training learns from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from chatloom.data.prepared import Message, PreparedRow
from chatloom.data.similarity import chrf
from chatloom.errors import InputError

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("lang", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("prompt_ids", pa.list_(pa.int32())),
        ("responses", pa.list_(pa.string())),
        ("response_ids", pa.list_(pa.list_(pa.int32()))),
        ("ranks", pa.list_(pa.int32())),
        ("origins", pa.list_(pa.string())),
        ("holdout", pa.bool_()),
    ]
)
IMPORTED, REFERENCE, SAMPLED = "imported", "reference", "sampled"


@dataclass(frozen=True)
class Comparison:
    id: str
    lang: str
    messages: list[Message]
    prompt_ids: list[int]
    responses: list[str]
    response_ids: list[list[int]]
    ranks: list[int]
    """Of each response, 0 the best; equal ranks are ties."""
    origins: list[str]
    """Of each response: `imported`, `reference` or `sampled`."""
    holdout: bool
    """Kept out of training, to measure accuracy on."""

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(better, worse) indices of every pair that is no tie: K(K-1)/2 of them for K distinct ranks."""
        pairs = []
        for i, j in combinations(range(len(self.ranks)), 2):
            if self.ranks[i] != self.ranks[j]:
                pairs.append((i, j) if self.ranks[i] < self.ranks[j] else (j, i))
        return pairs

    @property
    def num_tokens(self) -> int:
        """Of all responses, each with its prompt: what scoring them reads."""
        return sum(len(self.prompt_ids) + len(ids) for ids in self.response_ids)


def imported(row: PreparedRow, holdout: bool) -> Comparison:
    """A row that came with its own ranking."""
    ranks = list(range(len(row.responses)))
    return _of(row, row.responses, row.response_ids, ranks, [IMPORTED] * len(ranks), holdout)


def ranked_by_reference(
    row: PreparedRow,
    responses: Sequence[str],
    response_ids: Sequence[list[int]],
    *,
    min_gap: float,
    include_reference: bool,
    holdout: bool,
) -> Comparison | None:
    """Sampled responses ranked by their chrF (0 to 100) to the row's best answer; None where all of them tie.

    Repeated samples count once.
    """
    unique = {
        text: ids for text, ids in zip(responses, response_ids, strict=True) if text.strip() != row.responses[0].strip()
    }
    similarity = {text: chrf(text, row.responses[0]) for text in unique}
    texts = sorted(unique, key=lambda text: -similarity[text])
    ranks = _ranks([similarity[text] for text in texts], min_gap)
    ids, origins = [unique[text] for text in texts], [SAMPLED] * len(texts)
    if include_reference:
        texts, ids = [row.responses[0], *texts], [row.response_ids[0], *ids]
        ranks, origins = [0, *(rank + 1 for rank in ranks)], [REFERENCE, *origins]
    comparison = _of(row, texts, ids, ranks, origins, holdout)
    return comparison if comparison.pairs else None


def _ranks(scores: Sequence[float], min_gap: float) -> list[int]:
    """Ranks of descending scores; a score within `min_gap` of the best of its rank ties with it."""
    ranks: list[int] = []
    best = 0.0
    for score in scores:
        if not ranks or best - score >= min_gap:
            ranks.append(ranks[-1] + 1 if ranks else 0)
            best = score
        else:
            ranks.append(ranks[-1])
    return ranks


def in_holdout(row_id: str, share: float, seed: int) -> bool:
    """Whether a prompt is held out: by hash, so that new rows change nobody's side."""
    digest = hashlib.sha256(f"{seed}:{row_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def write_comparisons(folder: Path, comparisons: Sequence[Comparison]) -> None:
    table = pa.Table.from_pylist([asdict(comparison) for comparison in comparisons], schema=SCHEMA)
    pq.write_table(table, folder / "comparisons.parquet", compression="zstd")


def read_comparisons(folder: Path) -> list[Comparison]:
    file = folder / "comparisons.parquet"
    if not file.is_file():
        raise InputError(f"{file}: no comparisons; run the stage compare first")
    return [Comparison(**row) for row in pq.read_table(file, schema=SCHEMA).to_pylist()]


def _of(
    row: PreparedRow,
    responses: Sequence[str],
    response_ids: Sequence[list[int]],
    ranks: list[int],
    origins: list[str],
    holdout: bool,
) -> Comparison:
    return Comparison(
        row.id, row.lang, row.messages, row.prompt_ids, list(responses), list(response_ids), ranks, origins, holdout
    )
