"""Tokenizers, files and params that the tests of the data part are made of."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from chatloom.config import CleaningParams, DataSource, PrepareDataParams, RawDataParams, load_params

ROOT = Path(__file__).parents[2]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
STOP_ID = 2


def byte_tokenizer(merges: Iterable[tuple[str, str]] = (), *, split_words: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte, so that positions can be counted by hand; `merges` add longer ones. ChatML template."""
    merges = list(merges)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*SPECIAL, *alphabet, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(vocabulary)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = (ROOT / "data/templates/chatml.jinja").read_text(encoding="utf-8")
    return tokenizer


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def source(name: str = "s", **changes: Any) -> DataSource:
    values: dict[str, Any] = {
        "name": name,
        "format": "auto",
        "lang": None,
        "license": "Apache-2.0",
        "splits": ["sft", "reward", "ppo", "ptx", "eval"],
        "group": None,
        "max_rows": None,
        "weight": 1,
    }
    return DataSource.model_validate(values | changes)


def raw_params(*sources: DataSource, shard_rows: int = 1000) -> RawDataParams:
    return RawDataParams(sources=list(sources), shard_rows=shard_rows)


def cleaning(**changes: Any) -> CleaningParams:
    """The default preset's, with changes."""
    return load_params(ROOT / "params.yaml").prepare_data.cleaning.model_copy(update=changes)


def prepare_params(**changes: Any) -> PrepareDataParams:
    values: dict[str, Any] = {
        "cleaning": cleaning(),
        "split_weights": {"sft": 0.45, "reward": 0.2, "ppo": 0.12, "ptx": 0.1, "eval": 0.13},
        "max_prompt_tokens": 200,
        "max_response_tokens": 200,
        "max_eval_rows": None,
        "shard_rows": 1000,
        "num_workers": 1,
        "seed": 42,
    }
    return PrepareDataParams.model_validate(values | changes)


def templated_rows(number: int) -> list[dict[str, str]]:
    """Instructions that all differ."""
    return [{"instruction": f"Question number {n}?", "output": f"Answer number {n}."} for n in range(number)]
