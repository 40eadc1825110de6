"""`reports/report.html`: the run on one self-contained page."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, SERIES = "#1f2933", ("#2563eb", "#d97706", "#059669", "#be185d")


@dataclass(frozen=True)
class Curve:
    """A picture made of columns of one curve file."""

    title: str
    file: str
    columns: tuple[str, ...]
    y_label: str


CURVES = (
    Curve("SFT: training loss", "train_sft/train.csv", ("loss",), "nats per token"),
    Curve("SFT: held-out loss by language", "train_sft/eval.csv", ("loss_en", "loss_zh"), "nats per token"),
    Curve("Reward model: ranking loss", "train_reward/train.csv", ("loss",), "loss"),
    Curve("Reward model: accuracy on held-out pairs", "train_reward/eval.csv", ("accuracy",), "share of pairs"),
    Curve(
        "PPO: reward model's score",
        "train_ppo/objective.csv",
        ("score", "score_with_penalty"),
        "score (SFT samples: mean 0, std 1)",
    ),
    Curve("PPO: KL to the SFT model", "train_ppo/objective.csv", ("kl",), "nats per response"),
    Curve("PPO: response length", "train_ppo/objective.csv", ("response_tokens",), "tokens"),
    Curve("PPO: entropy", "train_ppo/policy.csv", ("entropy",), "nats per token"),
)


def render_report(
    *, metrics: Mapping[str, float], models: Sequence[str], samples: Sequence[Mapping[str, Any]], plots: Path
) -> str:
    """The page as HTML, pictures inside.

    Args:
        metrics: flat, as in `metrics/evaluate.json`.
        models: names of the models in the order their answers are shown.
        samples: `{"lang", "prompt", "answers": {model: {"text", "score"}}}`.
        plots: folder of curve files; a picture without its file or columns is left out.
    """
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    pictures = [(curve.title, image) for curve in CURVES if (image := _draw(curve, plots)) is not None]
    template = environment.get_template("report.html.jinja")
    return template.render(metrics=dict(sorted(metrics.items())), models=models, samples=samples, pictures=pictures)


def _draw(curve: Curve, plots: Path) -> str | None:
    """The curve as the data URL of a PNG."""
    lines = {column: read_curve(plots / curve.file, column) for column in curve.columns}
    lines = {column: points for column, points in lines.items() if points}
    if not lines:
        return None
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    for color, (column, points) in zip(SERIES, lines.items(), strict=False):
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color=color, label=column, linewidth=1.6, marker="." if len(points) < 30 else None)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel(curve.y_label, color=INK)
    axes.grid(color="#e5e7eb", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1:
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def read_curve(file: Path, column: str) -> list[tuple[int, float]]:
    """(step, value) of a column, rows where it is empty left out; nothing where file or column is missing."""
    if not file.is_file():
        return []
    with file.open(encoding="utf-8", newline="") as lines:
        return [(int(row["step"]), float(row[column])) for row in csv.DictReader(lines) if row.get(column)]
