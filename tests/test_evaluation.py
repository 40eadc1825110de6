"""Intervals, win rates, KL and the report."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from chatloom.config import EvaluateParams
from chatloom.data.prepared import PreparedRow
from chatloom.evaluation.intervals import bootstrap_mean, wilson
from chatloom.evaluation.report import read_curve, render_report
from chatloom.evaluation.responses import kl_per_sequence, win_rate
from chatloom.models.adapters import Role, add_adapter
from chatloom.models.checkpoint import ChatModel

PARAMS = EvaluateParams(
    max_rows=4,
    num_prompts=4,
    max_new_tokens=4,
    temperature=1.0,
    generation_batch=4,
    bootstrap_samples=4000,
    num_samples_shown=2,
    seed=0,
)


def test_wilson_against_published_values() -> None:
    # Newcombe 1998, table I: 81 of 263, and 0 of 20.
    interval = wilson(81, 263)
    assert (interval.low, interval.high) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    empty = wilson(0, 20)
    assert (empty.low, empty.high) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_bootstrap_is_near_the_normal_interval_and_repeats_itself() -> None:
    values = [0.0, 1.0] * 200
    interval = bootstrap_mean(values, 4000, seed=1)
    assert interval.mean == 0.5
    # 1.96 * sqrt(0.25 / 400) = 0.049
    assert (interval.low, interval.high) == pytest.approx((0.451, 0.549), abs=0.004)
    assert interval == bootstrap_mean(values, 4000, seed=1)


def test_win_rate_counts_ties_half() -> None:
    assert win_rate([2.0, 1.0, 0.0, 5.0], [1.0, 1.0, 3.0, 4.0], PARAMS).mean == pytest.approx((1 + 0.5 + 0 + 1) / 4)


def test_kl_is_zero_against_itself_and_equals_the_sum_of_log_ratios(chat: ChatModel, lora: object) -> None:
    rows = [PreparedRow(str(i), "en", [], [5 + i, 6], [False, False], [], []) for i in range(3)]
    responses = [[7, 8], [9], [10, 11, 2]]
    reference = Role(chat.model)
    assert kl_per_sequence(reference, reference, rows, responses, 1.0) == [0.0, 0.0, 0.0]
    add_adapter(chat.model, "policy", lora, seed=0)  # type: ignore[arg-type]
    policy = Role(chat.model, "policy")
    for parameter in policy.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    from chatloom.data.examples import Example
    from chatloom.packing import pack

    expected = []
    for row, response in zip(rows, responses, strict=True):
        packed = pack([Example.of_response(row.prompt_ids, response)])
        expected.append(float((policy.logprobs(packed) - reference.logprobs(packed)).detach().sum()))
    assert kl_per_sequence(policy, reference, rows, responses, 1.0) == pytest.approx(expected, abs=1e-5)


def test_the_report_shows_answers_as_text_and_leaves_out_pictures_without_a_curve(tmp_path: Path) -> None:
    (tmp_path / "train_sft").mkdir()
    (tmp_path / "train_sft/train.csv").write_text("step,loss\n1,2.5\n2,\n3,1.5\n")
    assert read_curve(tmp_path / "train_sft/train.csv", "loss") == [(1, 2.5), (3, 1.5)]
    assert read_curve(tmp_path / "nowhere.csv", "loss") == []
    answers = {"sft": {"text": "<script>alert(1)</script>", "score": 0.25}, "ppo": {"text": "", "score": 1.5}}
    html = render_report(
        metrics={"ppo/kl": 3.21, "win_rate/mean": 0.5, "win_rate/low": 0.25, "win_rate/high": 0.75},
        models=["sft", "ppo"],
        samples=[{"lang": "zh", "prompt": "你好？", "answers": answers}],
        plots=tmp_path,
    )
    assert "你好？" in html
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert html.count("<figure>") == 1
    assert "3.21" in html
    assert "http" not in html, "self-contained: no address of another host"
