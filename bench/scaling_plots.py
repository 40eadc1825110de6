"""Pictures of docs/scaling.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.patches import Patch

from bench.scaling import (
    CAPACITY_CARDS,
    CAPACITY_JOBS,
    SIZES,
    capacities,
    published_rows,
    scaled,
    serving_rows,
)
from chatloom.files import atomic_file
from chatloom.parallel.hardware import Hardware

DARK, TEAL, ORANGE, GREY, GOLD, SAGE = "#14213d", "#2a7f86", "#d1603d", "#8d99ae", "#d9a441", "#9dbf9e"
COLOURS = (DARK, TEAL, ORANGE, GREY, GOLD, SAGE)


def draw(hardware: Hardware, folder: Path) -> None:
    """Every picture of the page, into `folder`."""
    _published(hardware, folder / "plan-published.png")
    _serving(folder / "plan-4bit.png")
    _capacity(hardware, folder / "plan-capacity.png")
    _sizes(hardware, folder / "plan-sizes.png")


def _published(hardware: Hardware, path: Path) -> None:
    rows = published_rows(hardware)
    figure, axis = plt.subplots(figsize=(9, 4.6), layout="constrained")
    bars = {
        "published": [mib / 1024 for _, mib, _, _ in rows],
        "plan, as labelled": [labelled / 1024 for _, _, labelled, _ in rows],
        "plan, as read": [read / 1024 for _, _, _, read in rows],
    }
    _grouped(axis, [label for label, *_ in rows], bars, (DARK, GREY, TEAL), form="{:.1f}")
    axis.set_xlabel("peak memory of a GPU, GiB")
    axis.set_title("SFT of Llama-2-7B on H800: ColossalChat's figures and the plan", fontsize=10, loc="left")
    axis.legend(frameon=False, fontsize=9)
    _save(figure, path)


def _serving(path: Path) -> None:
    rows = serving_rows()
    figure, axis = plt.subplots(figsize=(9, 3.8), layout="constrained")
    bars = {
        "published, at least": [row[1] for row in rows],
        "plan, one scale an output": [row[2] for row in rows],
        "plan, groups of 128 (Chatloom's)": [row[3] for row in rows],
    }
    _grouped(axis, [row[0] for row in rows], bars, (DARK, GREY, TEAL), form="{:.2f}")
    axis.set_xlabel("memory of the weights, GiB")
    axis.set_title("4-bit serving", fontsize=10, loc="left")
    axis.legend(frameon=False, fontsize=9)
    _save(figure, path)


def _capacity(hardware: Hardware, path: Path) -> None:
    found = {(c.method, c.card): c for c in capacities(hardware)}
    figure, axis = plt.subplots(figsize=(9, 5.2), layout="constrained")
    bars = {method: [found[method, card].billions for card in CAPACITY_CARDS] for method in CAPACITY_JOBS}
    drawn = _grouped(axis, CAPACITY_CARDS, bars, COLOURS, form="{:.1f}B")
    for method, patches in zip(CAPACITY_JOBS, drawn, strict=True):
        for card, patch in zip(CAPACITY_CARDS, patches, strict=True):
            if found[method, card].host_limited:
                patch.set(hatch="///", edgecolor="white")
    axis.set_xlabel("parameters of the largest model that fits, billions")
    axis.set_title("SFT on one GPU, one row of 2048 tokens, activation checkpointing", fontsize=10, loc="left")
    keys: list[Any] = [Patch(color=colour, label=method) for method, colour in zip(CAPACITY_JOBS, COLOURS, strict=True)]
    keys.append(Patch(facecolor=GREY, edgecolor="white", hatch="///", label="host memory is the limit"))
    axis.legend(handles=keys, frameon=False, fontsize=9)
    _save(figure, path)


def _sizes(hardware: Hardware, path: Path) -> None:
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for line in scaled(hardware):
        if line.made is not None:
            timed = line.made.step
            speed = timed.tokens / timed.seconds / line.job.gpus
            lines.setdefault((line.model, line.how), []).append((line.job.gpus, speed))
    models = list(dict.fromkeys(model for model, _ in lines))
    figure, axes = plt.subplots(1, len(models), figsize=(9, 3.4), layout="constrained")
    for axis, model in zip(axes, models, strict=True):
        own = [(how, points) for (name, how), points in lines.items() if name == model]
        for (how, points), colour in zip(own, COLOURS[1:], strict=False):
            axis.plot(*zip(*points, strict=True), "o-", color=colour, label=how)
        axis.set_xscale("log", base=2)
        axis.set_xticks(SIZES, [str(size) for size in SIZES])
        axis.minorticks_off()
        axis.set_ylim(0, 1.25 * max(speed for _, points in own for _, speed in points))
        axis.set_xlabel("H100 GPUs, eight a machine")
        axis.set_ylabel("tokens/s of a GPU")
        axis.set_title(f"{model}: SFT, 1024 rows of 2048 tokens a step", fontsize=10, loc="left")
        axis.legend(frameon=False, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _grouped(
    axis: Any, labels: Sequence[str], bars: dict[str, list[float]], colours: Sequence[str], form: str
) -> list[Any]:
    """Horizontal bars, a group a label, from the top; each with its value. The bars of each series."""
    height = 0.8 / len(bars)
    drawn = []
    for i, ((name, values), colour) in enumerate(zip(bars.items(), colours, strict=False)):
        places = [place + (i - (len(bars) - 1) / 2) * height for place in range(len(labels))]
        patches = axis.barh(places, values, height=0.92 * height, color=colour, label=name)
        axis.bar_label(patches, [form.format(value) for value in values], padding=3, fontsize=8)
        drawn.append(patches)
    axis.set_yticks(range(len(labels)), labels, fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.12 * max(max(values) for values in bars.values()))
    axis.spines[["top", "right"]].set_visible(False)
    return drawn


def _save(figure: Any, path: Path) -> None:
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, metadata={"Software": None})
    plt.close(figure)
