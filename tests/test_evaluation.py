"""Intervals, win rates, KL and the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from chatloom.config import EvaluateParams
from chatloom.data.prepared import PreparedRow
from chatloom.evaluation.figures import draw_frontier, draw_loop, draw_run, smooth
from chatloom.evaluation.intervals import bootstrap_mean, wilson
from chatloom.evaluation.report import render_report
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


def test_the_report_shows_answers_as_text_and_holds_its_pictures() -> None:
    answers = {"sft": {"text": "<script>alert(1)</script>", "score": 0.25}, "ppo": {"text": "", "score": 1.5}}
    html = render_report(
        metrics={"ppo/kl": 3.21, "win_rate/mean": 0.5, "win_rate/low": 0.25, "win_rate/high": 0.75},
        models=["sft", "ppo"],
        samples=[{"lang": "zh", "prompt": "你好？", "answers": answers}],
        figures={"Reward against KL": Figure((1, 1))},
    )
    assert "你好？" in html
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert html.count('<figure><figcaption>Reward against KL</figcaption><img alt="Reward against KL" src="data:') == 1
    assert "3.21" in html
    assert "http" not in html, "self-contained: no address of another host"


# --- pictures ---


@pytest.fixture
def plots(tmp_path: Path) -> Path:
    """Curves of a run without held-out rows in PPO; SFT has three languages."""
    files = {
        "train_sft/train.csv": "step,loss,lr\n1,2.5,0.1\n2,,\n3,1.5,0.2\n",
        "train_sft/eval.csv": "step,loss_en,loss_zh,loss_de\n0,3,4,5\n3,2,,4\n",
        "train_ppo/objective.csv": "step,score,kl,kl_k3\n1,0.5,-1,0\n2,1.0,7,2\n3,0.75,8,3\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def lines(axes: Any) -> dict[str, list[list[float]]]:
    """The points of each line by its label."""
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def test_panels_show_the_columns_that_are_there(plots: Path) -> None:
    figure = draw_loop("train_sft", plots)
    assert figure is not None
    loss, held_out = (axes for axes in figure.axes if axes.axison)
    assert list(lines(loss).values()) == [[[1, 2.5], [3, 1.5]]], "an empty cell is no point"
    assert lines(held_out) == {"en": [[0, 3], [3, 2]], "zh": [[0, 4]], "de": [[0, 5], [3, 4]]}
    assert set(draw_run(plots)) == {"train_sft", "train_ppo", "frontier"}
    assert draw_run(plots / "nothing") == {}


def test_the_frontier_joins_scores_over_kl_in_the_order_of_steps(plots: Path) -> None:
    figure = draw_frontier(plots)
    assert figure is not None
    axes, _ = figure.axes
    (dots,) = axes.collections
    assert dots.get_offsets().tolist() == [[0, 0.5], [2, 1.0], [3, 0.75]]
    assert axes.lines[0].get_xydata().tolist() == [[0, 0.5], [2, 1.0], [3, 0.75]]
    (plots / "train_ppo/held_out.csv").write_text("step,score,kl\n0,0.1,0\n3,0.3,1.5\n")
    figure = draw_frontier(plots)
    assert figure is not None
    rollouts, held_out = figure.axes[0].collections
    assert held_out.get_offsets().tolist() == [[0, 0.1], [1.5, 0.3]]
    assert rollouts.get_facecolor()[-1].tolist() == held_out.get_facecolor()[-1].tolist(), "step 3 has one colour"
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["rollouts", "held-out answers"]


def test_only_long_curves_are_smoothed() -> None:
    assert smooth([1.0, 5.0, 3.0]) == [1.0, 5.0, 3.0]
    spike = [0.0] * 60
    spike[30] = 7.0
    assert smooth(spike) == [0.0] * 27 + [1.0] * 7 + [0.0] * 26, "a mean of 3 on each side and itself"
    assert smooth([4.0, *[0.0] * 59])[:4] == [1.0, 0.8, pytest.approx(4 / 6), pytest.approx(4 / 7)]
