"""The stage `compare`: what is sampled, who ranks it, and what of people's rankings may be used."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from chatloom.config import CompareParams, JudgeParams, load_params
from chatloom.data.judge import Judge, OverBudget
from chatloom.data.prepared import PreparedRow
from chatloom.data.rankings import Consensus, Ranking
from chatloom.models.checkpoint import ChatModel
from chatloom.models.rollouts import native
from stages import compare
from tests.conftest import ROOT

JUDGE = JudgeParams(url="http://127.0.0.1:9/v1", model="m", max_requests=10, retries=0, timeout=1.0)


def params(**changes: Any) -> CompareParams:
    return load_params(ROOT / "params.yaml").compare.model_copy(update=changes)


def row(id: str, *responses: str, cluster: str | None = None) -> PreparedRow:
    messages = [{"role": "user", "content": f"Question {id}?"}]
    ids = [[20 + number, 2] for number in range(len(responses))]
    return PreparedRow(id, "en", messages, [5, 6, 7], [False] * 3, list(responses), ids, cluster)


def test_temperatures_take_turns(chat: ChatModel) -> None:
    rows = [row("a", "x"), row("b", "x")]
    p = params(num_responses=4, temperatures=[0.001, 3.0], max_new_tokens=6)
    answers = compare.sample(rows, chat, native(4), p)
    for _, tokens in answers:
        # Close to 0 the likeliest token is taken: the first and the third are equal, the hot ones differ.
        assert tokens[0] == tokens[2]
        assert len({tuple(one) for one in tokens}) > 1
    assert compare.sample(rows, chat, native(4), p) == answers


def test_candidates_are_distinct_answers_without_the_reference() -> None:
    rows = [row("a", "the tea"), row("b", "the tea")]
    answers = [(["one", "the tea", "two", "one", " "], [[1]] * 5), (["one", "one", "one", "", "the tea"], [[1]] * 5)]
    [candidate] = compare.candidates_of(rows, answers, "hash")
    assert (candidate.id, candidate.responses, candidate.sft) == ("a", ["one", "two"], "hash")


def test_judge_ranks_while_its_budget_lasts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    verdicts = iter([[1, 0], OverBudget()])

    def said(self: Judge, messages: Any, responses: Any) -> list[int]:
        verdict = next(verdicts)
        if isinstance(verdict, OverBudget):
            raise verdict
        return verdict

    monkeypatch.setattr(Judge, "rank", said)
    sampled = [(row(id, "the tea is hot"), (["coal", "the tea"], [[30], [31]])) for id in ("a", "b")]
    counts: Counter[str] = Counter()
    first, second = compare.rank(sampled, "hash", params(ranked_by=["judge", "reference"], judge=JUDGE), counts)
    assert (first.ranked_by, first.responses, first.ranks) == (
        ["judge m"],
        ["the tea is hot", "the tea", "coal"],
        [0, 1, 2],
    )
    assert (second.ranked_by, second.responses, second.sft) == (
        ["reference"],
        ["the tea is hot", "the tea", "coal"],
        "hash",
    )
    assert counts["judge/over_budget"] == 1
    assert compare.rank([], "hash", params(ranked_by=["people"]), Counter()) == []


def test_people_rank_only_prompts_of_the_split(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(compare, "SFT", checkpoint)
    rows = [row("a", "x"), row("b", "x")]

    def said(of: PreparedRow, ranks: list[int]) -> Consensus:
        ranking = Ranking(of.id, "en", of.messages, ["one", "two"], "hash", ranks, "Ann", "2026-01-01", "")
        return Consensus(ranking, ranks, ["Ann", "Bob"], "2026-01-02")

    counts: Counter[str] = Counter()
    moved = row("gone", "x")
    changed = PreparedRow("b", "en", [{"role": "user", "content": "Another question?"}], [5], [False], ["x"], [[2]])
    found = compare.ranked_by_people(
        [said(rows[0], [1, 0]), said(moved, [0, 1]), said(changed, [0, 1])], rows, params(), counts
    )
    assert list(found) == ["a"]
    comparison = found["a"]
    assert (comparison.responses, comparison.ranks, comparison.pairs) == (["two", "one"], [0, 1], [(0, 1)])
    assert (comparison.ranked_by, comparison.ranked_at, comparison.sft) == (["Ann", "Bob"], "2026-01-02", "hash")
    assert counts == {"people/not_in_split": 2}
    assert all(ids[-1] == compare.stop_ids(checkpoint)[0] for ids in comparison.response_ids)


def test_rows_that_ask_nearly_the_same_are_on_one_side_of_the_holdout() -> None:
    alone = [compare.holdout_of(row(f"r{n}", "x"), params(holdout=0.5)) for n in range(40)]
    family = [compare.holdout_of(row(f"r{n}", "x", cluster="r0"), params(holdout=0.5)) for n in range(40)]
    assert len(set(alone)) == 2
    assert set(family) == {alone[0]}


def test_the_gold_model_learns_from_other_pairs() -> None:
    rows = [row(f"r{n}", "x", "y") for n in range(200)] + [row(f"f{n}", "x", "y", cluster="r0") for n in range(10)]
    given = params(gold=0.5)
    found = compare.apart([compare.imported(one, compare.holdout_of(one, given)) for one in rows], rows, given)
    assert not any(one.gold and one.holdout for one in found)
    gold = sum(one.gold for one in found[:200])
    assert 0.5 * 160 - 20 < gold < 0.5 * 160 + 20, "half of those that are not held out, a fifth of all"
    assert len({(one.gold, one.holdout) for one in found[200:]} | {(found[0].gold, found[0].holdout)}) == 1
    assert not any(one.gold for one in compare.apart(found, rows, params(gold=0.0)))


def test_hash_names_the_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"a")
    (tmp_path / "config.json").write_text("{}")
    first = compare.weights_sha256(tmp_path)
    (tmp_path / "config.json").write_text("{ }")
    assert compare.weights_sha256(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"b")
    assert compare.weights_sha256(tmp_path) != first
