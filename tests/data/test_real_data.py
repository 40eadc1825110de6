"""The dirty data this project is developed against; its folder is CHATLOOM_DATA (see conftest.py)."""

from __future__ import annotations

import gzip
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from chatloom.data.prepare import prepare
from chatloom.data.prepared import read_split
from chatloom.data.raw import read_raw
from chatloom.data.splits import SPLITS, prompt_key
from tests.data.conftest import Ingest
from tests.data.factories import STOP_ID, prepare_params, source


def test_instructions_have_99_empty_answers(real_data: Path, ingested: Ingest) -> None:
    report, _ = ingested(source(path=str(real_data / "instructions_104k.jsonl.gz")), shard_rows=20_000)
    assert (report["rows_in"], report["rows_out"]) == (104_004, 104_004 - 99)
    assert {reason: found["rows"] for reason, found in report["dropped"].items()} == {"empty_answer": 99}
    assert sum(report["languages"].values()) == 104_004 - 99
    assert report["sources"][0]["files"][0]["format"] == "alpaca"


def test_preferences_keep_instructions_given_as_an_assistant_turn(real_data: Path, ingested: Ingest) -> None:
    report, out = ingested(source(path=str(real_data / "preferences.jsonl.gz")))
    # 122 rows begin with an assistant turn; two others have two assistant turns in a row.
    assert report["sources"][0]["files"][0]["leading_assistant_turns_made_system"] == 122
    assert {reason: found["rows"] for reason, found in report["dropped"].items()} == {"role_order": 2}
    rows = list(read_raw(out))
    assert sum(row.messages[0]["role"] == "system" for row in rows) == 122
    assert all(len(row.responses) == 2 and row.messages[-1]["role"] == "user" for row in rows)


def test_a_few_thousand_rows_are_prepared(
    real_data: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, ingested: Ingest
) -> None:
    # English rows and their translations, 52,002 lines on.
    with gzip.open(real_data / "instructions_104k.jsonl.gz", "rt", encoding="utf-8") as lines:
        sample = [line for number, line in enumerate(lines) if number % 52_002 < 1000]
    (tmp_path / "sample.jsonl").write_text("".join(sample), encoding="utf-8")
    _, raw = ingested(
        source("alpaca", path=str(tmp_path / "sample.jsonl"), group=r"^(?:en|zh)-(\d+)$"),
        source("pairs", path=str(real_data / "preferences.jsonl.gz"), splits=["reward", "eval"], max_rows=500),
        source("prompts", path=str(real_data / "prompts.jsonl.gz"), splits=["ppo", "eval"]),
    )
    limits = {"max_prompt_tokens": 1500, "max_response_tokens": 1500}  # of bytes: there is one token a byte
    report = prepare(prepare_params(**limits), raw, tokenizer, STOP_ID, tmp_path / "prepared")
    splits = {split: read_split(tmp_path / "prepared" / split) for split in SPLITS}
    assert report["rows_in"] == 2000 - 2 + 500 + 858  # two of them have an empty answer
    assert sum(map(len, splits.values())) == report["rows_out"] > 3000
    held_out = {prompt_key(row.messages) for row in splits["eval"]}
    assert not held_out & {prompt_key(row.messages) for split in SPLITS[:-1] for row in splits[split]}
    for row in (row for rows in splits.values() for row in rows):
        assert len(row.prompt_ids) == len(row.prompt_loss_mask) <= 1500
        assert all(ids[-1] == STOP_ID and len(ids) <= 1500 for ids in row.response_ids)
        assert any(row.prompt_loss_mask) == any(message["role"] == "assistant" for message in row.messages)
