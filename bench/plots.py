"""Pictures of results: ratios with their targets, and costs as one quantity grows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from bench.parts import Measure
from bench.report import GIB, Line, Point
from chatloom.files import atomic_file

MET, MISSED, FREE, TARGET = "#2a7f86", "#d1603d", "#8d99ae", "#14213d"
TITLES: dict[Measure, str] = {
    "speed": "times as fast as the other (more is better)",
    "memory": "share of the other's peak memory (less is better)",
    "arithmetic": "share of the machine's matrix product rate (more is better)",
}


def plot_ratios(lines: Sequence[Line], path: Path) -> None:
    """A bar a comparison: the median ratio, a whisker over all rounds, a tick where the target is."""
    groups = {title: [line for line in lines if line.measure == measure] for measure, title in TITLES.items()}
    groups = {title: group for title, group in groups.items() if group}
    heights = [len(group) + 0.6 for group in groups.values()]
    figure, axes = plt.subplots(
        len(groups),
        1,
        figsize=(9, 0.7 + 0.6 * len(groups) + 0.4 * sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis, (title, group) in zip(axes[:, 0], groups.items(), strict=True):
        _bars(axis, title, group)
    keys: list[Any] = [Patch(color=MET, label="target met"), Patch(color=MISSED, label="target missed")]
    keys += [Patch(color=FREE, label="no target"), Line2D([], [], color=TARGET, linewidth=2.5, label="target")]
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False, fontsize=9)
    _save(figure, path)


def _bars(axis: Any, title: str, lines: Sequence[Line]) -> None:
    places = range(len(lines))
    ratios = [line.ratio for line in lines]
    whiskers = [
        [line.ratio - min(line.ratios) for line in lines],
        [max(line.ratios) - line.ratio for line in lines],
    ]
    colours = [{True: MET, False: MISSED, None: FREE}[line.holds] for line in lines]
    axis.barh(places, ratios, xerr=whiskers, color=colours, height=0.62, capsize=3, ecolor="#333333")
    for place, line in zip(places, lines, strict=True):
        axis.annotate(
            f"{line.ratio:.2f}x",
            (0, place),
            (5, 0),
            textcoords="offset points",
            va="center",
            color="white",
            fontsize=9,
            fontweight="bold",
        )
        if line.target is not None:
            axis.plot([line.target] * 2, [place - 0.42, place + 0.42], color=TARGET, linewidth=2.5)
    axis.set_yticks(places, [line.what for line in lines], fontsize=9)
    axis.set_ylim(len(lines) - 0.4, -0.6)
    axis.set_xlim(0, 1.08 * max(max(*line.ratios, line.target or 0) for line in lines))
    axis.set_title(title, fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)


def plot_scaling(points: Sequence[Point], path: Path) -> None:
    """Speed above memory, a column for each quantity that grows."""
    names = list(dict.fromkeys(point.axis for point in points))
    figure, axes = plt.subplots(2, len(names), figsize=(3.6 * len(names), 5), squeeze=False, layout="constrained")
    for column, name in enumerate(names):
        group = sorted((point for point in points if point.axis == name), key=lambda point: point.value)
        above, below = axes[:, column]
        _curve(above, f"{group[0].unit}/s", [(point.value, point.per_second) for point in group], MET)
        _curve(below, "peak memory, GiB", [(point.value, point.peak_bytes / GIB) for point in group], TARGET)
        below.set_xlabel(name)
    _save(figure, path)


def _curve(axis: Any, label: str, points: Sequence[tuple[float, float]], colour: str) -> None:
    values, costs = zip(*points, strict=True)
    axis.plot(values, costs, "o-", color=colour)
    axis.set_ylabel(label)
    axis.set_xscale("log")
    axis.set_xticks(values, [_short(value) for value in values], fontsize=9)
    axis.minorticks_off()
    if max(costs) > 20 * min(costs):
        axis.set_yscale("log")
    else:
        axis.set_ylim(0, 1.15 * max(costs))
    axis.spines[["top", "right"]].set_visible(False)


def _short(value: float) -> str:
    return f"{value / 1e6:.3g}M" if value >= 1e5 else f"{value:g}"


def _save(figure: Any, path: Path) -> None:
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, metadata={"Software": None})
    plt.close(figure)
