"""Intervals, win rates, calibration, habits, KL, the comparison with a champion, pictures and the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from chatloom.config import EvaluateParams
from chatloom.data.comparisons import Comparison
from chatloom.data.prepared import PreparedRow
from chatloom.data.templates import encode_row
from chatloom.errors import InputError
from chatloom.evaluation.calibration import Pair, accuracies, calibration_error, gap_of, pairs_of, reliability
from chatloom.evaluation.champion import against_champion
from chatloom.evaluation.divergence import kl_per_sequence
from chatloom.evaluation.figures import (
    draw_frontier,
    draw_histograms,
    draw_loop,
    draw_over_optimisation,
    draw_reliability,
    draw_run,
    smooth,
)
from chatloom.evaluation.habits import is_refusal, repetition
from chatloom.evaluation.intervals import bootstrap_mean, wilson
from chatloom.evaluation.report import render_report
from chatloom.evaluation.sheets import answer, loss, measured_rows, read_probes, spread
from chatloom.evaluation.wins import length_controlled, wins
from chatloom.models.adapters import Role, add_adapter
from chatloom.models.checkpoint import ChatModel, load_on
from chatloom.models.head import ScalarHead
from chatloom.models.reward_model import score_responses
from tests.conftest import CPU

PARAMS = EvaluateParams(
    max_rows=4,
    num_prompts=4,
    max_new_tokens=4,
    temperature=1.0,
    generation_batch=4,
    bootstrap_samples=4000,
    calibration_bins=5,
    judge=None,
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


def test_a_tie_is_half_a_win() -> None:
    assert wins([2.0, 1.0, 0.0, 5.0], [1.0, 1.0, 3.0, 4.0]) == [1.0, 0.5, 0.0, 1.0]


def test_length_controlled_win_rate() -> None:
    # Lengths that say nothing of who wins change nothing: 3 of 4 at each length.
    won, ours = [1, 1, 1, 0] * 20, [10] * 40 + [30] * 40
    assert length_controlled(won, ours, [20] * 80) == pytest.approx(0.75, abs=0.002)
    # Longer answers win always, shorter ones never: of equal length, who knows.
    won, ours = [1] * 40 + [0] * 40, [30] * 40 + [10] * 40
    assert length_controlled(won, ours, [20] * 80) == pytest.approx(0.5, abs=1e-6)
    # Ours win 9 of 10 when much longer and 6 of 10 when as long: the same lengths would leave 0.6 (by hand, two groups
    # whose odds a logistic curve meets exactly).
    won, ours = [1] * 90 + [0] * 10 + [1] * 60 + [0] * 40, [60] * 100 + [20] * 100
    assert length_controlled(won, ours, [20] * 200) == pytest.approx(0.6, abs=0.01)
    assert length_controlled([1, 1, 1], [5, 5, 5], [5, 5, 5]) > 0.99, "finite where one side always wins"
    assert length_controlled([0, 0.5, 1], [5, 9, 2], [5, 9, 2]) == pytest.approx(0.5)


# --- calibration ---


def comparison(ranks: list[int], lang: str = "en") -> Comparison:
    texts = [str(number) for number in range(len(ranks))]
    return Comparison("c", lang, [], [5], texts, [[6]] * len(ranks), ranks, ["x"] * len(ranks), True)


def test_pairs_know_their_gap_and_share_their_prompts_weight() -> None:
    found = pairs_of([comparison([0, 1, 3]), comparison([0, 1], "zh")], [[2.0, 4.0, -2.0], [0.0]], gain=2.0)
    # The gain that normalised the scores is taken out: 2.0 is one nat of odds.
    assert found == [
        Pair("en", 1, 1.0, 1 / 3),
        Pair("en", 3, 2.0, 1 / 3),
        Pair("en", 2, -1.0, 1 / 3),
        Pair("zh", 1, 0.0, 1),
    ]
    assert accuracies(found, lambda pair: pair.lang) == {"en": pytest.approx(2 / 3), "zh": 0.5}
    # gap 1: a right third and half of a whole, of 4/3: (1/3 + 1/2) / (4/3) = 5/8
    assert accuracies(found, gap_of) == {"gap_1": pytest.approx(5 / 8), "gap_2": 0.0, "gap_3_or_more": 1.0}


def test_reliability_and_calibration_error() -> None:
    # log(3): the preferred one is given 3/4; log(19): 19/20.
    pairs = [Pair("en", 1, sign * 1.0986122886681098, 1.0) for sign in (1, 1, -1, -1)]
    pairs += [Pair("en", 1, 2.9444389791664403, 1.0) for _ in range(4)]
    low, high = reliability(pairs, 5)
    assert (low.low, low.high) == (pytest.approx(0.7), pytest.approx(0.8))
    assert (low.weight, low.confidence, low.accuracy) == (0.5, pytest.approx(0.75), 0.5)
    assert (high.weight, high.confidence, high.accuracy) == (0.5, pytest.approx(0.95), 1.0)
    assert calibration_error([low, high]) == pytest.approx(0.5 * 0.25 + 0.5 * 0.05)
    sure = reliability([Pair("en", 1, 800.0, 1.0)], 5)
    assert [(part.confidence, part.high) for part in sure] == [(1.0, pytest.approx(1.0))], "no overflow, the last bin"


# --- habits ---


def test_repetition_is_the_share_of_runs_said_before() -> None:
    assert repetition([1, 2, 3]) == 0.0
    assert repetition([1, 2, 3, 4, 5]) == 0.0
    # 1212 2121 1212 2121 1212: two of five are new
    assert repetition([1, 2, 1, 2, 1, 2, 1, 2]) == pytest.approx(3 / 5)


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("As an AI language model, I have no opinion.", True),
        ("I cannot provide that information", True),
        ("对不起，我无法回答这个问题。", True),
        ("作为一个人工智能，我没有感情。", True),
        ("The capital of France is Paris.", False),
        ("Paris. " * 60 + "I cannot help", False),
        ("You can't divide by zero; I can show you why.", False),
        ("法国的首都是巴黎。", False),
        ("", False),
    ],
)
def test_refusals(text: str, refuses: bool) -> None:
    assert is_refusal(text) is refuses


# --- the champion ---


def rows_of(chat: ChatModel) -> list[PreparedRow]:
    texts = [("en", "hello", "world"), ("en", "how are you", "fine"), ("zh", "你好", "世界"), ("zh", "天空", "蓝色")]
    rows = []
    for number, (lang, question, reply) in enumerate(texts):
        bare = PreparedRow(f"r{number}", lang, [{"role": "user", "content": question}], [], [], [reply], [])
        encoded = encode_row(chat.tokenizer, chat.stop_ids[0], bare)
        rows.append(PreparedRow(bare.id, lang, bare.messages, *encoded[:2], bare.responses, encoded.response_ids))
    return rows


def test_a_model_against_itself_ties_and_against_a_worse_one_wins(
    checkpoint: Path, chat: ChatModel, tmp_path: Path
) -> None:
    rows = rows_of(chat)
    gold = Role(load_on(checkpoint, CPU).model, head=ScalarHead(32, torch.Generator().manual_seed(0)))
    prompts = spread(rows, PARAMS.num_prompts)
    assert [row.id for row in prompts] == ["r0", "r2", "r1", "r3"], "languages take turns"
    measured = [row for own in measured_rows(rows, 4).values() for row in own]
    same = load_on(checkpoint, CPU)
    answers = answer(same, [row.prompt_ids for row in prompts], PARAMS)
    scores = score_responses(gold, [row.prompt_ids for row in prompts], answers.ids)
    own = loss(same, measured, CPU.device)
    candidate = {"prompts": [row.id for row in prompts], "gold": scores, "nats": own.nats, "tokens": own.tokens}
    found = against_champion(candidate, checkpoint, gold, checkpoint, rows, PARAMS, CPU)
    assert found["champion/win_rate"] == found["champion/win_rate_low"] == 0.5
    assert found["champion/perplexity_ratio"] == pytest.approx(1.0, abs=1e-5)
    # One nat less on every token, and better in the gold model's eyes on every prompt.
    better = candidate | {"gold": [score + 1 for score in scores], "nats": own.nats - own.tokens}
    found = against_champion(better, checkpoint, gold, checkpoint, rows, PARAMS, CPU)
    assert found["champion/win_rate_high"] == found["champion/win_rate"] == 1.0
    assert found["champion/perplexity_ratio"] == pytest.approx(0.36788, abs=1e-4)
    with pytest.raises(InputError, match="made from other rows than data/prepared/eval has now"):
        against_champion(candidate, checkpoint, gold, checkpoint, rows[:3], PARAMS, CPU)


def test_probes(tmp_path: Path) -> None:
    file = tmp_path / "probes.jsonl"
    file.write_text('{"lang": "en", "prompt": "a"}\n{"lang": "zh"}\n')
    with pytest.raises(InputError, match=r"probes\.jsonl:2: not a JSON object with lang and prompt"):
        read_probes(file)
    with pytest.raises(InputError, match="no such file"):
        read_probes(tmp_path / "none.jsonl")
    own = read_probes(Path(__file__).parents[1] / "data/probes/probes.jsonl")
    assert {probe["lang"] for probe in own} == {"en", "zh"}


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


def test_the_report_shows_answers_as_text_and_holds_its_pictures(tmp_path: Path) -> None:
    Figure((1, 1)).savefig(tmp_path / "frontier.png")
    answers = {
        "sft": {"text": "<script>alert(1)</script>", "gold": 0.25, "reward": 0.5},
        "ppo": {"text": "", "gold": 1.5, "reward": 2.0},
    }
    cost = {"stage": "train_sft", "wall_s": 61.0, "cpu_hours": 0.02, "gpu_hours": 0.0, "peak_gib": 1.5}
    html = render_report(
        title="chatloom: preset default",
        metrics={"ppo/kl": 3.21, "ppo/kl_low": 2.0, "ppo/kl_high": 4.0},
        evaluation={
            "models": ["sft", "ppo"],
            "figures": ["frontier"],
            "samples": [{"lang": "zh", "prompt": "你好？", "answers": answers}],
            "probes": [{"lang": "en", "prompt": "Why?", "answers": {"sft": "So.", "ppo": "Thus."}}],
        },
        pictures=tmp_path,
        verdicts=[{"metric": "ppo/kl", "value": 3.21, "bound": "<= 2", "verdict": "fail", "blocks": True, "note": ""}],
        costs=[cost | {"tokens": 12345.0, "kwh": 0.0002, "price": 0.0008}],
        currency="EUR",
        sources=[{"name": "own", "rows_in": 3, "rows_out": 2, "splits": {"sft": 2}, "license": "CC-BY-4.0"}],
        graph="<svg></svg>",
    )
    assert "你好？" in html
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert html.count('<img alt="Reward against KL') == html.count('src="data:image/png;base64,') == 1
    assert "3.21</b>" in html
    assert "(2 to 4)" in html
    for words in ("Thus.", '<td class="fail">fail</td>', "12,345", "EUR", "CC-BY-4.0", "<svg></svg>"):
        assert words in html
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


def test_over_optimisation_shows_both_judges_against_kl() -> None:
    point = {"step": 0, "kl": 0.0, "reward": 0.1, "reward_low": 0.0, "reward_high": 0.3, "gold": 0.2}
    later = {"step": 4, "kl": 2.0, "reward": 1.0, "reward_low": 0.5, "reward_high": 1.5, "gold": -0.5}
    bounds = {"gold_low": -1.0, "gold_high": 1.0}
    (axes,) = draw_over_optimisation([point | bounds, later | bounds]).axes
    reward, gold = axes.lines
    assert reward.get_xydata().tolist() == [[0, 0.1], [2, 1.0]]
    assert gold.get_xydata().tolist() == [[0, 0.2], [2, -0.5]]
    assert [text.get_text() for text in axes.texts] == ["0", "4"]
    (axes,) = draw_over_optimisation([]).axes
    assert "reward_hacking is off" in axes.texts[0].get_text()


def test_reliability_and_histograms() -> None:
    bins = reliability([Pair("en", 1, 1.0986122886681098, 1.0)], 5)
    (axes,) = draw_reliability({"reward": bins, "gold": bins}).axes
    assert [line.get_xydata().tolist() for line in axes.lines[1:]] == [[[pytest.approx(0.75), 1.0]]] * 2
    scores, lengths = draw_histograms({"sft": [0.0, 1.0], "ppo": [1.0, 1.0]}, {"sft": [3, 4], "ppo": [3, 3]}).axes
    assert [text.get_text() for text in scores.get_legend().get_texts()] == ["sft", "ppo"]
    assert lengths.get_xlabel() == "tokens of an answer"
    assert [sum(bar.get_height() for bar in bars) for bars in lengths.containers] == [2, 2]
    (alone, _) = draw_histograms({"sft": [1.0]}, {"sft": [3]}).axes
    assert alone.get_xlim()[0] < 0.5 < 1.5 < alone.get_xlim()[1], "one value has a bin around it"


def test_only_long_curves_are_smoothed() -> None:
    assert smooth([1.0, 5.0, 3.0]) == [1.0, 5.0, 3.0]
    spike = [0.0] * 60
    spike[30] = 7.0
    assert smooth(spike) == [0.0] * 27 + [1.0] * 7 + [0.0] * 26, "a mean of 3 on each side and itself"
    assert smooth([4.0, *[0.0] * 59])[:4] == [1.0, 0.8, pytest.approx(4 / 6), pytest.approx(4 / 7)]
