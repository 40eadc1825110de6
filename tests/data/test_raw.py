"""Ingestion: canonical rows with provenance, drops with reasons, ids, caps, equal bytes."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from chatloom.data.raw import SCHEMA, ingest, raw_metrics, read_raw
from chatloom.data.schemas import RawRow
from chatloom.errors import InputError
from tests.data.conftest import Ingest
from tests.data.factories import raw_params, source, write_jsonl


def pair(number: int) -> dict[str, str]:
    return {"instruction": f"question {number}", "output": f"answer {number}"}


def test_row_keeps_where_it_came_from(tmp_path: Path, ingested: Ingest) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"id": "en-7", "lang": "fr", **pair(1)}])
    _, out = ingested(source("mine", path=str(path), license="MIT", splits=["sft"], group=r"^\w+-(\d+)$"))
    assert list(read_raw(out)) == [
        RawRow(
            id="en-7",
            lang="fr",
            messages=[{"role": "user", "content": "question 1"}],
            responses=["answer 1"],
            source="mine",
            file=str(path),
            line=1,
            license="MIT",
            group=r"^\w+-(\d+)$ 7",
            splits=["sft"],
            weight=1,
        )
    ]
    assert [shard.name for shard in out.iterdir()] == ["mine-00000.parquet"]
    assert pq.read_schema(out / "mine-00000.parquet").equals(SCHEMA)


def test_language_is_the_rows_the_sources_or_the_scripts(tmp_path: Path, ingested: Ingest) -> None:
    rows = [{"lang": "de", **pair(1)}, pair(2), {"instruction": "你好吗？", "output": "很好"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    _, by_script = ingested(source(path=str(path)))
    _, given = ingested(source(path=str(path), lang="fr"))
    assert [row.lang for row in read_raw(by_script)] == ["de", "en", "zh"]
    assert [row.lang for row in read_raw(given)] == ["de", "fr", "fr"]


def test_ids_are_made_unique(tmp_path: Path, ingested: Ingest) -> None:
    one = write_jsonl(tmp_path / "one.jsonl", [{"id": "x", **pair(1)}, {"id": "x", **pair(2)}, {"id": "x", **pair(3)}])
    two = write_jsonl(tmp_path / "two.jsonl", [{"id": "x", **pair(4)}, {"id": 5, **pair(5)}, pair(6)])
    _, out = ingested(source("a", path=str(one)), source("b", path=str(two)))
    assert [row.id for row in read_raw(out)] == ["x", "a-x", "a-x-3", "b-x", "5", "b-3"]


def test_ids_of_several_files_name_the_file(tmp_path: Path, ingested: Ingest) -> None:
    for name in ("one.jsonl", "two.jsonl.gz"):
        write_jsonl(tmp_path / "files" / name, [pair(1)])
    _, out = ingested(source(path=str(tmp_path / "files")))
    assert [row.id for row in read_raw(out)] == ["s-one-1", "s-two-1"]


def test_report_counts_every_drop_with_examples(tmp_path: Path, ingested: Ingest) -> None:
    rows = [pair(1), *[{"instruction": "a", "output": ""}] * 4, {"instruction": "a"}, {"lang": "?", **pair(2)}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with path.open("a") as file:
        file.write("{broken\n")
    report, _ = ingested(source(path=str(path)))
    dropped = {
        "broken_json": {
            "rows": 1,
            "examples": [
                f"{path}:8: not valid JSON: Expecting property name enclosed in double quotes at column 2",
            ],
        },
        "empty_answer": {"rows": 4, "examples": [f"{path}:{line}: output is empty" for line in (2, 3, 4)]},
        "missing_key": {"rows": 1, "examples": [f"{path}:6: no key 'output'"]},
        "unknown_language": {"rows": 1, "examples": [f"{path}:7: lang is '?', expected a code like en or zh"]},
    }
    assert report == {
        "rows_in": 8,
        "rows_out": 1,
        "dropped": dropped,
        "languages": {"en": 1},
        "sources": [
            {
                "name": "s",
                "license": "Apache-2.0",
                "splits": ["sft", "reward", "ppo", "ptx", "eval"],
                "weight": 1,
                "rows_in": 8,
                "rows_out": 1,
                "dropped": dropped,
                "languages": {"en": 1},
                "skipped_files": [],
                "files": [
                    {
                        "file": str(path),
                        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                        "format": "alpaca",
                        "detected": True,
                        "ignored_keys": [],
                        "rows_in": 8,
                        "rows_out": 1,
                        "dropped": dropped,
                        "leading_assistant_turns_made_system": 0,
                        "rows_without_group": 0,
                    }
                ],
            }
        ],
    }
    assert raw_metrics(report) == {
        "rows/in": 8,
        "rows/out": 1,
        "languages/en": 1,
        "dropped/total": 7,
        "dropped/broken_json": 1,
        "dropped/empty_answer": 4,
        "dropped/missing_key": 1,
        "dropped/unknown_language": 1,
    }


def test_prompts_csv_and_text_are_prompts(tmp_path: Path, ingested: Ingest) -> None:
    (tmp_path / "prompts.csv").write_text('id,prompt\np1,"Hi, you"\n')
    (tmp_path / "prompts.txt").write_text("一二三\n")
    report, out = ingested(
        source("csv", path=str(tmp_path / "prompts.csv")), source("txt", path=str(tmp_path / "prompts.txt"))
    )
    assert [(row.id, row.lang, row.messages[0]["content"], row.responses) for row in read_raw(out)] == [
        ("p1", "en", "Hi, you", []),
        ("txt-1", "zh", "一二三", []),
    ]
    assert [item["files"][0]["format"] for item in report["sources"]] == ["prompt", "text"]


def test_format_overrides_detection(tmp_path: Path, ingested: Ingest) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "What now?"}])
    report, out = ingested(source(path=str(path), format="text"))
    assert [row.messages for row in read_raw(out)] == [[{"role": "user", "content": "What now?"}]]
    assert report["sources"][0]["files"][0]["detected"] is False


def test_hf_rows_are_ingested(tmp_path: Path, ingested: Ingest) -> None:
    write_jsonl(tmp_path / "set" / "train.jsonl", [pair(1)])
    name = f"{tmp_path / 'set'}:train"
    report, out = ingested(source(hf=name))
    assert [(row.file, row.line, row.responses) for row in read_raw(out)] == [(name, 1, ["answer 1"])]
    assert report["sources"][0]["files"][0]["sha256"] is None


def test_equal_sources_give_equal_bytes(tmp_path: Path, ingested: Ingest) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", map(pair, range(50)))
    folders = [ingested(source(path=str(path), max_rows=25), shard_rows=10)[1] for _ in range(2)]
    first, second = ({shard.name: shard.read_bytes() for shard in folder.iterdir()} for folder in folders)
    assert sorted(first) == ["s-00000.parquet", "s-00001.parquet", "s-00002.parquet"]
    assert first == second


def test_cap_is_by_content_and_keeps_the_order(tmp_path: Path, ingested: Ingest) -> None:
    def kept(rows: list[dict[str, str]]) -> list[str]:
        path = write_jsonl(tmp_path / "a.jsonl", rows)
        report, out = ingested(source(path=str(path), max_rows=20))
        assert report["dropped"] == {"over_max_rows": {"rows": len(rows) - 20, "examples": []}}
        return [row.responses[0] for row in read_raw(out)]

    rows = [pair(number) for number in range(100)]
    before = kept(rows)
    assert before == sorted(before, key=lambda answer: int(answer.split()[1]))
    assert set(kept(rows[::-1])) == set(before)
    appended = kept([*rows, *(pair(number) for number in range(100, 110))])
    # Ten of 110 rows are new: of the 20 with the smallest hashes, about two.
    assert len(set(before) & set(appended)) >= 14


def test_file_without_a_usable_row_is_refused(tmp_path: Path, ingested: Ingest) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"instruction": "a", "output": ""}] * 2)
    with pytest.raises(InputError) as caught:
        ingested(source(path=str(path)))
    assert str(caught.value) == (
        f"{path}:1: output is empty\nnone of the 2 rows of {path} can be used as alpaca; "
        "if that is not its format, set raw_data.sources[0].format"
    )


def test_file_of_broken_lines_is_refused(tmp_path: Path, ingested: Ingest) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("x\ny\n")
    message = f"{path}:1: not valid JSON: Expecting value at column 1\nnone of its 2 rows can be read"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        ingested(source(path=str(path)))


def test_empty_file_is_refused(tmp_path: Path, ingested: Ingest) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [])
    for format in ("auto", "alpaca"):
        with pytest.raises(InputError, match=f"^{re.escape(str(path))}: no rows$"):
            ingested(source(path=str(path), format=format))


def test_unknown_schema_names_keys_and_what_is_accepted(tmp_path: Path, ingested: Ingest) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "a", "best": "b"}, {"question": "a", "worst": "b"}])
    with pytest.raises(InputError) as caught:
        ingested(source(path=str(path)))
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path}: unknown schema, its rows have the keys best, question, worst; accepted:"
    assert lines[1] == '  alpaca: {"instruction", "input"?, "output"}'
    assert lines[-1] == "rename its keys, or set raw_data.sources[0].format"


@pytest.mark.parametrize(
    ("group", "problem"),
    [
        ("(", "not a regular expression: "),
        (r"\d+", "has no group; put the part that translations share in parentheses"),
    ],
)
def test_unusable_group_is_refused(tmp_path: Path, ingested: Ingest, group: str, problem: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [pair(1)])
    with pytest.raises(InputError, match=re.escape(f"raw_data.sources[0].group = {group!r}: {problem}")):
        ingested(source(path=str(path), group=group))


def test_second_source_is_named_by_its_place(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [pair(1)])
    with pytest.raises(InputError, match=r"^raw_data\.sources\[1\]\.path = 'none\.csv': no such file or folder"):
        ingest(raw_params(source("a", path=str(path)), source("b", path="none.csv")), tmp_path)


def test_folder_without_raw_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no raw rows; run the stage raw_data first"):
        next(read_raw(tmp_path))
