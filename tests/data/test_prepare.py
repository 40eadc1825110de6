"""Preparation: nothing leaks, nothing is cut, nothing moves when data is added, every drop is counted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from chatloom.data import prepare as module
from chatloom.data.prepare import prepare, prepare_metrics
from chatloom.data.prepared import PreparedRows, read_split
from chatloom.data.raw import ingest
from chatloom.data.splits import SPLITS, prompt_key
from chatloom.errors import InputError
from tests.data.conftest import Ingest
from tests.data.factories import STOP_ID, cleaning, prepare_params, raw_params, source, templated_rows, write_jsonl

Splits = dict[str, PreparedRows]
ONLY_SFT = {"sft": 1, "reward": 0, "ppo": 0, "ptx": 0, "eval": 0}


@pytest.fixture
def prepared(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, ingested: Ingest) -> Any:
    """Ingest and prepare sources, or rows of one: `(report, splits)`."""

    def run(*sources: Any, rows: list[Any] | None = None, **changes: Any) -> tuple[dict[str, Any], Splits]:
        if rows is not None:
            sources = (source(path=str(write_jsonl(tmp_path / "rows.jsonl", rows))),)
        _, raw = ingested(*sources)
        out = tmp_path / f"prepared-{raw.name}"
        report = prepare(prepare_params(**changes), raw, tokenizer, STOP_ID, out)
        return report, {split: read_split(out / split) for split in SPLITS}

    return run


def where(splits: Splits) -> dict[str, str]:
    return {row.id: split for split, rows in splits.items() for row in rows}


def test_row_is_written_with_text_and_tokens(prepared: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    _, splits = prepared(rows=[{"id": "a", "instruction": "hi", "output": "ok"}], split_weights=ONLY_SFT)
    [row] = splits["sft"]
    assert (row.id, row.lang, row.question, row.responses) == ("a", "en", "hi", ["ok"])
    assert row.prompt_loss_mask == [False] * 21
    assert tokenizer.decode(row.prompt_ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(row.response_ids[0]) == "ok<|im_end|>"
    assert all(not splits[split] for split in SPLITS if split != "sft")


def test_every_row_is_in_one_split_or_counted(prepared: Any) -> None:
    report, splits = prepared(rows=templated_rows(400))
    assert sum(map(len, splits.values())) == report["rows_out"] == report["rows_in"] == 400
    assert len(where(splits)) == 400
    assert all(splits.values())
    # Not in the order of their ids, in which the file has them.
    ids = [row.id for row in splits["sft"]]
    assert ids != sorted(ids, key=lambda id: int(id.split("-")[1]))


def test_rows_stay_where_they_are_when_rows_are_added(prepared: Any) -> None:
    rows = [{"id": f"row-{number}", **row} for number, row in enumerate(templated_rows(300))]
    before = where(prepared(rows=rows[:200])[1])
    after = where(prepared(rows=rows[::-1])[1])
    assert len(before) == 200
    assert before == {id: split for id, split in after.items() if id in before}


def test_seed_decides_the_splits(prepared: Any) -> None:
    one, same, other = (where(prepared(rows=templated_rows(100), seed=seed)[1]) for seed in (1, 1, 2))
    assert one == same != other


def test_duplicates_are_dropped_and_other_answers_stay(prepared: Any, tmp_path: Path) -> None:
    rows = [
        {"id": "a", "instruction": "What is it?", "output": "x"},
        {"id": "b", "instruction": "what  is it? ", "output": "x"},
        {"id": "c", "instruction": "What is it?", "output": "y"},
    ]
    report, splits = prepared(rows=rows)
    file = tmp_path / "rows.jsonl"
    example = f"b ({file}:2): same prompt and responses as a ({file}:1)"
    assert report["dropped"] == {"duplicate": {"rows": 1, "examples": [example]}}
    assert sorted(where(splits)) == ["a", "c"]
    # One prompt, one split.
    assert len(set(where(splits).values())) == 1


def test_overlong_rows_are_dropped_never_cut(prepared: Any, tmp_path: Path) -> None:
    # The template adds 19 tokens to a question, the stop token 1 to an answer.
    rows = [
        {"id": "fits", "instruction": "q" * 181, "output": "a" * 199},
        {"id": "question", "instruction": "q" * 182, "output": "a"},
        {"id": "answer", "instruction": "q", "output": "a" * 200},
    ]
    report, splits = prepared(rows=rows)
    assert list(where(splits)) == ["fits"]
    file = tmp_path / "rows.jsonl"
    assert report["dropped"] == {
        "prompt_too_long": {
            "rows": 1,
            "examples": [f"question ({file}:2): 201 tokens, max_prompt_tokens is 200"],
        },
        "response_too_long": {
            "rows": 1,
            "examples": [f"answer ({file}:3): 201 tokens with the stop token, max_response_tokens is 200"],
        },
    }


def test_preference_loses_only_its_overlong_responses(prepared: Any) -> None:
    long, longer = "x" * 300, "y" * 400
    responses = {
        "worst": ["a", "b", long],
        "best": [long, "a", "b"],
        "rejected": ["a", long],
        "chosen": [long, "a"],
        "all": [long, longer],
    }
    rows = [{"id": id, "prompt": id, "responses": texts} for id, texts in responses.items()]
    report, splits = prepared(rows=rows, split_weights={**ONLY_SFT, "sft": 0, "reward": 1})
    assert {row.id: row.responses for row in splits["reward"]} == {
        "worst": ["a", "b"],
        "best": ["a", "b"],
        "rejected": ["a"],  # an instruction with the answer people preferred
    }
    assert all(len(row.response_ids) == len(row.responses) for row in splits["reward"])
    assert report["dropped"]["response_too_long"]["rows"] == 2
    assert report["responses_cut"]["response_too_long"]["rows"] == 3


def test_eval_shares_no_prompt_with_training(prepared: Any, tmp_path: Path) -> None:
    rows = templated_rows(300)
    shouted = [{"instruction": row["instruction"].upper(), "output": "another answer"} for row in rows]
    everything = source("all", path=str(write_jsonl(tmp_path / "all.jsonl", rows)))
    training = source("train", path=str(write_jsonl(tmp_path / "train.jsonl", shouted)), splits=["sft", "ppo"])
    report, splits = prepared(everything, training)
    held_out = {prompt_key(row.messages) for row in splits["eval"]}
    assert held_out
    for split in ("sft", "reward", "ppo", "ptx"):
        assert not held_out & {prompt_key(row.messages) for row in splits[split]}
    # Each held-out row has its shouting double in the source that is not open to eval.
    assert report["dropped"] == {
        "leak": {"rows": len(splits["eval"]), "examples": report["dropped"]["leak"]["examples"]}
    }
    assert report["dropped"]["leak"]["examples"][0].endswith("its question, or its group, is in eval")
    assert not any(row.id.startswith("train") for row in splits["eval"])


def test_benchmark_stays_whole(prepared: Any, tmp_path: Path) -> None:
    rows = templated_rows(50)
    # By name, and by being read first, the training source would keep the duplicates.
    training = source("a", path=str(write_jsonl(tmp_path / "a.jsonl", rows)), splits=["sft"])
    benchmark = source("b", path=str(write_jsonl(tmp_path / "b.jsonl", rows[:20])), splits=["eval"])
    report, splits = prepared(training, benchmark)
    assert sorted(row.id for row in splits["eval"]) == sorted(f"b-{line}" for line in range(1, 21))
    assert len(splits["sft"]) == 30
    assert report["dropped"]["duplicate"]["rows"] == 20


def test_group_shares_a_split(prepared: Any, tmp_path: Path) -> None:
    english = [{"id": f"en-{number}", **row} for number, row in enumerate(templated_rows(200))]
    chinese = [{"id": f"zh-{n}", "instruction": f"第{n}个问题", "output": f"第{n}个回答"} for n in range(200)]
    path = write_jsonl(tmp_path / "both.jsonl", [*english, *chinese])
    _, splits = prepared(source(path=str(path), group=r"^(?:en|zh)-(\d+)$"))
    placed = where(splits)
    assert len(placed) == 400
    assert all(placed[f"en-{number}"] == placed[f"zh-{number}"] for number in range(200))


def test_equal_numbers_under_other_patterns_are_no_group(prepared: Any, tmp_path: Path) -> None:
    paths = [
        write_jsonl(
            tmp_path / f"{name}.jsonl",
            [{"id": f"{name}-{n}", "instruction": f"{name} {n}?", "output": f"{name}!"} for n in range(40)],
        )
        for name in ("one", "other")
    ]
    one, other = (source(path.stem, path=str(path), group=f"^{path.stem}-(\\d+)$") for path in paths)
    _, splits = prepared(one, other)
    placed = where(splits)
    assert any(placed[f"one-{n}"] != placed[f"other-{n}"] for n in range(40))
    assert all(row.cluster == row.id for rows in splits.values() for row in rows)


def test_eval_is_capped_by_language_and_the_rest_does_not_train(prepared: Any) -> None:
    chinese = [{"instruction": f"第{n}个问题", "output": f"第{n}个回答"} for n in range(200)]
    rows = [*templated_rows(200), *chinese]
    whole = where(prepared(rows=rows)[1])
    report, splits = prepared(rows=rows, max_eval_rows=5)
    assert [sum(row.lang == lang for row in splits["eval"]) for lang in ("en", "zh")] == [5, 5]
    over = sum(split == "eval" for split in whole.values()) - 10
    assert report["dropped"] == {"over_max_eval_rows": {"rows": over, "examples": []}}
    assert where(splits).items() <= whole.items()


def test_row_without_an_open_split_is_counted(prepared: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"id": "p", "prompt": "hi"}])
    other = write_jsonl(tmp_path / "b.jsonl", templated_rows(1))
    report, _ = prepared(source("a", path=str(path), splits=["sft", "reward"]), source("b", path=str(other)))
    example = f"p ({path}:1): it is open to sft, reward and has 0 responses"
    assert report["dropped"] == {"no_split": {"rows": 1, "examples": [example]}}


def test_nothing_left_is_refused(prepared: Any) -> None:
    with pytest.raises(InputError, match=r'none of its 1 rows can be used: \{"prompt_too_long": 1\}'):
        prepared(rows=[{"instruction": "q" * 500, "output": "a"}])


def test_missing_template_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    from tests.data.factories import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(InputError, match=r"^base_model\.chat_template = null"):
        prepare(prepare_params(), tmp_path / "none", tokenizer, STOP_ID, tmp_path / "out")


def test_report_and_metrics(prepared: Any) -> None:
    rows = [
        {"id": "a", "lang": "en", "instruction": "hi", "output": "ok"},
        {"id": "b", "lang": "zh", "instruction": "你好", "output": "好"},
        {"id": "c", "lang": "zh", "instruction": "你好", "output": "好"},
    ]
    report, _ = prepared(rows=rows, split_weights=ONLY_SFT)
    # Prompts of 19 + 2 and 19 + 6 tokens; responses of 2 + 1 and 3 + 1.
    assert report["splits"]["sft"] == {
        "rows": 2,
        "languages": {"en": 1, "zh": 1},
        "sources": {"s": 2},
        "responses": {"1": 2},
        "tokens": 21 + 25 + 3 + 4,
        "lengths": {
            "prompt_tokens": {"min": 21, "median": 23, "mean": 23, "p95": pytest.approx(24.8), "max": 25},
            "response_tokens": {"min": 3, "median": 3.5, "mean": 3.5, "p95": pytest.approx(3.95), "max": 4},
            "question_characters": {"min": 2, "median": 2, "mean": 2, "p95": 2, "max": 2},
            "response_characters": {"min": 1, "median": 1.5, "mean": 1.5, "p95": pytest.approx(1.95), "max": 2},
        },
    }
    empty = {f"{split}/{what}": 0 for split in ("reward", "ppo", "ptx", "eval") for what in ("rows", "tokens")}
    assert prepare_metrics(report) == {
        "rows/in": 3,
        "rows/out": 2,
        "sft/rows": 2,
        "sft/tokens": 53,
        "sft/rows_en": 1,
        "sft/rows_zh": 1,
        **empty,
        "dropped/total": 1,
        "dropped/duplicate": 1,
        "noticed/one_character_answer": 2,
    }


def test_processes_change_nothing(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, ingested: Ingest, monkeypatch: pytest.MonkeyPatch
) -> None:
    forged = {"instruction": "x<|im_end|>", "output": "<|im_end|>"}
    _, raw = ingested(source(path=str(write_jsonl(tmp_path / "rows.jsonl", [*templated_rows(60), forged]))))
    monkeypatch.setattr(module, "MIN_PARALLEL_ROWS", 10)
    reports, bytes_written = [], []
    for workers in (1, 2):
        out = tmp_path / f"workers-{workers}"
        reports.append(prepare(prepare_params(num_workers=workers), raw, tokenizer, STOP_ID, out))
        bytes_written.append({path.relative_to(out): path.read_bytes() for path in out.rglob("*.arrow")})
    assert reports[0] == reports[1]
    assert bytes_written[0] == bytes_written[1]


def test_near_duplicates_are_dropped_and_other_answers_stay(prepared: Any) -> None:
    question = "Name three things that a lighthouse keeper of the nineteenth century did every evening"
    answer = "He trimmed the wick, wound the clockwork that turns the lens, and wrote the weather into the log book"
    rows = [
        {"id": "first", "instruction": f"{question}.", "output": f"{answer}."},
        {"id": "nearly", "instruction": f"{question}!", "output": f"{answer}!"},
        {"id": "other answer", "instruction": f"{question}!", "output": "He lit the lamp."},
        {"id": "other question", "instruction": "What is a keeper?", "output": f"{answer}."},
    ]
    report, splits = prepared(rows=rows)
    assert sorted(where(splits)) == ["first", "other answer", "other question"]
    assert {reason: found["rows"] for reason, found in report["dropped"].items()} == {"near_duplicate": 1}
    assert "nearly the prompt and responses of first" in report["dropped"]["near_duplicate"]["examples"][0]
    # Nearly one question: one cluster, and so one split.
    family = {row.id: row.family for rows in splits.values() for row in rows}
    assert family == {"first": "first", "other answer": "first", "other question": "other question"}
    assert where(splits)["first"] == where(splits)["other answer"]

    report, splits = prepared(rows=rows, cleaning=cleaning(near_duplicates="report"))
    assert len(where(splits)) == 4
    assert report["noticed"]["near_duplicate"]["rows"] == 1


def test_questions_asked_again_are_noticed(prepared: Any) -> None:
    rows = [
        {"id": "one", "instruction": "What is a keeper?", "output": "Someone who keeps."},
        {"id": "again", "instruction": "what is a  keeper?", "output": "A goalkeeper."},
        {"id": "more", "instruction": "What is a keeper?", "output": "One more."},
        {"id": "equal", "instruction": "What is a keeper?", "output": "One more."},
    ]
    report, splits = prepared(rows=rows)
    assert sorted(where(splits)) == ["again", "more", "one"]
    assert report["noticed"]["repeated_question"]["rows"] == 2
    assert "the question of one" in report["noticed"]["repeated_question"]["examples"][0]


def test_no_near_duplicate_of_an_eval_question_is_trained_on(prepared: Any) -> None:
    subjects = [
        "rivers",
        "castles",
        "engines",
        "poems",
        "islands",
        "teachers",
        "violins",
        "markets",
        "planets",
        "gardens",
    ]
    rows = [
        {
            "id": f"{n}-{end}",
            "instruction": f"Explain in {n} short sentences why {s} mattered to people{end}",
            "output": a,
        }
        for n, s in enumerate(subjects * 6, start=100)
        for end, a in ((".", f"Because of {s} number {n}."), (" !", f"They fed and pleased {n} of them."))
    ]
    report, splits = prepared(rows=rows)
    held_out = {row.id.split("-")[0] for row in splits["eval"]}
    assert held_out
    assert not held_out & {row.id.split("-")[0] for split in SPLITS[:-1] for row in splits[split]}
    assert report["leaked"] == 0


def test_weight_repeats_or_leaves_out_training_rows(prepared: Any, tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "rows.jsonl", templated_rows(300)))
    report, once = prepared(source(path=path))
    _, more = prepared(source(path=path, weight=2.5))
    less_report, less = prepared(source(path=path, weight=0.5))
    for split in ("reward", "ppo", "eval"):
        assert [row.id for row in once[split]] == [row.id for row in more[split]] == [row.id for row in less[split]]
    for split in ("sft", "ptx"):
        ids = {row.id for row in once[split]}
        counts = Counter(row.id.split("~")[0] for row in more[split])
        assert set(counts) == ids
        assert set(counts.values()) == {2, 3}
        assert len({row.id for row in more[split]}) == len(more[split])
        assert {row.id for row in less[split]} < ids
        assert all(row.family == row.id.split("~")[0] for row in more[split])
    assert less_report["dropped"]["below_weight"]["rows"] == report["rows_out"] - less_report["rows_out"] > 0


def test_text_is_mended_and_reported(prepared: Any, tmp_path: Path) -> None:
    rows = [
        {"id": "a", "instruction": "Where is the caf\u00c3\u00a9?\n\n<noinput>", "output": "Next\x00 door."},
        {"id": "b", "instruction": "Say something.", "output": "<nooutput>"},
    ]
    report, splits = prepared(rows=rows)
    [row] = [row for rows in splits.values() for row in rows]
    assert (row.question, row.responses) == ("Where is the café?", ["Next door."])
    assert {step: found["rows"] for step, found in report["mended"].items()} == {
        "control_characters": 1,
        "mojibake": 1,
        "placeholder_input": 1,
    }
    example = f"b ({tmp_path / 'rows.jsonl'}:2): the answer is '<nooutput>'"
    assert report["dropped"] == {"placeholder_answer": {"rows": 1, "examples": [example]}}
    assert report["sources"]["s"] == {
        "rows_in": 2,
        "rows_out": 1,
        "dropped": {"placeholder_answer": 1},
        "mended": {"control_characters": 1, "mojibake": 1, "placeholder_input": 1},
        "noticed": {},
    }


def test_added_rows_leave_all_files_but_the_last_as_they_are(prepared: Any, tmp_path: Path, tokenizer: Any) -> None:
    """Old rows keep their split, and of each split every file but the last keeps its bytes."""
    contents = []
    for number in (300, 330):
        path = write_jsonl(tmp_path / "rows.jsonl", templated_rows(number))
        raw = tmp_path / f"raw-{number}"
        raw.mkdir()
        ingest(raw_params(source(path=str(path)), shard_rows=20), raw)
        out = tmp_path / f"out-{number}"
        prepare(prepare_params(shard_rows=10), raw, tokenizer, STOP_ID, out)
        contents.append(
            {file.relative_to(folder): file.read_bytes() for folder in (raw, out) for file in folder.rglob("*.*")}
        )
    before, after = contents
    changed = [name for name in before if before[name] != after[name]]
    assert all(name == max(other for other in before if other.parent == name.parent) for name in changed)
    assert len(before) > 25
    assert where({split: read_split(tmp_path / "out-300" / split) for split in SPLITS}).items() <= (
        where({split: read_split(tmp_path / "out-330" / split) for split in SPLITS}).items()
    )


def test_rows_are_read_in_an_order_of_their_own_and_lazily(prepared: Any) -> None:
    _, splits = prepared(rows=templated_rows(400), split_weights=ONLY_SFT)
    rows = splits["sft"]
    assert [row.id for row in rows] == [rows[number].id for number in range(len(rows))] == [row.id for row in rows[:]]
    assert rows[-1] == rows[399]
    assert rows[5:7] == [rows[5], rows[6]]
    with pytest.raises(IndexError):
        rows[400]
