"""Pictures of a run: small multiples of each loop's curves, PPO's reward against KL, calibration, spreads."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from chatloom.evaluation.calibration import Bin

INK, SOFT, GRID = "#1f2933", "#52606d", "#e5e7eb"
SERIES = ("#2563eb", "#d97706", "#059669", "#be185d")
COLUMNS, BINS = 3, 8
LONG = 40
"""Points from which on a curve is drawn as a running mean, with the points themselves faint behind it."""

Points = list[tuple[int, float]]
"""(step, value), in order."""


@dataclass(frozen=True)
class Panel:
    """A small picture: columns of one curve file over the step."""

    title: str
    file: str
    labels: dict[str, str]
    """What each column is called; one that the file lacks is left out. A * at the end stands for every ending."""
    unit: str
    level: float | None = None
    """Where a dashed line marks what is worth comparing with."""


REWARD = (
    Panel("Ranking loss", "train.csv", {"loss": ""}, "nats a pair"),
    Panel("Accuracy on held-out pairs", "eval.csv", {"accuracy": ""}, "share ranked right", level=0.5),
    Panel("Gradient norm", "train.csv", {"grad_norm": ""}, "before clipping"),
)
LOOPS: dict[str, tuple[Panel, ...]] = {
    "train_sft": (
        Panel("Training loss", "train.csv", {"loss": ""}, "nats a token"),
        Panel("Held-out loss", "eval.csv", {"loss_*": "*"}, "nats a token"),
        Panel("Gradient norm", "train.csv", {"grad_norm": ""}, "before clipping"),
    ),
    "train_reward": REWARD,
    "train_gold": REWARD,
    "train_ppo": (
        Panel(
            "Score, rollouts",
            "objective.csv",
            {"score": "reward model's", "score_with_penalty": "less missing-stop penalty"},
            "deviations of SFT samples",
        ),
        Panel("KL to the SFT model", "objective.csv", {"kl": "k1, in the reward", "kl_k3": "k3"}, "nats a response"),
        Panel("Response length", "objective.csv", {"response_tokens": ""}, "tokens"),
        Panel("Score, held-out answers", "held_out.csv", {"score": ""}, "deviations of SFT samples"),
        Panel("chrF to references, held-out answers", "held_out.csv", {"chrf": ""}, "0 to 100"),
        Panel("Loss on supervised rows (PTX)", "ptx.csv", {"loss": ""}, "nats a token"),
        Panel("Entropy", "policy.csv", {"entropy": ""}, "nats a token"),
        Panel("Clip fraction", "policy.csv", {"clip_frac": ""}, "share of tokens"),
        Panel("Explained variance of returns", "value.csv", {"explained_variance": ""}, "share, 1: all", level=0.0),
    ),
}
TITLES = {
    "train_sft": "Supervised fine-tuning",
    "train_reward": "Reward model",
    "train_gold": "Gold reward model, trained on other pairs",
    "train_ppo": "PPO",
    "frontier": "Reward against KL: where rollouts gain and held-out answers do not, the reward model is exploited",
    "over_optimisation": "Over-optimisation: both reward models on held-out answers, as PPO goes on",
    "reliability": "Reliability: how often a reward model is right, by how sure it is",
    "histograms": "Gold score and length of the sampled answers",
}
JUDGES = {"reward": "reward model, which PPO is trained with", "gold": "gold reward model, from other pairs"}


def draw_run(plots: Path) -> dict[str, Figure]:
    """The figures of the loops and the frontier by name; one whose curves are not in the folder `plots` is left out."""
    figures = {loop: draw_loop(loop, plots) for loop in LOOPS} | {"frontier": draw_frontier(plots)}
    return {name: figure for name, figure in figures.items() if figure is not None}


def draw_loop(loop: str, plots: Path) -> Figure | None:
    """Every panel of a training loop that has a curve; None where none has."""
    panels = [(panel, lines) for panel in LOOPS[loop] if (lines := _lines(panel, plots / loop / panel.file))]
    if not panels:
        return None
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(12, 0.4 + 2.6 * rows), layout="constrained")
    grid = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for axes, (panel, lines) in zip(grid, panels, strict=False):
        _draw_panel(axes, panel, lines)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    return figure


def draw_frontier(plots: Path) -> Figure | None:
    """Score against KL from the reference, a point a step, joined in the order of time and coloured by it.

    Rollouts are samples on training prompts, their KL estimated by k3, which is never negative. Held-out answers are
    greedy ones on prompts that nothing trains on, their KL exact. Where the first still rise and the second fall, the
    reward model is being exploited (Gao 2023).
    """
    ppo = plots / "train_ppo"
    series = (
        ("rollouts", read_points(ppo / "objective.csv", "kl_k3", "score"), "o", 34, SOFT),
        ("held-out answers", read_points(ppo / "held_out.csv", "kl", "score"), "D", 62, SERIES[3]),
    )
    steps = [step for _, points, *_ in series for step, *_ in points]
    if not steps:
        return None
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    colors = ScalarMappable(Normalize(min(steps), max(steps)), "viridis")
    for name, points, marker, size, edge in series:
        if points:
            when, kl, scores = zip(*points, strict=True)
            axes.plot(smooth(kl), smooth(scores), color=edge, linewidth=0.9, alpha=0.6, zorder=1)
            axes.scatter(kl, scores, s=size, c=colors.to_rgba(np.array(when)), marker=marker, edgecolors=edge, zorder=2)
            axes.plot([], [], color=edge, linewidth=0.9, marker=marker, markerfacecolor="white", label=name)
    bar = figure.colorbar(colors, ax=axes, ticks=MaxNLocator(6, integer=True), pad=0.02)
    bar.set_label("PPO step", color=SOFT)
    bar.outline.set_visible(False)
    axes.set_xlabel("KL to the SFT model, nats a response", color=SOFT)
    axes.set_ylabel("score, deviations of SFT samples", color=SOFT)
    axes.legend(frameon=False)
    _tidy(axes)
    return figure


def draw_over_optimisation(curve: Sequence[Mapping[str, float]]) -> Figure:
    """Scores of held-out answers by both reward models against KL from SFT, bootstrap intervals as bands (Gao 2023)."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    kl = [point["kl"] for point in curve]
    for color, (judge, label) in zip(SERIES, JUDGES.items(), strict=False):
        mean, low, high = ([point[f"{judge}{end}"] for point in curve] for end in ("", "_low", "_high"))
        axes.plot(kl, mean, color=color, label=label, marker="o", linewidth=1.6, markersize=4.5)
        axes.fill_between(kl, low, high, color=color, alpha=0.13, linewidth=0)
    for point in curve:
        axes.annotate(f"{point['step']:g}", (point["kl"], point["gold"]), xytext=(4, -11), textcoords="offset points")
    if not curve:
        axes.text(0.5, 0.5, "no looks at held-out answers: train_ppo.guards.reward_hacking is off", ha="center")
    axes.set_xlabel("KL to the SFT model, nats a response; the numbers are PPO steps", color=SOFT)
    axes.set_ylabel("score, deviations of SFT samples", color=SOFT)
    axes.legend(frameon=False)
    _tidy(axes)
    return figure


def draw_reliability(bins: Mapping[str, Sequence[Bin]]) -> Figure:
    """Accuracy against confidence; a dot's area is its share of the pairs, the dashed line is perfect calibration."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([0.5, 1], [0.5, 1], color=SOFT, linewidth=0.8, linestyle="--")
    for color, (judge, parts) in zip(SERIES, bins.items(), strict=False):
        confidence, accuracy = [part.confidence for part in parts], [part.accuracy for part in parts]
        axes.plot(confidence, accuracy, color=color, linewidth=1.0, label=JUDGES[judge], marker="o", markersize=3)
        axes.scatter(confidence, accuracy, s=[1200 * part.weight for part in parts], color=color, alpha=0.35)
    axes.set_xlabel("confidence: probability that the model gives the response it prefers", color=SOFT)
    axes.set_ylabel("share of held-out pairs ranked right", color=SOFT)
    axes.set_xlim(0.48, 1.02)
    axes.set_ylim(-0.05, 1.08)
    axes.legend(frameon=False, loc="lower right")
    _tidy(axes)
    return figure


def draw_histograms(scores: Mapping[str, Sequence[float]], lengths: Mapping[str, Sequence[int]]) -> Figure:
    """How the models' scores and lengths spread: a bar for each model in each bin, and its mean as a dotted line."""
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    pictures = zip(figure.subplots(1, 2), (scores, lengths), ("gold score", "tokens of an answer"), strict=True)
    for axes, values, label in pictures:
        every = [value for some in values.values() for value in some]
        low, high = min(every), max(every)
        edges = np.linspace(low, high, BINS + 1) if high > low else np.array([low - 0.5, low + 0.5])
        colors = SERIES[: len(values)]
        axes.hist([list(some) for some in values.values()], edges, color=colors, label=list(values))
        for color, some in zip(colors, values.values(), strict=True):
            axes.axvline(float(np.mean(some)), color=color, linewidth=1.2, linestyle=":")
        axes.set_xlabel(label, color=SOFT)
        axes.set_ylabel("answers", color=SOFT)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False, fontsize=9)
        _tidy(axes)
    return figure


def read_points(file: Path, *columns: str) -> list[tuple[Any, ...]]:
    """(step, value, ...) of the rows in which no column is empty; nothing where the file or a column is missing."""
    if not file.is_file():
        return []
    with file.open(encoding="utf-8", newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if all(row.get(column) for column in columns)]
    return [(int(row["step"]), *(float(row[column]) for column in columns)) for row in rows]


def smooth(values: Sequence[float]) -> list[float]:
    """Up to `LONG` values as they are; of more, each one's mean with a twentieth of all on each side."""
    reach = len(values) // 20 if len(values) > LONG else 0
    near = [values[max(i - reach, 0) : i + reach + 1] for i in range(len(values))]
    return [sum(some) / len(some) for some in near]


def _lines(panel: Panel, file: Path) -> dict[str, Points]:
    """The panel's curves by label."""
    lines: dict[str, Points] = {}
    for column in _columns(file):
        for pattern, label in panel.labels.items():
            if fnmatchcase(column, pattern):
                ending = column.removeprefix(pattern.rstrip("*"))
                lines[label.replace("*", ending)] = read_points(file, column)
    return {label: points for label, points in lines.items() if points}


def _columns(file: Path) -> Sequence[str]:
    if not file.is_file():
        return []
    with file.open(encoding="utf-8", newline="") as lines:
        return csv.DictReader(lines).fieldnames or []


def _draw_panel(axes: Any, panel: Panel, lines: dict[str, Points]) -> None:
    for color, (label, points) in zip(cycle(SERIES), lines.items(), strict=False):
        steps, values = zip(*points, strict=True)
        if len(points) > LONG:
            axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.3)
            axes.plot(steps, smooth(values), color=color, label=label, linewidth=1.8)
        else:
            axes.plot(steps, values, color=color, label=label, linewidth=1.6, marker="o", markersize=3.2)
    if panel.level is not None:
        axes.axhline(panel.level, color=SOFT, linewidth=0.8, linestyle="--")
    axes.set_title(panel.title, loc="left", color=INK, fontsize=10.5, fontweight="bold")
    axes.set_xlabel("step", color=SOFT, fontsize=9)
    axes.set_ylabel(panel.unit, color=SOFT, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if any(lines):
        axes.legend(frameon=False, fontsize=9)
    _tidy(axes)


def _tidy(axes: Any) -> None:
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9aa5b1")
    axes.tick_params(colors=SOFT, labelsize=9)
