"""DVC stage `evaluate`: every model on the same held-out rows, judged by models that did not train it."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chatloom.config import EvaluateParams
from chatloom.data.comparisons import Comparison, read_comparisons
from chatloom.data.judge import Judge, OverBudget
from chatloom.data.prepared import PreparedRow, read_split
from chatloom.device import Device, resolve_device
from chatloom.errors import InputError
from chatloom.evaluation import calibration
from chatloom.evaluation.divergence import kl_per_sequence
from chatloom.evaluation.figures import draw_histograms, draw_over_optimisation, draw_reliability, draw_run
from chatloom.evaluation.habits import is_refusal, repetition
from chatloom.evaluation.intervals import bootstrap_mean, wilson
from chatloom.evaluation.perplexity import perplexity
from chatloom.evaluation.sheets import (
    Answers,
    answer,
    loss,
    measured_rows,
    probe_prompts,
    read_probes,
    spread,
)
from chatloom.evaluation.wins import length_controlled, wins
from chatloom.models.adapters import Role
from chatloom.models.checkpoint import ChatModel, load_on
from chatloom.models.reward_model import load_reward_model, score_responses
from chatloom.progress import progress
from chatloom.reward import pair_margins
from stages.run import StageRun, stage

log = logging.getLogger(__name__)

MODELS = {
    "base": Path("models/base"),
    "sft": Path("models/sft"),
    "ppo": Path("models/ppo"),
    "4bit": Path("models/chat-4bit"),
}
REWARD_MODELS = {"reward": Path("models/reward"), "gold": Path("models/gold")}
"""The one that PPO was trained with, and one from other pairs, which judges."""
DUELS = {"ppo_over_sft": ("ppo", "sft"), "4bit_over_ppo": ("4bit", "ppo")}
EVAL, COMPARISONS, PROBES = Path("data/prepared/eval"), Path("data/comparisons"), Path("data/probes/probes.jsonl")
LOOKS = Path("reports/train_ppo_held_out.json")
# Outside the outs: what a judge was paid for is kept when the stage runs again.
JUDGE_CACHE = Path(".state/judge")


def main() -> None:
    with stage("evaluate") as run:
        params, runtime = run.params.evaluate, run.params.runtime
        device = resolve_device(runtime.device, runtime.dtype, runtime.num_threads)
        run.dataset(EVAL, "eval")
        rows = read_split(EVAL)
        measured = measured_rows(rows, params.max_rows)
        if not measured:
            raise InputError(f"{EVAL} has no row with an answer; give prepare_data.split_weights.eval a larger share")
        held_out = [comparison for comparison in read_comparisons(COMPARISONS) if comparison.holdout]
        if not held_out:
            raise InputError("no comparison is held out; raise compare.holdout or add preference data")
        prompts, probes, looks = spread(rows, params.num_prompts), read_probes(PROBES), read_looks(LOOKS)
        prompt_ids = [row.prompt_ids for row in prompts]
        metrics: dict[str, float] = {}
        answers: dict[str, Answers] = {}
        probed: dict[str, list[str]] = {}
        candidate: dict[str, float] = {}
        with progress("evaluate", len(MODELS) + len(REWARD_MODELS)) as advance:
            for name, path in MODELS.items():
                chat = load_on(path, device)
                losses = {lang: loss(chat, own, device.device) for lang, own in measured.items()}
                nats, tokens = sum(one.nats for one in losses.values()), sum(one.tokens for one in losses.values())
                metrics |= {f"{name}/perplexity_{lang}": perplexity(one.mean) for lang, one in losses.items()}
                metrics[f"{name}/perplexity"] = perplexity(nats / tokens)
                answers[name] = answer(chat, prompt_ids, params)
                metrics |= {f"{name}/{habit}": value for habit, value in habits(answers[name]).items()}
                probed[name] = answer(chat, probe_prompts(chat, probes), params, temperature=0).texts
                if name == "ppo":
                    metrics |= divergence(chat, answers[name], prompts, device, params)
                if name == "4bit":
                    candidate = {"nats": nats, "tokens": tokens}
                advance()
            metrics["perplexity/quantized_ratio"] = metrics["4bit/perplexity"] / metrics["ppo/perplexity"]
            scores: dict[str, dict[str, list[float]]] = {}
            bins: dict[str, list[calibration.Bin]] = {}
            for judge, path in REWARD_MODELS.items():
                reward_model, _ = load_reward_model(path, device, sft=MODELS["sft"])
                found, bins[judge] = reward_metrics(reward_model, held_out, device, params)
                metrics |= {f"{judge}/{measure}": value for measure, value in found.items()}
                scores[judge] = {
                    name: score_responses(reward_model, prompt_ids, own.ids) for name, own in answers.items()
                }
                for look in looks:
                    look[judge] = score_responses(reward_model, look["prompt_ids"], look["response_ids"])
                del reward_model
                gc.collect()  # one backbone at a time
                advance()
        metrics |= against(answers, scores, params)
        metrics |= judged(answers, prompts, params)
        report(run, metrics, answers, scores, bins, looks, prompts, probes, probed, candidate)
        run.metrics(metrics)


def read_looks(path: Path) -> list[dict[str, Any]]:
    """What PPO answered to held-out prompts at some steps: `step` and lists `prompt_ids`, `response_ids` and `kl`."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; run the stage train_ppo again")
    columns = json.loads(path.read_text(encoding="utf-8"))
    looks: dict[int, dict[str, Any]] = {}
    for place, step in enumerate(columns.get("step", [])):
        look = looks.setdefault(step, {"step": step, "prompt_ids": [], "response_ids": [], "kl": []})
        for name in ("prompt_ids", "response_ids", "kl"):
            look[name].append(columns[name][place])
    return list(looks.values())


def habits(answers: Answers) -> dict[str, float]:
    """Mean length in tokens, mean share of repeated runs, and share of refusals."""
    count = len(answers.texts)
    return {
        "response_tokens": sum(answers.lengths) / count,
        "repetition": sum(map(repetition, answers.ids)) / count,
        "refusals": sum(map(is_refusal, answers.texts)) / count,
    }


def divergence(
    chat: ChatModel, answers: Answers, prompts: Sequence[PreparedRow], device: Device, params: EvaluateParams
) -> dict[str, float]:
    """KL of PPO from SFT, by the answers sampled from PPO."""
    ref_policy = Role(load_on(MODELS["sft"], device).model)
    values = kl_per_sequence(Role(chat.model), ref_policy, prompts, answers.ids, params.temperature)
    return interval("ppo/kl", values, params)


def reward_metrics(
    reward_model: Role, held_out: Sequence[Comparison], device: Device, params: EvaluateParams
) -> tuple[dict[str, float], list[calibration.Bin]]:
    """Accuracy and calibration on comparisons kept out of training.

    The interval counts prompts, whose pairs are not independent.
    """
    margins = pair_margins(reward_model, held_out, device.device)
    shares = [sum((m > 0) + 0.5 * (m == 0) for m in row) / len(row) for row in margins]
    if all(len(row) == 1 for row in margins):
        whole = wilson(sum(shares), len(shares))
    else:
        whole = bootstrap_mean(shares, params.bootstrap_samples, params.seed)
    assert reward_model.head is not None
    pairs = calibration.pairs_of(held_out, margins, float(reward_model.head.gain))
    bins = calibration.reliability(pairs, params.calibration_bins)
    by_lang = calibration.accuracies(pairs, lambda pair: pair.lang)
    by_gap = calibration.accuracies(pairs, calibration.gap_of)
    return {
        "accuracy": whole.mean,
        "accuracy_low": whole.low,
        "accuracy_high": whole.high,
        "prompts": len(held_out),
        "pairs": len(pairs),
        "ece": calibration.calibration_error(bins),
        **{f"accuracy_{key}": value for key, value in (by_lang | by_gap).items()},
    }, bins


def against(
    answers: Mapping[str, Answers], scores: Mapping[str, Mapping[str, list[float]]], params: EvaluateParams
) -> dict[str, float]:
    """Mean scores, what PPO gained, and win rates, by both reward models."""
    metrics: dict[str, float] = {}
    for judge, by_model in scores.items():
        metrics |= {f"{name}/{judge}_score": sum(values) / len(values) for name, values in by_model.items()}
        gains = [a - b for a, b in zip(by_model["ppo"], by_model["sft"], strict=True)]
        metrics |= interval(f"ppo/{judge}_gain", gains, params)
        for duel, (ours, theirs) in DUELS.items():
            won = wins(by_model[ours], by_model[theirs])
            metrics |= interval(f"win_rate/{duel}/{judge}", won, params)
            metrics[f"win_rate/{duel}/{judge}_length_controlled"] = length_controlled(
                won, answers[ours].lengths, answers[theirs].lengths
            )
    return metrics


def judged(answers: Mapping[str, Answers], prompts: Sequence[PreparedRow], params: EvaluateParams) -> dict[str, float]:
    """Win rates by the judge of `evaluate.judge`, asked in both orders; of as many prompts as its budget lasts for."""
    if params.judge is None:
        return {}
    judge = Judge(params.judge, JUDGE_CACHE, key="evaluate.judge")
    metrics: dict[str, float] = {}
    for duel, (ours, theirs) in DUELS.items():
        won = list(_verdicts(judge, prompts, answers[ours].texts, answers[theirs].texts))
        if len(won) < len(prompts):
            log.warning("evaluate: the judge's budget lasted for %d of %d prompts of %s", len(won), len(prompts), duel)
        if won:
            metrics |= interval(f"win_rate/{duel}/judge", won, params) | {f"win_rate/{duel}/judge_prompts": len(won)}
    counts = {"judge/requests": judge.asked, "judge/cached": judge.cached, "judge/unclear": judge.unclear}
    return metrics | counts


def _verdicts(
    judge: Judge, prompts: Sequence[PreparedRow], ours: Sequence[str], theirs: Sequence[str]
) -> Iterator[float]:
    for row, one, other in zip(prompts, ours, theirs, strict=True):
        if one == other:
            yield 0.5
            continue
        try:
            first, second = judge.rank(row.messages, [one, other])
        except OverBudget:
            return
        yield 0.5 if first == second else float(first < second)


def interval(name: str, values: Sequence[float], params: EvaluateParams) -> dict[str, float]:
    """`name` is the mean of the values, `name_low` and `name_high` are its bounds."""
    found = bootstrap_mean(values, params.bootstrap_samples, params.seed)
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}


def report(
    run: StageRun,
    metrics: Mapping[str, float],
    answers: Mapping[str, Answers],
    scores: Mapping[str, Mapping[str, list[float]]],
    bins: Mapping[str, list[calibration.Bin]],
    looks: Sequence[Mapping[str, Any]],
    prompts: Sequence[PreparedRow],
    probes: Sequence[Mapping[str, str]],
    probed: Mapping[str, Sequence[str]],
    candidate: Mapping[str, float],
) -> None:
    """Pictures, tables, and `reports/evaluate.json`, of which `register` makes the page."""
    params = run.params.evaluate
    curve = over_optimisation(looks, params)
    if not curve:
        with run.out("plots/evaluate"):
            pass  # an out that DVC will look for
    for point in curve:
        run.log(
            int(point["step"]), {f"over_optimisation/{name}": value for name, value in point.items() if name != "step"}
        )
    figures = draw_run(Path("plots"))
    figures |= {
        "over_optimisation": draw_over_optimisation(curve),
        "reliability": draw_reliability(bins),
        "histograms": draw_histograms(scores["gold"], {name: own.lengths for name, own in answers.items()}),
    }
    for name, figure in figures.items():
        run.figure(name, figure)
    run.table("answers", table_of(prompts, answers, scores))
    run.table(
        "probes",
        {
            "lang": [probe["lang"] for probe in probes],
            "prompt": [probe["prompt"] for probe in probes],
            **{name: list(texts) for name, texts in probed.items()},
        },
    )
    run.report(
        "evaluate",
        {
            "models": list(answers),
            "figures": list(figures),
            "samples": side_by_side(prompts[: params.num_samples_shown], answers, scores),
            "probes": [
                {**probe, "answers": {name: texts[i] for name, texts in probed.items()}}
                for i, probe in enumerate(probes)
            ],
            "reliability": {judge: [asdict(part) for part in parts] for judge, parts in bins.items()},
            # What the present champion is compared with, on the same prompts and rows.
            "candidate": {
                **candidate,
                "prompts": [row.id for row in prompts],
                "gold": scores["gold"]["4bit"],
                "metrics": dict(metrics),
            },
        },
    )


def over_optimisation(looks: Sequence[Mapping[str, Any]], params: EvaluateParams) -> list[dict[str, float]]:
    """Of each look, mean KL to SFT and what both reward models score: where only one still rises, it is exploited."""
    return [
        {
            "step": look["step"],
            "kl": sum(look["kl"]) / len(look["kl"]),
            **interval("reward", look["reward"], params),
            **interval("gold", look["gold"], params),
        }
        for look in looks
    ]


def side_by_side(
    prompts: Sequence[PreparedRow], answers: Mapping[str, Answers], scores: Mapping[str, Mapping[str, list[float]]]
) -> list[dict[str, Any]]:
    return [
        {
            "lang": row.lang,
            "prompt": row.question,
            "answers": {
                name: {"text": own.texts[i], **{judge: by_model[name][i] for judge, by_model in scores.items()}}
                for name, own in answers.items()
            },
        }
        for i, row in enumerate(prompts)
    ]


def table_of(
    prompts: Sequence[PreparedRow], answers: Mapping[str, Answers], scores: Mapping[str, Mapping[str, list[float]]]
) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {"lang": [row.lang for row in prompts], "prompt": [row.question for row in prompts]}
    for name, found in answers.items():
        columns |= {name: found.texts, **{f"{name} {judge}": by_model[name] for judge, by_model in scores.items()}}
    return columns


if __name__ == "__main__":
    main()
