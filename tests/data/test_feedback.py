"""What people said on the chat page becomes rows: which line makes which, and which says nothing to learn from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chatloom.config import Format
from chatloom.data.drops import RowFault
from chatloom.data.feedback import learn
from chatloom.data.raw import read_raw
from chatloom.data.schemas import detect_format
from tests.data.conftest import Ingest
from tests.data.factories import source, write_jsonl

TEA, COFFEE = [{"role": "user", "content": "Tea?"}], [{"role": "user", "content": "Coffee?"}]


def said(rating: str, answer: str, messages: list[dict[str, str]] = TEA, **more: Any) -> dict[str, Any]:
    """The answer's text is its id, in capitals."""
    line = {"rating": rating, "answer": answer, "messages": messages, "response": answer.upper(), "model": "chatloom/3"}
    return {**line, "annotator": None, "at": "2026-01-01T12:00:00.000+00:00", "comment": "", **more}


def other(answer: str) -> dict[str, Any]:
    return {"answer": answer, "response": answer.upper(), "model": "chatloom/3"}


def rows(*lines: dict[str, Any]) -> list[list[str] | str]:
    """Of each line the responses that it gives, best first, or why it gives none."""
    found = list(learn(enumerate(lines, start=1)))
    assert [line for line, _ in found] == list(range(1, len(lines) + 1))
    return [row.reason if isinstance(row, RowFault) else row["responses"] for _, row in found]


def test_thumb_up_is_an_answer_to_learn_and_thumb_down_alone_says_nothing() -> None:
    assert rows(said("up", "a"), said("down", "b", COFFEE)) == [["A"], "no_preference"]


def test_opposite_thumbs_on_one_prompt_are_a_pair() -> None:
    assert rows(said("up", "a"), said("down", "b")) == [["A"], ["A", "B"]]
    assert rows(said("down", "a"), said("up", "b")) == ["no_preference", ["B", "A"]]
    # With the latest opposite one, and never across prompts.
    lines = [said("down", "a"), said("down", "b"), said("up", "c"), said("up", "d", COFFEE), said("down", "e")]
    assert rows(*lines) == ["no_preference", "no_preference", ["C", "B"], ["D"], ["C", "E"]]


def test_system_prompt_is_part_of_the_prompt() -> None:
    told = [{"role": "system", "content": "Be brief."}, *TEA]
    assert rows(said("up", "a"), said("down", "b", told)) == [["A"], "no_preference"]


def test_same_text_said_twice_is_no_pair() -> None:
    assert rows(said("up", "a"), said("down", "b", response="A")) == [["A"], "no_preference"]


def test_comparison_is_a_pair_and_a_tie_is_none() -> None:
    assert rows(said("better", "b", other=other("a"))) == [["B", "A"]]
    assert rows(said("tie", "b", other=other("a"))) == ["no_preference"]


def test_last_word_on_an_answer_counts() -> None:
    assert rows(said("up", "a"), said("down", "a"), said("up", "b")) == ["replaced", "no_preference", ["B", "A"]]
    assert rows(said("up", "a"), said("none", "a"), said("down", "b")) == ["replaced", "taken_back", "no_preference"]
    # A comment is sent with the thumb once more.
    assert rows(said("up", "a"), said("up", "a", comment="clear")) == ["replaced", ["A"]]
    # Of a pair, whichever was named first; a thumb on one of the two is something else.
    lines = [said("better", "b", other=other("a")), said("up", "b"), said("better", "a", other=other("b"))]
    assert rows(*lines) == ["replaced", ["B"], ["A", "B"]]


def test_annotators_do_not_replace_each_other() -> None:
    assert rows(said("up", "a", annotator="Ann"), said("up", "a", annotator="Bob")) == [["A"], ["A"]]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rating": "fine"}, "unknown_rating"),
        ({"rating": ["up"]}, "unknown_rating"),
        ({"rating": "better"}, "missing_key"),
        ({"rating": "tie", "other": "b"}, "missing_key"),
    ],
)
def test_line_that_is_none_is_named(change: dict[str, Any], reason: str) -> None:
    assert rows({**said("up", "a"), **change}) == [reason]


@pytest.mark.parametrize("format", ["auto", "feedback"])
def test_raw_data_reads_the_file(tmp_path: Path, ingested: Ingest, format: Format) -> None:
    told = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "茶好喝吗？"}]
    lines = [
        said("up", "a"),
        said("down", "b"),
        said("up", "c", told),
        said("up", "d", COFFEE, response=" "),
        said("down", "e", [*COFFEE, {"role": "assistant", "content": "Yes."}, *TEA]),
    ]
    assert detect_format(lines) == "feedback"
    path = write_jsonl(tmp_path / "feedback.jsonl", lines)
    with path.open("a") as file:
        file.write('{"rating": "up", "ans')  # a crash
    report, out = ingested(source("page", path=str(path), format=format))
    found = [(row.line, row.lang, row.messages, row.responses) for row in read_raw(out)]
    assert found == [(1, "en", TEA, ["A"]), (2, "en", TEA, ["A", "B"]), (3, "zh", told, ["C"])]
    assert (report["rows_in"], report["rows_out"]) == (6, 3)
    assert {reason: dropped["rows"] for reason, dropped in report["dropped"].items()} == {
        "broken_json": 1,
        "empty_answer": 1,
        "no_preference": 1,
    }
    assert report["sources"][0]["files"][0]["ignored_keys"] == ["at", "comment", "model"]


def test_lines_added_later_leave_earlier_rows_as_they_are() -> None:
    lines = [said("up", "a"), said("down", "b"), said("better", "c", other=other("a"))]
    assert rows(*lines, said("down", "d"), said("up", "e"))[:3] == rows(*lines)
