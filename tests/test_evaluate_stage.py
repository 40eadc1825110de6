"""The stage `evaluate`: who wins, by the reward models and by a judge, and PPO's looks at held-out prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from chatloom.config import EvaluateParams, JudgeParams, load_params
from chatloom.data.judge import Judge, OverBudget
from chatloom.data.prepared import PreparedRow
from chatloom.errors import InputError
from chatloom.evaluation.sheets import Answers
from stages import evaluate
from tests.conftest import ROOT

JUDGE = JudgeParams(url="http://127.0.0.1:9/v1", model="m", max_requests=10, retries=0, timeout=1.0)


def params(**changes: Any) -> EvaluateParams:
    return load_params(ROOT / "params.yaml").evaluate.model_copy(update={"bootstrap_samples": 200, **changes})


def answers(*texts: str) -> Answers:
    return Answers(list(texts), [[7] * (len(text) + 1) for text in texts])


FOUND = {"base": answers("a", "b"), "sft": answers("aa", "b"), "ppo": answers("a", "bbb"), "4bit": answers("a", "b")}
PROMPTS = [PreparedRow(f"r{n}", "en", [{"role": "user", "content": "?"}], [5], [False], [], []) for n in range(2)]


def test_scores_gains_and_win_rates_by_both_reward_models() -> None:
    gold = {"base": [0.0, 0.0], "sft": [1.0, 0.0], "ppo": [0.0, 3.0], "4bit": [0.0, 4.0]}
    own = {"base": [0.0, 0.0], "sft": [0.0, 0.0], "ppo": [1.0, 1.0], "4bit": [0.0, 1.0]}
    found = evaluate.against(FOUND, {"reward": own, "gold": gold}, params())
    assert (found["ppo/gold_score"], found["4bit/gold_score"], found["ppo/reward_score"]) == (1.5, 2.0, 1.0)
    assert (found["ppo/gold_gain"], found["ppo/reward_gain"]) == (1.0, 1.0)  # mean of -1 and 3; of 1 and 1
    assert (found["ppo/gold_gain_low"], found["ppo/gold_gain_high"]) == (-1.0, 3.0)
    assert found["win_rate/ppo_over_sft/reward"] == 1.0
    assert found["win_rate/ppo_over_sft/gold"] == 0.5
    assert found["win_rate/4bit_over_ppo/gold"] == 0.75  # a tie and a win
    assert 0 < found["win_rate/ppo_over_sft/gold_length_controlled"] < 1


def judged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, places: Sequence[list[int]], judge: Any
) -> dict[str, float]:
    said = list(places)

    def rank(self: Judge, messages: Any, responses: Sequence[str]) -> list[int]:
        if not said:
            raise OverBudget
        self.asked += 2
        return said.pop(0)

    monkeypatch.setattr(Judge, "rank", rank)
    monkeypatch.setattr(evaluate, "JUDGE_CACHE", tmp_path / "judge")
    return evaluate.judged(FOUND, PROMPTS, params(judge=judge))


def test_a_judge_is_asked_only_where_answers_differ_and_while_its_budget_lasts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # PPO over SFT: a win, a tie. 4-bit over PPO: the first answers are equal, then the budget is used up.
    found = judged(monkeypatch, tmp_path, [[0, 1], [0, 0]], JUDGE)
    assert found["win_rate/ppo_over_sft/judge"] == 0.75
    assert found["win_rate/ppo_over_sft/judge_prompts"] == 2
    assert (found["win_rate/4bit_over_ppo/judge"], found["win_rate/4bit_over_ppo/judge_prompts"]) == (0.5, 1)
    assert (found["judge/requests"], found["judge/unclear"]) == (4, 0)
    assert judged(monkeypatch, tmp_path, [], None) == {}


def test_a_judge_that_cannot_be_reached_is_named_by_its_key(tmp_path: Path) -> None:
    judge = Judge(JUDGE, tmp_path, key="evaluate.judge")
    with pytest.raises(InputError, match=r"evaluate\.judge\.url = 'http://127\.0\.0\.1:9/v1': cannot be reached"):
        judge.rank(PROMPTS[0].messages, ["one", "two"])


def test_looks_come_back_step_by_step(tmp_path: Path) -> None:
    file = tmp_path / "looks.json"
    columns = {"step": [0, 0, 4, 4], "prompt_ids": [[1], [2]] * 2, "response_ids": [[3], [4], [5], [6]]}
    file.write_text(json.dumps(columns | {"kl": [0.0, 0.0, 1.0, 3.0], "score": [0.0] * 4}))
    first, second = evaluate.read_looks(file)
    assert first == {"step": 0, "prompt_ids": [[1], [2]], "response_ids": [[3], [4]], "kl": [0.0, 0.0]}
    curve = evaluate.over_optimisation([second | {"reward": [1.0, 2.0], "gold": [0.0, -1.0]}], params())
    assert (curve[0]["step"], curve[0]["kl"], curve[0]["reward"], curve[0]["gold"]) == (4, 2.0, 1.5, -0.5)
    assert (curve[0]["gold_low"], curve[0]["gold_high"]) == (-1.0, 0.0)
    file.write_text("{}")
    assert evaluate.read_looks(file) == []
    with pytest.raises(InputError, match="run the stage train_ppo again"):
        evaluate.read_looks(tmp_path / "none.json")
