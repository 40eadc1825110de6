"""Comparisons: several responses to one prompt, ranked. What reward training learns from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
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
        ("gold", pa.bool_()),
        ("ranked_by", pa.list_(pa.string())),
        ("ranked_at", pa.string()),
        ("sft", pa.string()),
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
    ranked_by: list[str] = field(default_factory=list)
    """`imported`, `reference`, `judge <model>`, or the names of people."""
    ranked_at: str | None = None
    """When people ranked, in UTC; None where the ranking follows from the data alone."""
    sft: str | None = None
    """Hash of the SFT model that the sampled responses are of."""
    gold: bool = False
    """Trains the gold reward model, which judges PPO, and not the one that PPO is trained with."""

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
    return _of(row, row.responses, row.response_ids, ranks, [IMPORTED] * len(ranks), holdout, ranked_by=[IMPORTED])


def distinct(
    row: PreparedRow, responses: Sequence[str], response_ids: Sequence[list[int]]
) -> tuple[list[str], list[list[int]]]:
    """Sampled responses without repeated ones, empty ones and those that are the row's own best answer."""
    unique = {
        text: ids
        for text, ids in zip(responses, response_ids, strict=True)
        if text.strip() and text.strip() != row.responses[0].strip()
    }
    return list(unique), list(unique.values())


def ranked_by_reference(
    row: PreparedRow,
    responses: Sequence[str],
    response_ids: Sequence[list[int]],
    *,
    min_gap: float,
    include_reference: bool,
    holdout: bool,
    sft: str | None = None,
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
    ids = [unique[text] for text in texts]
    return ranked(row, texts, ids, ranks, include_reference=include_reference, holdout=holdout, by=[REFERENCE], sft=sft)


def ranked(
    row: PreparedRow,
    texts: Sequence[str],
    ids: Sequence[list[int]],
    ranks: Sequence[int],
    *,
    include_reference: bool,
    holdout: bool,
    by: Sequence[str],
    sft: str | None,
    at: str | None = None,
) -> Comparison | None:
    """Sampled responses with their ranks, below the reference where that is included; None where all of them tie.

    Best first: the responses are put in the order of their ranks.
    """
    order = sorted(range(len(texts)), key=lambda number: ranks[number])
    texts, ids, ranks = [texts[n] for n in order], [ids[n] for n in order], [ranks[n] for n in order]
    origins = [SAMPLED] * len(texts)
    if include_reference:
        texts, ids = [row.responses[0], *texts], [row.response_ids[0], *ids]
        ranks, origins = [0, *(rank + 1 for rank in ranks)], [REFERENCE, *origins]
    comparison = _of(row, texts, ids, ranks, origins, holdout, ranked_by=by, ranked_at=at, sft=sft)
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
    return _drawn(f"{seed}:{row_id}", share)


def for_gold(row_id: str, share: float, seed: int) -> bool:
    """Whether a prompt that is not held out trains the gold reward model: by another hash, as independently."""
    return _drawn(f"{seed}:gold:{row_id}", share)


def _drawn(text: str, share: float) -> bool:
    digest = hashlib.sha256(text.encode()).digest()
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
    ranks: Sequence[int],
    origins: list[str],
    holdout: bool,
    *,
    ranked_by: Sequence[str],
    ranked_at: str | None = None,
    sft: str | None = None,
) -> Comparison:
    return Comparison(
        id=row.id,
        lang=row.lang,
        messages=row.messages,
        prompt_ids=row.prompt_ids,
        responses=list(responses),
        response_ids=list(response_ids),
        ranks=list(ranks),
        origins=origins,
        holdout=holdout,
        ranked_by=list(ranked_by),
        ranked_at=ranked_at,
        sft=sft,
    )
