"""Placing by hash: shares, openness, one fate for one prompt."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest

from chatloom.config import Split
from chatloom.data.splits import SPLITS, Placement, leaked, normalised, prompt_key, unit_hash

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


def test_leak_is_a_held_out_prompt_or_group() -> None:
    training = [Row("a"), Row("b"), Row("c", "1"), Row("d", "2"), Row("e")]
    assert leaked(training, [Row("b"), Row("x", "2"), Row("y")]) == [False, True, False, True, False]
