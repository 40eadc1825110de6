"""Raw rows to prepared splits: cleaned, de-duplicated, tokenised, bounded in length, placed by hash, leak-checked.

What `prepare_data` writes. Three steps: every file of raw rows is measured by itself (`measure`, in several processes);
then it is decided what becomes of each row, in the order of the rows, so that rows added at the end change nothing that
was decided before them; then the rows that stay are written. Texts and tokens are never all in memory.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from chatloom.config import PrepareDataParams, Split
from chatloom.data.drops import RowFault
from chatloom.data.measure import Chunk, Measured, Tally, measure
from chatloom.data.near_duplicates import Signatures, estimated_similarity, similar_pairs
from chatloom.data.prepared import ORDER, SPLIT_SCHEMA, SplitWriter, map_table
from chatloom.data.raw import count_rows, raw_shards
from chatloom.data.report import prepare_report
from chatloom.data.splits import SPLITS, TRAINING, Near, Placed, Placement, assign, leaks, unit_hash
from chatloom.data.templates import check_tokenizer
from chatloom.errors import InputError
from chatloom.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

MIN_PARALLEL_ROWS = 5000
"""Fewer rows are tokenised sooner than other processes have started."""
REPEATED: tuple[Split, ...] = ("sft", "ptx")
"""Splits in which a row counts as often as its source's weight says."""


@dataclass(frozen=True)
class Kept:
    """A row that is written."""

    row: Measured
    split: Split
    cluster: str
    copies: int


def prepare(
    params: PrepareDataParams, raw: Path, tokenizer: PreTrainedTokenizerBase, stop_id: int, out: Path
) -> dict[str, Any]:
    """Write `out/{sft,reward,ppo,ptx,eval}` from the rows that `ingest` wrote to `raw`.

    Returns:
        The report, as JSON: rows in and out of each source and step, and tokens, languages and lengths of each split.

    Raises:
        InputError: where the tokenizer cannot serve, or no row is left.
    """
    check_tokenizer(tokenizer)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        chunks = _measured(raw, Path(folder), params, tokenizer, stop_id)
        tallies: defaultdict[str, Tally] = defaultdict(Tally)
        for chunk in chunks:
            for source, tally in chunk.tallies.items():
                tallies[source].merge(tally)
        kept, near = _decided(chunks, params, tallies)
        del chunks
        if not kept:
            rows = sum(tally.rows_in for tally in tallies.values())
            reasons = Counter[str]()
            for tally in tallies.values():
                reasons.update(tally.dropped.counts())
            raise InputError(f"{raw}: none of its {rows} rows can be used: {json.dumps(dict(sorted(reasons.items())))}")
        leaked = _assert_no_leak(kept, near)
        _write(kept, Path(folder), out, params)
    rows_of: dict[Split, list[Measured]] = {split: [] for split in SPLITS}
    for item in kept:
        rows_of[item.split] += [item.row] * item.copies
    for split in SPLITS:
        if not rows_of[split] and params.split_weights[split]:
            log.warning("prepare_data: the split %s is empty", split)
    clusters: defaultdict[str, list[Measured]] = defaultdict(list)
    for item in kept:
        clusters[item.cluster].append(item.row)
    several = [rows for rows in clusters.values() if len(rows) > 1]
    return prepare_report(tallies, rows_of, several, rows_out=len(kept), leaked=leaked)


def prepare_metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a report of `prepare`, flat."""
    metrics: dict[str, float] = {"rows/in": report["rows_in"], "rows/out": report["rows_out"]}
    for split, found in report["splits"].items():
        metrics[f"{split}/rows"] = found["rows"]
        metrics[f"{split}/tokens"] = found["tokens"]
        metrics |= {f"{split}/rows_{language}": rows for language, rows in found["languages"].items()}
    metrics["dropped/total"] = report["rows_in"] - report["rows_out"]
    return metrics | {
        f"{what}/{step}": found["rows"]
        for what in ("dropped", "mended", "noticed")
        for step, found in report[what].items()
    }


# --- decisions ------------------------------------------------------------------------------------------------------


def _decided(
    chunks: Sequence[Chunk], params: PrepareDataParams, tallies: Mapping[str, Tally]
) -> tuple[list[Kept], Near]:
    """The rows that stay, in their order; what becomes of a row depends on the rows before it only."""
    rows = [row for chunk in chunks for row in chunk.rows]
    prompts = np.concatenate([chunk.prompts for chunk in chunks])
    answers = np.concatenate([chunk.answers for chunk in chunks])
    # Rows that may only be held out come first: of duplicates the first stays, and a benchmark has to stay whole.
    order = sorted(range(len(rows)), key=lambda number: rows[number].splits != ["eval"])
    near = _near_prompts(rows, prompts, order, params.cleaning.similarity)
    alone = list(_without_duplicates(rows, answers, order, near, params, tallies))
    placement = Placement(params.split_weights, params.seed)
    taken: Counter[str] = Counter()
    kept = []
    for row, placed in zip(alone, assign(alone, near, placement), strict=True):
        dropped = tallies[row.source].dropped
        if isinstance(placed, RowFault):
            dropped.add(placed.reason, row.example(str(placed)))
            continue
        if placed.split == "eval" and params.max_eval_rows is not None:
            taken[row.lang] += 1
            if taken[row.lang] > params.max_eval_rows:
                # It goes nowhere: in a training split it would be a leak once the cap is raised.
                dropped.add_count("over_max_eval_rows", 1)
                continue
        copies = _copies(row, placed, params.seed)
        if copies:
            kept.append(Kept(row, placed.split, placed.cluster, copies))
        else:
            dropped.add_count("below_weight", 1)
    return sorted(kept, key=lambda item: (item.row.shard, item.row.row)), near


def _near_prompts(
    rows: Sequence[Measured], prompts: Signatures, order: Sequence[int], similarity: float
) -> dict[str, set[str]]:
    """Of each prompt key: those of the prompts that are near-duplicates of it."""
    first: dict[str, int] = {}
    for number in order:
        first.setdefault(rows[number].prompt_key, number)
    keys = list(first)
    near: defaultdict[str, set[str]] = defaultdict(set)
    for one, other in similar_pairs(prompts[list(first.values())], similarity).tolist():
        near[keys[one]].add(keys[other])
        near[keys[other]].add(keys[one])
    return near


def _without_duplicates(
    rows: Sequence[Measured],
    answers: Signatures,
    order: Sequence[int],
    near: Near,
    params: PrepareDataParams,
    tallies: Mapping[str, Tally],
) -> Iterator[Measured]:
    """Rows without those that are, or nearly are, an earlier row: the question and the answers both."""
    action = params.cleaning.near_duplicates
    seen: dict[bytes, Measured] = {}
    kept: defaultdict[str, list[int]] = defaultdict(list)
    for number in order:
        row, tally = rows[number], tallies[rows[number].source]
        first = seen.setdefault(row.content, row)
        if first is not row:
            detail = f"same prompt and responses as {first.id} ({first.place})"
            tally.dropped.add("duplicate", row.example(detail))
            continue
        others = [other for key in (row.prompt_key, *near.get(row.prompt_key, ())) for other in kept.get(key, ())]
        if action != "off" and others:
            like = estimated_similarity(answers[others], answers[number]) >= params.cleaning.similarity
            alike = [rows[other] for other, is_like in zip(others, like, strict=True) if is_like]
            alike = [other for other in alike if other.num_responses == row.num_responses]
            if alike:
                detail = f"nearly the prompt and responses of {alike[0].id} ({alike[0].place}): {row.preview!r}"
                if action == "drop":
                    tally.dropped.add("near_duplicate", row.example(detail))
                    continue
                tally.noticed.add("near_duplicate", row.example(detail))
        if same := kept.get(row.prompt_key):
            first = rows[same[0]]
            tally.noticed.add("repeated_question", row.example(f"the question of {first.id} ({first.place})"))
        kept[row.prompt_key].append(number)
        yield row


def _copies(row: Measured, placed: Placed, seed: int) -> int:
    """How often a row is written: its source's weight, a fraction of which is a share of the rows, by hash."""
    if placed.split not in REPEATED:
        return 1
    whole, share = divmod(row.weight, 1)
    return int(whole) + (unit_hash(seed, "weight", row.prompt_key) < share)


def _assert_no_leak(kept: Sequence[Kept], near: Near) -> int:
    """The rows as they are about to be written, looked at once more: how many are on both sides, which is none."""
    held_out = [item.row for item in kept if item.split == "eval"]
    trained = [item.row for item in kept if item.split in TRAINING]
    found = leaks(trained, held_out, near)
    assert not found, f"{found[0].id} is trained on, and its question, or one nearly the same, is in eval"
    return len(found)


# --- writing --------------------------------------------------------------------------------------------------------


def _write(kept: Sequence[Kept], folder: Path, out: Path, params: PrepareDataParams) -> None:
    """Write the splits, each in the order of the raw rows, shard by shard of `measure`."""
    writers = {split: SplitWriter(out / split, params.shard_rows) for split in SPLITS}
    by_shard: defaultdict[int, list[Kept]] = defaultdict(list)
    for item in kept:
        by_shard[item.row.shard].append(item)
    for shard, items in by_shard.items():
        table = map_table(_tokens(folder, shard))
        for split in SPLITS:
            written = [(item, copy) for item in items if item.split == split for copy in range(item.copies)]
            rows = table.take(pa.array([item.row.row for item, _ in written], pa.int64()))
            ids = [item.row.id if copy == 0 else f"{item.row.id}~copy{copy}" for item, copy in written]
            rows = rows.set_column(0, "id", pa.array(ids, pa.string()))
            rows = rows.set_column(
                rows.column_names.index("cluster"),
                "cluster",
                pa.array([item.cluster for item, _ in written], pa.string()),
            )
            order = [int(unit_hash(params.seed, "order", id) * 2**53) for id in ids]
            rows = rows.append_column(ORDER, pa.array(order, pa.int64()))
            writers[split].add(rows.cast(SPLIT_SCHEMA))
    for writer in writers.values():
        writer.close()


def _tokens(folder: Path, shard: int) -> Path:
    return folder / f"tokens-{shard:05d}.arrow"


# --- measuring, in several processes --------------------------------------------------------------------------------


def _measured(
    raw: Path, folder: Path, params: PrepareDataParams, tokenizer: PreTrainedTokenizerBase, stop_id: int
) -> list[Chunk]:
    shards = raw_shards(raw)
    total = sum(map(count_rows, shards))
    work = partial(measure, params=params, tokenizer=tokenizer, stop_id=stop_id)
    numbers = range(len(shards))
    outs = [_tokens(folder, number) for number in numbers]
    chunks = []
    with progress("prepare_data", total) as advance:
        for chunk in _map(work, (shards, numbers, outs), params.num_workers if total >= MIN_PARALLEL_ROWS else 1):
            advance(sum(tally.rows_in for tally in chunk.tallies.values()))
            chunks.append(chunk)
    return chunks


def _map(work: Callable[..., Chunk], arguments: Sequence[Sequence[Any]], num_workers: int) -> Iterator[Chunk]:
    if num_workers == 1:
        yield from map(work, *arguments)
        return
    # Not forked: the stage has threads (MLflow's, the progress bar's), whose locks a fork would copy as they stand.
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        # As a file: a large argument would keep each process from starting until the one before has read it.
        handed_over = Path(folder, "work.pickle")
        handed_over.write_bytes(pickle.dumps(work))
        with ProcessPoolExecutor(num_workers, context, _start_worker, (handed_over,)) as workers:
            yield from workers.map(_work, *arguments)


_worker: list[Callable[..., Chunk]] = []


def _start_worker(handed_over: Path) -> None:
    # One process a core is all there is: threads inside each would only get in each other's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    _worker[:] = [pickle.loads(handed_over.read_bytes())]


def _work(*arguments: Any) -> Chunk:
    [work] = _worker
    return work(*arguments)
