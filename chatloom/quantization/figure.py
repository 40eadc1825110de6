"""The picture of a quantization: layers against rounding to nearest, and perplexity by language."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from chatloom.evaluation.figures import GRID, INK, SERIES, SOFT
from chatloom.quantization.comparison import LayerError

MODELS = {"full": "unquantized", "gptq": "GPTQ", "rounded": "rounded to nearest"}
COLORS = (*SERIES, SOFT, "#7c3aed", "#0891b2")
WIDTH = 0.26


def draw(layers: Sequence[LayerError], metrics: Mapping[str, float], bits: int) -> Figure:
    """Left: a point a layer, GPTQ's error over rounding's; below the line it is the better one. Right: perplexities."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_errors(left, layers)
    _draw_perplexities(right, metrics)
    left.set_title(
        f"Output error of each layer at {bits} bits", loc="left", color=INK, fontsize=10.5, fontweight="bold"
    )
    right.set_title("Perplexity of held-out answers", loc="left", color=INK, fontsize=10.5, fontweight="bold")
    for axes in (left, right):
        axes.grid(color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=SOFT, labelsize=9)
    return figure


def _draw_errors(axes: Any, layers: Sequence[LayerError]) -> None:
    kinds = list(dict.fromkeys(error.kind for error in layers))
    for index, kind in enumerate(kinds):
        own = [error for error in layers if error.kind == kind]
        color = COLORS[index % len(COLORS)]
        axes.scatter([e.rounded for e in own], [e.gptq for e in own], s=26, color=color, alpha=0.8, label=kind)
    ends = [value for error in layers for value in (error.gptq, error.rounded)]
    axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color=SOFT, linewidth=0.9, linestyle="--")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("rounded to nearest: squared error over squared output", color=SOFT, fontsize=9)
    axes.set_ylabel("GPTQ: the same", color=SOFT, fontsize=9)
    axes.legend(frameon=False, fontsize=9)


def _draw_perplexities(axes: Any, metrics: Mapping[str, float]) -> None:
    prefix = "perplexity/full_"
    langs = [name.removeprefix(prefix) for name in metrics if name.startswith(prefix)]
    for index, (model, label) in enumerate(MODELS.items()):
        heights = [metrics[f"perplexity/{model}_{lang}"] for lang in langs]
        places = [place + (index - 1) * WIDTH for place in range(len(langs))]
        bars = axes.bar(places, heights, WIDTH * 0.92, color=SERIES[index], label=label)
        axes.bar_label(bars, fmt="%.3g", fontsize=8, color=SOFT, padding=2)
    axes.set_xticks(range(len(langs)), langs)
    axes.margins(y=0.16)
    axes.legend(frameon=False, fontsize=9)
