"""Placing by hash: shares, openness, one fate for one prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from chatloom.config import Split
from chatloom.data.cleaning import normalised
from chatloom.data.splits import SPLITS, Placed, Placement, assign, leaks, prompt_key, unit_hash

WEIGHTS: dict[Split, float] = {"sft": 0.4, "reward": 0.2, "ppo": 0.1, "ptx": 0.1, "eval": 0.2}
PLACEMENT = Placement(WEIGHTS, 42)
KEYS = [f"key {number}" for number in range(4000)]


@pytest.mark.parametrize(
    ("one", "other"),
    [("What  is\nit? ", "what is it?"), ("１＋１＝？", "1+1=?"), ("STRASSE", "straße"), ("ﬁne", "fine")],
)
def test_normalised_texts_are_equal(one: str, other: str) -> None:
    assert normalised(one) == normalised(other)


def test_prompt_key_tells_roles_and_turns_apart() -> None:
    contexts = [
        [{"role": "user", "content": "a b"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        [{"role": "system", "content": "a b"}],
        [{"role": "user", "content": "b a"}],
    ]
    assert len({prompt_key(context) for context in contexts}) == 4
    assert prompt_key([{"role": "user", "content": "A  B"}]) == prompt_key(contexts[0])


def test_hash_is_even_and_differs_by_purpose_and_seed() -> None:
    tenths = Counter(int(10 * unit_hash(1, "x", key)) for key in KEYS)
    assert sorted(tenths) == list(range(10))
    # 400 expected, standard deviation 19.
    assert all(320 < count < 480 for count in tenths.values())
    assert unit_hash(1, "x", "a") != unit_hash(1, "y", "a") != unit_hash(2, "x", "a")


def test_shares_follow_the_weights() -> None:
    shares = Counter(PLACEMENT.place(key, SPLITS, 1) for key in KEYS)
    for split, weight in WEIGHTS.items():
        assert shares[split] / len(KEYS) == pytest.approx(weight, abs=0.03)


def test_eval_does_not_depend_on_what_else_is_open() -> None:
    fates = [PLACEMENT.place(key, SPLITS, 1) == "eval" for key in KEYS]
    assert fates == [PLACEMENT.place(key, ["ppo", "eval"], 0) == "eval" for key in KEYS]


@pytest.mark.parametrize(
    ("open_to", "num_responses", "expected"),
    [
        (SPLITS, 0, {"ppo", "eval"}),
        (["sft", "ptx"], 1, {"sft", "ptx"}),
        (["sft", "eval"], 0, {"eval"}),
        (["eval"], 1, {"eval"}),
        (["reward"], 2, {"reward"}),
        (["sft", "reward", "ptx"], 0, {None}),
    ],
)
def test_row_goes_only_where_it_may_and_qualifies(
    open_to: list[Split], num_responses: int, expected: set[Split | None]
) -> None:
    assert {PLACEMENT.place(key, open_to, num_responses) for key in KEYS[:300]} == expected


def test_weight_zero_leaves_a_split_empty() -> None:
    without = Placement({**WEIGHTS, "eval": 0.0, "ppo": 0.0}, 42)
    assert {without.place(key, SPLITS, 1) for key in KEYS[:300]} == {"sft", "reward", "ptx"}
    assert without.place("a", ["ppo", "eval"], 1) is None


@dataclass(frozen=True)
class Row:
    prompt_key: str
    group: str | None = None
    splits: Sequence[Split] = SPLITS
    num_responses: int = 1

    @property
    def id(self) -> str:
        return f"id of {self.prompt_key}"


def assigned(rows: list[Row], near: dict[str, set[str]]) -> list[str]:
    """Split of each row, or the reason why it has none."""
    found = assign(rows, near, PLACEMENT)
    return [placed.split if isinstance(placed, Placed) else placed.reason for placed in found]


def key_in(split: Split, number: int = 0) -> str:
    """A key that is placed in `split` by itself."""
    return [key for key in KEYS if PLACEMENT.place(key, SPLITS, 1) == split][number]


def test_leak_is_a_held_out_prompt_or_group_or_one_nearly_the_same() -> None:
    training = [Row("a"), Row("b"), Row("c", "1"), Row("d", "2"), Row("e"), Row("f")]
    near = {"e": {"y"}, "y": {"e"}}
    assert [row.prompt_key for row in leaks(training, [Row("b"), Row("x", "2"), Row("y")], near)] == ["b", "d", "e"]


def test_near_duplicates_share_the_split_of_the_first() -> None:
    first, other = key_in("eval"), key_in("sft")
    near = {first: {other}, other: {first}}
    assert assigned([Row(first), Row(other)], near) == ["eval", "eval"]
    assert assigned([Row(other), Row(first)], near) == ["sft", "sft"]
    clusters = [
        placed.cluster for placed in assign([Row(first), Row(other)], near, PLACEMENT) if isinstance(placed, Placed)
    ]
    assert clusters == [f"id of {first}"] * 2


def test_near_duplicate_that_may_not_follow_is_a_leak() -> None:
    first, other = key_in("eval"), key_in("sft")
    near = {first: {other}, other: {first}}
    assert assigned([Row(first), Row(other, splits=["sft"])], near) == ["eval", "leak"]
    assert assigned([Row(other, splits=["sft"]), Row(first, splits=["eval"])], near) == ["sft", "leak"]


def test_row_between_two_sides_is_a_leak_and_changes_neither() -> None:
    held_out, trained, between = key_in("eval"), key_in("sft"), key_in("sft", 1)
    near = {between: {held_out, trained}, held_out: {between}, trained: {between}}
    assert assigned([Row(held_out), Row(trained), Row(between)], near) == ["eval", "sft", "leak"]


def test_group_follows_its_first_row() -> None:
    first, other = key_in("eval"), key_in("sft")
    near = {first: {other}, other: {first}}
    # The translation of a row that is nearly the first one.
    assert assigned([Row(first), Row(other, "1"), Row("translation", "1")], near) == ["eval"] * 3
