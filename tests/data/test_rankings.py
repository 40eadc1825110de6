"""Rankings on disk, what several say together, and how far they agree."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from chatloom.data.rankings import (
    Ranking,
    agreement,
    append_ranking,
    consensus,
    dense,
    file_stem,
    parse_rankings,
    read_candidates,
    read_rankings,
)
from chatloom.errors import InputError


def ranking(id: str, annotator: str, ranks: list[int], at: str = "2026-01-01T00:00:00+00:00") -> Ranking:
    responses = ["a", "b", "c"]
    return Ranking(id, "en", [{"role": "user", "content": id}], responses, "0" * 64, ranks, annotator, at, "")


def test_what_is_said_is_read_again(tmp_path: Path) -> None:
    said = [ranking("1", "Ann", [0, 1, 1]), ranking("1", "李雷", []), ranking("2", "Ann", [2, 0, 1])]
    for one in said:
        append_ranking(tmp_path, one)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["Ann.jsonl", "李雷.jsonl"]
    assert sorted(read_rankings(tmp_path), key=str) == sorted(said, key=str)


def test_later_ranking_replaces_the_earlier_one(tmp_path: Path) -> None:
    append_ranking(tmp_path, ranking("1", "Ann", [0, 1, 2], "2026-01-02T00:00:00+00:00"))
    append_ranking(tmp_path, ranking("1", "Ann", [2, 1, 0], "2026-01-03T00:00:00+00:00"))
    assert [one.ranks for one in read_rankings(tmp_path)] == [[2, 1, 0]]


def test_line_cut_by_a_crash_loses_itself_only(tmp_path: Path) -> None:
    append_ranking(tmp_path, ranking("1", "Ann", [0, 1, 2]))
    file = tmp_path / "Ann.jsonl"
    file.write_bytes(file.read_bytes() + file.read_bytes()[:40])
    assert [one.id for one in read_rankings(tmp_path)] == ["1"]


@pytest.mark.parametrize("whole", [True, False])
def test_line_that_follows_one_without_an_end_is_its_own(tmp_path: Path, whole: bool) -> None:
    append_ranking(tmp_path, ranking("1", "Ann", [0, 1, 2]))
    append_ranking(tmp_path, ranking("2", "Ann", [0, 1, 2]))
    file = tmp_path / "Ann.jsonl"
    file.write_bytes(file.read_bytes()[: -1 if whole else -20])
    append_ranking(tmp_path, ranking("3", "Ann", [0, 1, 2]))
    assert [one.id for one in read_rankings(tmp_path)] == (["1", "2", "3"] if whole else ["1", "3"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": [0, 1]}, "r:1: 2 ranks of 3 responses"),
        ({"annotator": " "}, "r:1: no annotator"),
        ({"ranks": ["first"]}, "r:1: ranks.0: Input should be a valid integer"),
        ({"stars": 5}, "r:1: stars: Unexpected keyword argument"),
    ],
)
def test_ranking_that_is_none_is_named(change: dict[str, Any], message: str) -> None:
    values = {**asdict(ranking("1", "Ann", [0, 1, 2])), **change}
    with pytest.raises(InputError) as caught:
        parse_rankings(json.dumps(values) + "\n", "r")
    assert str(caught.value) == message


def test_no_candidates_name_the_stage(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run the stage compare"):
        read_candidates(tmp_path / "candidates.jsonl")


@pytest.mark.parametrize(
    ("name", "stem"), [("Ann", "Ann"), ("  Ann B. ", "Ann_B"), ("../x", "x"), ("小明", "小明"), ("...", "_")]
)
def test_file_of_a_name(name: str, stem: str) -> None:
    assert file_stem(name) == stem


def test_several_say_the_mean_of_what_each_said() -> None:
    said = [
        ranking("1", "Ann", [0, 1, 2]),
        ranking("1", "Bob", [0, 5, 3], "2026-01-02T00:00:00+00:00"),  # dense: 0, 2, 1
        ranking("2", "Ann", []),
        ranking("2", "Bob", [0, 1, 2]),
        ranking("2", "Eve", []),
        ranking("3", "Ann", []),
    ]
    [one] = consensus(said)
    # Means 0, 1.5 and 1.5: a tie. Two of three say that all answers to prompt 2 are bad.
    assert (one.ranking.id, one.ranks, one.annotators, one.at) == (
        "1",
        [0, 1, 1],
        ["Ann", "Bob"],
        "2026-01-02T00:00:00+00:00",
    )


def test_dense_ranks() -> None:
    assert dense([7, 3, 7, 10]) == [1, 0, 1, 2]


def test_agreement_is_krippendorffs() -> None:
    same = [ranking("1", "Ann", [0, 1, 2]), ranking("1", "Bob", [0, 1, 2])]
    assert agreement(same) == pytest.approx(1.0)
    assert agreement([ranking("1", "Ann", [0, 1, 2]), ranking("1", "Bob", [2, 1, 0])]) < 0
    assert agreement([ranking("1", "Ann", [0, 1, 2]), ranking("2", "Bob", [0, 1, 2])]) is None
    assert agreement([ranking("1", "Ann", [0, 0, 0]), ranking("1", "Bob", [0, 0, 0])]) is None
    assert agreement([]) is None
