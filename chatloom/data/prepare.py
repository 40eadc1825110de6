"""Raw rows to prepared splits: de-duplicated, tokenised, bounded in length, placed by hash, leak-checked.

What `prepare_data` writes. Every row that is left out is counted under one reason, with examples.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from chatloom.config import PrepareDataParams, Split
from chatloom.data.drops import Drops, RowFault
from chatloom.data.prepared import PreparedRow, write_split
from chatloom.data.raw import read_raw
from chatloom.data.schemas import Conversation, RawRow
from chatloom.data.splits import SPLITS, TRAINING, Placement, leaked, prompt_key, unit_hash
from chatloom.data.templates import Encoded, check_tokenizer, encode_rows
from chatloom.errors import InputError
from chatloom.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

CHUNK_ROWS = 500
MIN_PARALLEL_ROWS = 5000
"""Fewer rows are tokenised sooner than other processes have started."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A row that may be written; token arrays, since lists of Python integers take ten times the memory."""

    row: RawRow
    prompt_key: str
    prompt_ids: NDArray[np.int32]
    prompt_loss_mask: NDArray[np.bool_]
    responses: list[str]
    response_ids: list[NDArray[np.int32]]

    @property
    def group(self) -> str | None:
        return self.row.group

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + sum(map(len, self.response_ids))


_Splits = dict[Split, list[_Candidate]]


def prepare(
    params: PrepareDataParams, raw: Path, tokenizer: PreTrainedTokenizerBase, stop_id: int, out: Path
) -> dict[str, Any]:
    """Write `out/{sft,reward,ppo,ptx,eval}` from the rows that `ingest` wrote to `raw`.

    Returns:
        The report, as JSON: rows, tokens, languages and lengths of each split, and every drop by reason.

    Raises:
        InputError: where the tokenizer cannot serve, or no row is left.
    """
    check_tokenizer(tokenizer)
    drops, cut = Drops(), Drops()
    # Rows that may only be held out come first: of duplicates the first stays, and a benchmark has to stay whole.
    rows = sorted(read_raw(raw), key=lambda row: row.splits != ["eval"])
    unique = _without_duplicates(rows, drops)
    candidates = list(_candidates(unique, params, tokenizer, stop_id, drops, cut))
    splits = _without_leaks(_capped(_placed(candidates, params, drops), params, drops), drops)
    if not any(splits.values()):
        raise InputError(f"{raw}: none of its {len(rows)} rows can be used: {json.dumps(drops.counts())}")
    for split in SPLITS:
        if not splits[split] and params.split_weights[split]:
            log.warning("prepare_data: the split %s is empty", split)
        write_split(out / split, map(_prepared, _shuffled(splits[split], params.seed)), params.shard_rows)
    return {
        "rows_in": len(rows),
        "rows_out": sum(map(len, splits.values())),
        "dropped": drops.report(),
        "responses_cut": cut.report(),
        "splits": {split: _split_report(splits[split]) for split in SPLITS},
    }


def prepare_metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a report of `prepare`, flat."""
    metrics: dict[str, float] = {"rows/in": report["rows_in"], "rows/out": report["rows_out"]}
    for split, found in report["splits"].items():
        metrics[f"{split}/rows"] = found["rows"]
        metrics[f"{split}/tokens"] = found["tokens"]
        metrics |= {f"{split}/rows_{language}": rows for language, rows in found["languages"].items()}
    metrics["dropped/total"] = report["rows_in"] - report["rows_out"]
    return metrics | {f"dropped/{reason}": found["rows"] for reason, found in report["dropped"].items()}


def _without_duplicates(rows: Iterable[RawRow], drops: Drops) -> list[tuple[str, RawRow]]:
    """Rows with their prompt's key; of those with one normalised prompt and the same responses, the first."""
    seen: dict[bytes, RawRow] = {}
    kept = []
    for row in rows:
        key = prompt_key(row.messages)
        content = hashlib.sha256(json.dumps([key, row.responses]).encode()).digest()
        first = seen.setdefault(content, row)
        if first is row:
            kept.append((key, row))
        else:
            drops.add("duplicate", _example(row, f"same prompt and responses as {first.id} ({first.place})"))
    return kept


def _candidates(
    rows: Sequence[tuple[str, RawRow]],
    params: PrepareDataParams,
    tokenizer: PreTrainedTokenizerBase,
    stop_id: int,
    drops: Drops,
    cut: Drops,
) -> Iterator[_Candidate]:
    """Rows as tokens, without those that are too long for `params`."""
    encoded_rows = _encoded([row for _, row in rows], tokenizer, stop_id, params.num_workers)
    for (key, row), encoded in zip(rows, encoded_rows, strict=True):
        try:
            if isinstance(encoded, RowFault):
                raise encoded
            kept = _responses_kept(encoded, params)
        except RowFault as fault:
            drops.add(fault.reason, _example(row, fault.detail))
            continue
        for number in range(len(row.responses)):
            if number not in kept:
                length = len(encoded.response_ids[number])
                cut.add("response_too_long", _example(row, f"response {number + 1} has {length} tokens"))
        yield _Candidate(
            row=row,
            prompt_key=key,
            prompt_ids=np.array(encoded.prompt_ids, np.int32),
            prompt_loss_mask=np.array(encoded.prompt_loss_mask, np.bool_),
            responses=[row.responses[number] for number in kept],
            response_ids=[np.array(encoded.response_ids[number], np.int32) for number in kept],
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


# --- splits ---------------------------------------------------------------------------------------------------------


def _placed(candidates: Iterable[_Candidate], params: PrepareDataParams, drops: Drops) -> _Splits:
    placement = Placement(params.split_weights, params.seed)
    splits: _Splits = {split: [] for split in SPLITS}
    for candidate in candidates:
        row = candidate.row
        key = candidate.prompt_key if row.group is None else row.group
        split = placement.place(key, row.splits, len(candidate.responses))
        if split is None:
            open_to = f"it is open to {', '.join(row.splits)} and has {len(candidate.responses)} responses"
            drops.add("no_split", _example(row, open_to))
        else:
            splits[split].append(candidate)
    return splits


def _capped(splits: _Splits, params: PrepareDataParams, drops: Drops) -> _Splits:
    """Eval with at most `max_eval_rows` a language; what is over goes nowhere, or it would train once data is added."""
    if params.max_eval_rows is None:
        return splits
    kept, taken = [], Counter[str]()
    order = sorted(splits["eval"], key=lambda item: (unit_hash(params.seed, "cap", item.prompt_key), item.row.id))
    for candidate in order:
        taken[candidate.row.lang] += 1
        if taken[candidate.row.lang] <= params.max_eval_rows:
            kept.append(candidate)
    drops.add_count("over_max_eval_rows", len(order) - len(kept))
    return {**splits, "eval": kept}


def _without_leaks(splits: _Splits, drops: Drops) -> _Splits:
    """Splits without the training rows whose prompt, or whose group, is held out."""
    clean: _Splits = {"eval": splits["eval"]}
    for split in TRAINING:
        clean[split] = []
        for candidate, leak in zip(splits[split], leaked(splits[split], splits["eval"]), strict=True):
            if leak:
                drops.add("leak", _example(candidate.row, f"placed in {split}, its prompt or group is in eval"))
            else:
                clean[split].append(candidate)
    held_out = {candidate.prompt_key for candidate in clean["eval"]}
    trained = {candidate.prompt_key for split in TRAINING for candidate in clean[split]}
    assert not held_out & trained, "a prompt is in eval and in a training split"
    return clean


def _shuffled(candidates: list[_Candidate], seed: int) -> list[_Candidate]:
    return sorted(candidates, key=lambda candidate: (unit_hash(seed, "order", candidate.row.id), candidate.row.id))


def _prepared(candidate: _Candidate) -> PreparedRow:
    return PreparedRow(
        id=candidate.row.id,
        lang=candidate.row.lang,
        messages=candidate.row.messages,
        prompt_ids=candidate.prompt_ids.tolist(),
        prompt_loss_mask=candidate.prompt_loss_mask.tolist(),
        responses=candidate.responses,
        response_ids=[ids.tolist() for ids in candidate.response_ids],
    )


# --- report ---------------------------------------------------------------------------------------------------------


def _example(row: RawRow, detail: str) -> str:
    return f"{row.id} ({row.place}): {detail}"


def _split_report(candidates: list[_Candidate]) -> dict[str, Any]:
    responses = [text for candidate in candidates for text in candidate.responses]
    return {
        "rows": len(candidates),
        "languages": dict(sorted(Counter(candidate.row.lang for candidate in candidates).items())),
        "sources": dict(sorted(Counter(candidate.row.source for candidate in candidates).items())),
        "responses": dict(sorted(Counter(str(len(candidate.responses)) for candidate in candidates).items())),
        "tokens": sum(candidate.num_tokens for candidate in candidates),
        "lengths": {
            "prompt_tokens": _spread([len(candidate.prompt_ids) for candidate in candidates]),
            "response_tokens": _spread([len(ids) for candidate in candidates for ids in candidate.response_ids]),
            "question_characters": _spread([len(candidate.row.messages[-1]["content"]) for candidate in candidates]),
            "response_characters": _spread([len(text) for text in responses]),
        },
    }


def _spread(lengths: Sequence[int]) -> dict[str, float]:
    if not lengths:
        return {}
    low, median, high, top = np.percentile(lengths, [0, 50, 95, 100])
    spread = {"min": low, "median": median, "mean": np.mean(lengths), "p95": high, "max": top}
    return {name: round(float(value), 2) for name, value in spread.items()}


# --- tokens, in several processes -----------------------------------------------------------------------------------


def _encoded(
    rows: Sequence[RawRow], tokenizer: PreTrainedTokenizerBase, stop_id: int, num_workers: int
) -> Iterator[Encoded | RowFault]:
    # Only the text goes to another process.
    conversations = [Conversation(row.messages, row.responses) for row in rows]
    chunks = [conversations[start : start + CHUNK_ROWS] for start in range(0, len(rows), CHUNK_ROWS)]
    with progress("prepare_data", len(rows)) as advance:
        for encoded in _map_chunks(chunks, len(rows), tokenizer, stop_id, num_workers):
            advance(len(encoded))
            yield from encoded


def _map_chunks(
    chunks: list[list[Conversation]],
    num_rows: int,
    tokenizer: PreTrainedTokenizerBase,
    stop_id: int,
    num_workers: int,
) -> Iterator[list[Encoded | RowFault]]:
    if num_workers == 1 or num_rows < MIN_PARALLEL_ROWS:
        yield from map(partial(encode_rows, tokenizer, stop_id), chunks)
        return
    # Not forked: the stage has threads (MLflow's, the progress bar's), whose locks a fork would copy as they stand.
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        # As a file: a large argument would keep each process from starting until the one before has read it.
        handed_over = Path(folder, "tokenizer.pickle")
        handed_over.write_bytes(pickle.dumps((tokenizer, stop_id)))
        with ProcessPoolExecutor(num_workers, context, _start_worker, (handed_over,)) as workers:
            yield from workers.map(_encode_chunk, chunks)


_worker: list[tuple[PreTrainedTokenizerBase, int]] = []


def _start_worker(handed_over: Path) -> None:
    # One process a core is all there is: threads inside each would only get in each other's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker[:] = [pickle.loads(handed_over.read_bytes())]


def _encode_chunk(chunk: list[Conversation]) -> list[Encoded | RowFault]:
    [(tokenizer, stop_id)] = _worker
    return encode_rows(tokenizer, stop_id, chunk)
