"""DVC stage `evaluate`: every model on the same held-out rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chatloom.config import EvaluateParams
from chatloom.data.comparisons import read_comparisons
from chatloom.data.examples import Example
from chatloom.data.prepared import PreparedRow, read_split
from chatloom.device import Device, resolve_device
from chatloom.errors import InputError
from chatloom.evaluation.figures import TITLES, draw_run
from chatloom.evaluation.intervals import bootstrap_mean, wilson
from chatloom.evaluation.perplexity import losses_by_group, mean_loss, perplexity
from chatloom.evaluation.report import render_report
from chatloom.evaluation.responses import Answers, answer, kl_per_sequence, win_rate
from chatloom.files import atomic_file
from chatloom.models.adapters import Role
from chatloom.models.checkpoint import load_on
from chatloom.models.reward_model import load_reward_model
from chatloom.progress import progress
from chatloom.reward import pair_margins
from stages.run import stage

MODELS = {
    "base": Path("models/base"),
    "sft": Path("models/sft"),
    "ppo": Path("models/ppo"),
    "4bit": Path("models/chat-4bit"),
}
REWARD, EVAL, COMPARISONS = Path("models/reward"), Path("data/prepared/eval"), Path("data/comparisons")
REPORT = Path("reports/report.html")


def main() -> None:
    with stage("evaluate") as run:
        params, runtime = run.params.evaluate, run.params.runtime
        device = resolve_device(runtime.device, runtime.dtype, runtime.num_threads)
        run.dataset(EVAL, "eval")
        rows = read_split(EVAL)
        if not any(row.responses for row in rows):
            raise InputError(f"{EVAL} has no row with an answer; give prepare_data.split_weights.eval a larger share")
        reward_model, _ = load_reward_model(REWARD, device, sft=MODELS["sft"])
        metrics = reward_accuracy(reward_model, device, params)
        prompts = spread(rows, params.num_prompts)
        answers = {}
        with progress("evaluate", len(MODELS)) as advance:
            for name, path in MODELS.items():
                chat = load_on(path, device)
                metrics |= perplexities(name, Role(chat.model), rows, device, params)
                answers[name] = answer(chat, prompts, reward_model, params)
                metrics[f"{name}/score"] = sum(answers[name].scores) / len(prompts)
                if name == "ppo":
                    metrics |= against_sft(Role(chat.model), answers, prompts, device, params)
                advance()
        metrics["perplexity/quantized_ratio"] = metrics["4bit/perplexity"] / metrics["ppo/perplexity"]
        samples = side_by_side(prompts[: params.num_samples_shown], answers)
        figures = draw_run(Path("plots"))
        for name, figure in figures.items():
            run.figure(name, figure)
        titled = {TITLES[name]: figure for name, figure in figures.items()}
        html = render_report(metrics=metrics, models=list(MODELS), samples=samples, figures=titled)
        with atomic_file(REPORT) as temporary:
            temporary.write_text(html, encoding="utf-8")
        run.artifact(REPORT)
        run.table("answers", table_of(prompts, answers))
        run.metrics(metrics)


def spread(rows: Sequence[PreparedRow], count: int) -> list[PreparedRow]:
    """The first `count` rows, languages taking turns."""
    by_lang: dict[str, list[PreparedRow]] = {}
    for row in rows:
        by_lang.setdefault(row.lang, []).append(row)
    turns = [rows[i] for i in range(max(map(len, by_lang.values()))) for rows in by_lang.values() if i < len(rows)]
    return turns[:count]


def reward_accuracy(reward_model: Role, device: Device, params: EvaluateParams) -> dict[str, float]:
    """Accuracy on comparisons kept out of training; the interval counts prompts, whose pairs are not independent."""
    held_out = [comparison for comparison in read_comparisons(COMPARISONS) if comparison.holdout]
    if not held_out:
        raise InputError("no comparison is held out; raise compare.holdout or add preference data")
    margins = pair_margins(reward_model, held_out, device.device)
    shares = [sum((m > 0) + 0.5 * (m == 0) for m in row) / len(row) for row in margins]
    if all(len(row) == 1 for row in margins):
        interval = wilson(sum(shares), len(shares))
    else:
        interval = bootstrap_mean(shares, params.bootstrap_samples, params.seed)
    found = {
        "reward/accuracy": interval.mean,
        "reward/accuracy_low": interval.low,
        "reward/accuracy_high": interval.high,
        "reward/prompts": len(held_out),
        "reward/pairs": sum(map(len, margins)),
    }
    for lang in sorted({comparison.lang for comparison in held_out}):
        own = [share for share, comparison in zip(shares, held_out, strict=True) if comparison.lang == lang]
        found[f"reward/accuracy_{lang}"] = sum(own) / len(own)
    return found


def perplexities(
    name: str, role: Role, rows: Sequence[PreparedRow], device: Device, params: EvaluateParams
) -> dict[str, float]:
    """Perplexity by language and over all, on the same rows for every model."""
    groups: dict[str, list[Example]] = {}
    for row in rows:
        if row.responses and len(groups.setdefault(row.lang, [])) < params.max_rows:
            groups[row.lang].append(Example.of_row(row))
    found = {
        f"{name}/perplexity_{lang}": perplexity(loss)
        for lang, loss in losses_by_group(role, groups, device.device).items()
    }
    every = [example for examples in groups.values() for example in examples]
    return found | {f"{name}/perplexity": perplexity(mean_loss(role, every, device.device))}


def against_sft(
    policy: Role, answers: dict[str, Answers], prompts: Sequence[PreparedRow], device: Device, params: EvaluateParams
) -> dict[str, float]:
    """What PPO changed: reward, KL to SFT, win rate over SFT."""
    ref_policy = Role(load_on(MODELS["sft"], device).model)
    kl = bootstrap_mean(
        kl_per_sequence(policy, ref_policy, prompts, answers["ppo"].ids, params.temperature),
        params.bootstrap_samples,
        params.seed,
    )
    gains = [a - b for a, b in zip(answers["ppo"].scores, answers["sft"].scores, strict=True)]
    gain = bootstrap_mean(gains, params.bootstrap_samples, params.seed)
    wins = win_rate(answers["ppo"].scores, answers["sft"].scores, params)
    return {
        "ppo/kl": kl.mean,
        "ppo/kl_low": kl.low,
        "ppo/kl_high": kl.high,
        "ppo/score_gain": gain.mean,
        "ppo/score_gain_low": gain.low,
        "ppo/score_gain_high": gain.high,
        "win_rate/mean": wins.mean,
        "win_rate/low": wins.low,
        "win_rate/high": wins.high,
        "win_rate/prompts": len(prompts),
    }


def side_by_side(prompts: Sequence[PreparedRow], answers: dict[str, Answers]) -> list[dict[str, Any]]:
    return [
        {
            "lang": row.lang,
            "prompt": row.question,
            "answers": {name: {"text": a.texts[i], "score": a.scores[i]} for name, a in answers.items()},
        }
        for i, row in enumerate(prompts)
    ]


def table_of(prompts: Sequence[PreparedRow], answers: dict[str, Answers]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {"lang": [row.lang for row in prompts], "prompt": [row.question for row in prompts]}
    for name, found in answers.items():
        columns |= {name: found.texts, f"{name} score": found.scores}
    return columns


if __name__ == "__main__":
    main()
